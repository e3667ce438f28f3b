"""The page on which I - beta k k^T is moved by hand, with the facts of docs/method.md to choose."""

import math
from typing import Any

import torch

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


def _measured(preset: dict[str, Any]) -> dict[str, Any]:
    product = DeltaOperator.compose([_operator(preset["dim"], layer) for layer in preset["layers"]])
    eigenvalues = [(value.real, value.imag) for value in map(complex, product.eigenvalues().tolist())]
    return {
        "eigenvalues": sorted(eigenvalues),
        "singular_values": product.singular_values().tolist(),
        "determinant": product.determinant().item(),
        "lifted": product.determinant(preset["channels"]).item(),
    }


def _operator(dim: int, layer: dict[str, Any]) -> DeltaOperator:
    """Of a layer whose k is given by spherical coordinates in degrees; fp64."""
    a, h = math.radians(layer["angle"]), math.radians(layer["height"]) if dim == 3 else 0.0
    unit = torch.tensor([math.cos(h) * math.cos(a), math.cos(h) * math.sin(a), math.sin(h)][:dim], dtype=torch.float64)
    return DeltaOperator(layer["length"] * unit, torch.tensor(layer["beta"], dtype=torch.float64))
