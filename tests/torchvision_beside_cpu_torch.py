"""torchvision's models, also where PyPI's wheel of torchvision stands beside a CPU build of torch.

That wheel's compiled operators are linked against the libraries of the CUDA build. Beside a CPU build they do not load,
which torchvision tolerates, but then it registers shape functions and gradients for them by name, which fails:
"operator torchvision::nms does not exist". The models use none of these operators. Where the library does not load,
their names are declared here, without an implementation; where it loads, nothing is done.
"""

import importlib.util
from pathlib import Path

import torch

NAMES = """nms qnms roi_align _roi_align_backward qroi_align ps_roi_align _ps_roi_align_backward roi_pool
_roi_pool_backward ps_roi_pool _ps_roi_pool_backward deform_conv2d _deform_conv2d_backward""".split()


def _operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torchvision is not installed; it comes with the extra `test`.")
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
