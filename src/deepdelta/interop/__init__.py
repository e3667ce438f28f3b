"""Published checkpoints and other libraries' formats."""

from deepdelta.interop.checkpoint import import_published
from deepdelta.interop.published import load_published, to_published

__all__ = ["import_published", "load_published", "to_published"]
