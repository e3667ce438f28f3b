"""torchvision's models, from the folder of their own where `make test` puts them.

PyPI's wheel of torchvision is linked against the libraries of the CUDA build of torch. Beside a CPU build its compiled
operators do not load, which torchvision tolerates, but then it registers shape functions and gradients for them by
name, which fails: "operator torchvision::nms does not exist". Installed beside such a torch it breaks every import of
transformers, so it lies outside of site-packages, and only the tests that use its models see it. The models use none of
these operators: where the library does not load, their names are declared here, without an implementation.
"""

import importlib.util
import sys
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "torchvision"
NAMES = """nms qnms roi_align _roi_align_backward qroi_align ps_roi_align _ps_roi_align_backward roi_pool
_roi_pool_backward ps_roi_pool _ps_roi_pool_backward deform_conv2d _deform_conv2d_backward""".split()


def _operators_load() -> bool:
    if importlib.util.find_spec("torchvision") is None:
        sys.path.append(str(FOLDER))
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"torchvision is neither installed nor in {FOLDER}, where `make test` puts it.")
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        return False
    return True


if not _operators_load():
    # Held here: the names vanish with the object that declared them.
    DECLARED = torch.library.Library("torchvision", "DEF")
    for name in NAMES:
        DECLARED.define(f"{name}(Tensor x) -> Tensor")

from torchvision import models  # noqa: E402

__all__ = ["models"]
