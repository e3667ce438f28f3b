"""The page on which I - beta k k^T is moved by hand, with the facts of docs/method.md to choose."""

import math
from typing import Any

import torch
from torch import Tensor

from deepdelta.explorer.page import assemble, asset
from deepdelta.files import parse
from deepdelta.operator import DeltaOperator
from deepdelta.version import __version__


def operator_page() -> str:
    """The whole page as HTML; of each fact it holds what `DeltaOperator` says, which the page compares with its own."""
    presets = [preset | _measured(preset) for preset in parse(asset("presets.json"), "presets.json", "install anew")]
    scripts = ("algebra.js", "common.js", "stage.js", "plots.js", "operator.js")
    data = {"version": __version__, "presets": presets}
    return assemble("The operator of a delta residual", "operator.html", data, scripts)


def direction(dim: int, angle: float, height: float, length: float) -> Tensor:
    """k of spherical coordinates in degrees, fp64."""
    a, h = math.radians(angle), math.radians(height) if dim == 3 else 0.0
    unit = [math.cos(h) * math.cos(a), math.cos(h) * math.sin(a), math.sin(h)]
    return length * torch.tensor(unit[:dim], dtype=torch.float64)


def _measured(preset: dict[str, Any]) -> dict[str, Any]:
    product = DeltaOperator.compose(
        [
            DeltaOperator(
                direction(preset["dim"], layer["angle"], layer["height"], layer["length"]),
                torch.tensor(layer["beta"], dtype=torch.float64),
            )
            for layer in preset["layers"]
        ]
    )
    eigenvalues = [(value.real, value.imag) for value in map(complex, product.eigenvalues().tolist())]
    return {
        "eigenvalues": sorted(eigenvalues),
        "singular_values": product.singular_values().tolist(),
        "determinant": product.determinant().item(),
        "lifted": product.determinant(preset["channels"]).item(),
    }
