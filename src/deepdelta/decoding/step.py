"""Which residuals a fused step can do whole, gate and target included, when one token per row is decoded."""

from dataclasses import replace

import torch
from torch import nn

from deepdelta.nn.backend import auto
from deepdelta.nn.input_map import InputMap, InputWeights
from deepdelta.nn.parts.direction import normalisation
from deepdelta.nn.plain import plain
from deepdelta.nn.residual import DeltaResidual
from deepdelta.ops.step.decoding import DTYPES, DecodingStep


def one_token_map(
    residual: DeltaResidual, following: InputMap, rows: int, device: torch.device, dtype: torch.dtype
) -> InputMap:
    """`following` with the rewrite of `residual` in its call, where a fused step can do it for N rows of one token.

    As it is where the residual's backend does not take fused code, on another device or dtype than the CPU's fp32 and
    fp64, and for settings other than: rank 1 with a linear gate and, where the rule has a target, a linear one; or the
    plain residual x + h. Those go through the residual itself, whose parts any setting may change.
    """
    config, maps, weights = residual.config, residual.linear_maps(), following.weights(dtype)
    # However few the numbers are: in one call all that costs more to call than to compute is saved.
    fuses = auto(residual.work, device, dtype).backend if (own := residual.runtime.backend) == "auto" else own
    adds = config.rule == "additive" and config.value_channels == 1
    if fuses != "fused" or not (adds or maps) or device.type != "cpu" or dtype not in DTYPES:
        return following
    whole = plain(following.norm, nn.Identity) and not following.needs_x_in
    if weights is not None and (following.query is not None or (weights.weight is None and not whole)):
        weights = None
    opening = weights or InputWeights()
    step = DecodingStep(
        rows,
        config.value_channels,
        residual.dim,
        dtype,
        maps=maps,
        gating=None if maps is None else residual.gating(maps[1]),
        normalise=normalisation(config, residual.dim),
        compression=opening.compression,
        norm_weight=opening.weight,
        norm_eps=opening.eps,
        opens=weights is not None,
    )
    return replace(following, one_token=step)
