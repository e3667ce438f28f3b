"""Published checkpoints and other libraries' formats."""

from deepdelta.interop.checkpoint import read_published
from deepdelta.interop.published import load_published, to_published

__all__ = ["load_published", "read_published", "to_published"]
