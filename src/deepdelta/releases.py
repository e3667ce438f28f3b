"""With which releases of other packages the tests run; another is warned of once, by name."""

import warnings
from importlib.metadata import version

TESTED = {"transformers": ("4.57", "5.24"), "lm_eval": ("0.4.13",), "torchao": ("0.18",)}
"""Of packages whose releases change what this one is made for; patches of a release count as it does."""
_warned: set[str] = set()


def check_tested(package: str) -> None:
    """Warn, once, of a release of this package that the tests do not run with; nothing where any may do."""
    if package not in TESTED or package in _warned:
        return
    found = version(package)
    if not any(found == one or found.startswith(f"{one}.") for one in TESTED[package]):
        _warned.add(package)
        warnings.warn(
            f"deepdelta was tested with {package.replace('_', '-')} {' and '.join(TESTED[package])}, got {found}; what "
            "it gives may be wrong.",
            stacklevel=3,
        )
