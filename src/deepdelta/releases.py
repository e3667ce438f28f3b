"""With which releases of other packages the tests run; another is warned of once, by name."""

import warnings
from importlib.metadata import PackageNotFoundError, version

TESTED = {
    "transformers": ("4.57", "5.24"),
    "lm_eval": ("0.4.13",),
    "torchao": ("0.18",),
    "onnxscript": ("0.7",),
    "peft": ("0.21",),
    "hyper_connections": ("0.4",),
    "accelerate": ("1",),
    "datasets": ("5",),
    "jinja2": ("3",),
    "matplotlib": ("3",),
    "numba": ("0",),
    "onnx": ("1",),
    "onnxruntime": ("1",),
    "plotly": ("7",),
    "pyarrow": ("26",),
    "ray": ("2",),
    "scikit_learn": ("1",),
    "scipy": ("1",),
    "tensorboard": ("2",),
    "wandb": ("0",),
    "x_transformers": ("2",),
}
"""As far as a release has to be the same: the whole but its patch, or its first number. What only examples of the pages
import (lightning, openai) is in the table of docs/ecosystem.md alone: no code of the package comes by there."""
_checked: set[str] = set()


def check_tested(package: str) -> None:
    """Warn, once, of a release of this package that the tests do not run with; nothing where any may do."""
    if package not in TESTED or package in _checked:
        return
    _checked.add(package)
    try:
        found = version(package)
    except PackageNotFoundError:  # a module that no package says to be its own
        return
    if not any(found == one or found.startswith(f"{one}.") for one in TESTED[package]):
        warnings.warn(
            f"deepdelta was tested with {package.replace('_', '-')} {' and '.join(TESTED[package])}, got {found}; what "
            "it gives may be wrong.",
            stacklevel=3,
        )
