"""Inputs, comparisons and the dense formulas that the package is held against.

Everything here is written from sections 1 to 3 of the method, with full D x D matrices and explicit sums, and shares
no code with the package: a residual is recomputed from its configuration and its parameters by name.

Shapes: V value channels, D width, T tokens, K taps, r rank; `...` leading axes.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(*shape: int, seed: int = 0) -> Tensor:
    k = randn(*shape, seed=seed)
    return k / k.norm(dim=-1, keepdim=True)


def near(actual: Tensor, expected: Tensor, tol: float = 1e-10) -> None:
    assert actual.dtype == expected.dtype, f"{actual.dtype} is not {expected.dtype}"
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def dense_rewrite(state: Tensor, direction: Tensor, write: Tensor, erase: Tensor) -> Tensor:
    """(I - b_j k k^T) x_j + w_j k for every value channel j, with the D x D matrices; write and erase (..., V)."""
    eye = torch.eye(state.shape[-1], dtype=state.dtype)
    matrix_VDD = eye - erase[..., None, None] * outer(direction, direction)[..., None, :, :]
    moved = torch.einsum("...vij,...vj->...vi", matrix_VDD, state)
    return moved + write[..., :, None] * direction[..., None, :]


def gradients(outputs: Tensor, inputs: Sequence[Tensor], seed: int = 7) -> list[Tensor]:
    """The gradients of all inputs under a random cotangent; an input that the output does not use is an error."""
    cotangent = randn(*outputs.shape, seed=seed).to(outputs.dtype)
    return list(torch.autograd.grad(outputs, list(inputs), cotangent))


def same_values_and_gradients(
    actual: Callable[..., Tensor], expected: Callable[..., Tensor], inputs: Mapping[str, Tensor], tol: float = 1e-9
) -> None:
    """Both functions of the same leaf tensors agree in value and in the gradient of every one of them."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    one, two = actual(**leaves), expected(**leaves)
    near(one, two, tol)
    for name, a, b in zip(leaves, gradients(one, [*leaves.values()]), gradients(two, [*leaves.values()]), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol, msg=lambda text, name=name: f"gradient of {name}: {text}")


def perturb(module: nn.Module, seed: int = 0, size: float = 0.3) -> None:
    """Moves every parameter away from its start, so that ones, zeros and means cannot hide an error."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter += size * randn(*parameter.shape, seed=1000 * seed + i).to(parameter.dtype)


# The method, recomputed: p maps the names of one residual's parameters to tensors.


def compressed(config: object, p: Mapping[str, Tensor], state: Tensor, prefix: str = "compression.") -> Tensor:
    channels = config.value_channels
    if channels == 1 and config.compression == "channel":
        return state[..., 0, :]
    weight = p[prefix + "weight"]
    if config.compression == "channel":
        return sum(weight[j] * state[..., j, :] for j in range(channels))
    read, taps = p[prefix + "read"], config.compression_kernel
    result = torch.zeros_like(state[..., 0, :])
    if config.compression == "channel_conv":
        left = taps - 1 if config.compression_causal else (taps - 1) // 2
        for i in range(channels):
            for k in range(taps):
                if 0 <= i + k - left < channels:
                    result = result + read[i] * weight[:, k] * state[..., i + k - left, :]
        return result
    for j in range(channels):
        result = result + read[j] * causal_convolution(state[..., j, :], weight[j])
    return result


def causal_convolution(x_TD: Tensor, weight_DK: Tensor) -> Tensor:
    """y_t = sum_k w[:, k] x_{t + k - (K - 1)}, tokens before the first counting as zero."""
    tokens, taps = x_TD.shape[-2], weight_DK.shape[-1]
    rows = []
    for t in range(tokens):
        row = torch.zeros_like(x_TD[..., 0, :])
        for k in range(taps):
            if t + k - (taps - 1) >= 0:
                row = row + weight_DK[:, k] * x_TD[..., t + k - (taps - 1), :]
        rows.append(row)
    return torch.stack(rows, dim=-2)


def expanded(config: object, p: Mapping[str, Tensor], x: Tensor, prefix: str = "expansion.") -> Tensor:
    if config.expansion == "repeat":
        return torch.stack([x] * config.value_channels, dim=-2)
    weight_VDK = p[prefix + "weight"]
    return torch.stack([causal_convolution(x, weight_VDK[j]) for j in range(config.value_channels)], dim=-2)


def normed(config: object, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    if config.norm == "none":
        return x
    return x / ((x * x).mean(-1, keepdim=True) + config.norm_eps).sqrt() * p["norm.weight"]


def gate_values(config: object, p: Mapping[str, Tensor], c: Tensor, name: str, start: float) -> list[Tensor]:
    """beta (..., V) per rank, or per block."""
    channels, per_rank = config.value_channels, config.value_channels if config.gate_per_channel else 1
    count = config.rank * config.erase_blocks
    opening = p.get(f"{name}.opening", 1.0)
    if config.gate == "constant":
        return [opening * torch.full((*c.shape[:-1], channels), start, dtype=c.dtype)] * count
    hidden = c
    if config.gate == "two_layer":
        hidden = c @ p[f"{name}.inner.weight"].T
        hidden = (hidden + p[f"{name}.inner.bias"] if config.gate_hidden_bias else hidden).tanh()
    logits = hidden @ p[f"{name}.outer.weight"].T + p[f"{name}.outer.bias"]
    beta = opening * config.gate_range / (1 + (-logits).exp())
    return [beta[..., i * per_rank : (i + 1) * per_rank].expand(*c.shape[:-1], channels) for i in range(count)]


def erased_in_blocks(config: object, p: Mapping[str, Tensor], c: Tensor, h: Tensor, state: Tensor) -> Tensor:
    """sum_j b_j k_j (k_j^T X) over blocks j of the width, k_j of h's numbers there alone."""
    name, blocks = "erase_gate", config.erase_blocks
    width, erased = h.shape[-1] // blocks, torch.zeros_like(state)
    for j, b in enumerate(gate_values(config, p, c, name, config.erase_init)):
        mask = torch.zeros_like(h)
        mask[..., j * width : (j + 1) * width] = 1
        k = mask * h / ((mask * h * h).sum(-1, keepdim=True) + config.direction_eps**2).sqrt()
        erased = erased + outer(b * torch.einsum("...vd,...d->...v", state, k), k)
    return erased


def direction_vectors(config: object, p: Mapping[str, Tensor], state: Tensor, h: Tensor) -> list[Tensor]:
    """The r vectors that directions are made of, before any normalisation."""
    width = h.shape[-1]
    if config.direction == "branch":
        if config.rank == 1:
            return [h]
        return [h @ p["direction.maps.weight"][i * width : (i + 1) * width].T for i in range(config.rank)]
    if config.direction_pool == "mean":
        pooled = state.sum(-2) / config.value_channels
    elif config.direction_pool == "flatten":
        pooled = torch.cat([state[..., j, :] for j in range(config.value_channels)], dim=-1)
    else:
        scores = torch.einsum("...vd,d->...v", state, p["direction.query"]) / math.sqrt(width)
        shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
        pooled = torch.einsum("...v,...vd->...d", shares, state)
    inner = pooled @ p["direction.inner.weight"].T + p["direction.inner.bias"]
    out = (inner / (1 + (-inner).exp())) @ p["direction.outer.weight"].T + p["direction.outer.bias"]
    return [out[..., i * width : (i + 1) * width] for i in range(config.rank)]


def direction_parts(config: object, a: Tensor) -> tuple[Tensor, Tensor]:
    """k, and the vector that a target is written along (k again, except for the operator form)."""
    square, width = (a * a).sum(-1, keepdim=True), a.shape[-1]
    if config.direction_norm == "unit":
        k = a / (square + config.direction_eps**2).sqrt()
    elif config.direction_norm == "operator":  # A = I - beta a a^T / (a^T a + eps), the write divided alike
        return a / (square + config.direction_eps).sqrt(), a / (square + config.direction_eps)
    elif config.direction_norm == "bounded":
        k = a / (square + width).sqrt()
    else:
        k = a / math.sqrt(width)
    return k, k


def target_values(
    config: object, p: Mapping[str, Tensor], x_in: Tensor, c: Tensor, h: Tensor, vectors: Sequence[Tensor]
) -> list[Tensor]:
    channels, results = config.value_channels, []
    for i, a in enumerate(vectors):
        if config.target == "constant":
            results.append(torch.full((*c.shape[:-1], channels), config.target_value, dtype=c.dtype))
            continue
        weight = p["target.map.weight"][i * channels : (i + 1) * channels]
        bias = p["target.map.bias"][i * channels : (i + 1) * channels] if "target.map.bias" in p else 0.0
        if config.target == "linear":
            v = c @ weight.T
        elif config.target == "affine":
            v = p["target.level"][i * channels : (i + 1) * channels] * (1 + c @ weight.T)
        elif config.target == "scaled_sigmoid":
            v = config.target_scale / (1 + (-(x_in @ weight.T + bias)).exp())
        elif config.target == "linear_input":
            v = x_in @ weight.T + bias
        elif config.target == "magnitude":
            v = ((a * a).sum(-1, keepdim=True) + config.direction_eps**2).sqrt() * (1 + c @ weight.T)
        else:
            v = h @ weight.T
        results.append(v)
    return results


def dense_residual(
    config: object,
    p: Mapping[str, Tensor],
    state: Tensor,
    branch: Callable[[Tensor], Tensor],
    shared: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """X' of one residual around `branch`, by the table of docs/parts/rules.md."""
    rule = config.rule
    x_in = compressed(config, p if shared is None else shared, state)
    c = normed(config, p, x_in)
    h = branch(c)
    if rule == "channels":
        factors = 1 + torch.tanh(c @ p["channels.map.weight"].T)
        k, w = factors[..., :-1], math.sqrt(config.value_channels) * factors[..., -1:]
        k = k / (k * k).sum(-1, keepdim=True).sqrt()
        b = gate_values(config, p, c, "gate", config.gate_init)[0][..., :1]
        matrix_VV = torch.eye(k.shape[-1], dtype=k.dtype) - b[..., None] * outer(k, k)
        return matrix_VV @ state + outer(k, w * h)
    if rule in ("additive", "additive_erase", "two_gate"):
        size = ((h * h).sum(-1, keepdim=True) + config.direction_eps**2).sqrt()
        k = h / size
        by = c.shape[-1] ** -0.5 if config.plain_start else 1
        w_h = 1 + by * (c @ p["write.map.weight"].T) if "write.map.weight" in p else torch.ones_like(state[..., 0])
        if config.erase_blocks > 1:
            return state + outer(w_h, h) - erased_in_blocks(config, p, c, h, state)
        if rule == "additive":
            beta, erase = torch.ones_like(w_h), torch.zeros_like(w_h)
        elif rule == "additive_erase":
            name = "erase_gate" if any(key.startswith("erase_gate") for key in p) else "gate"
            beta, erase = torch.ones_like(w_h), gate_values(config, p, c, name, config.erase_init)[0]
        else:
            beta = gate_values(config, p, c, "gate", config.gate_init)[0]
            erase = gate_values(config, p, c, "erase_gate", config.erase_init)[0]
        return dense_rewrite(state, k, beta * size * w_h, erase)
    betas = gate_values(config, p, c, "gate", config.gate_init)
    vectors = direction_vectors(config, p, state, h)
    targets = None if rule == "erase_only" else target_values(config, p, x_in, c, h, vectors)
    for i, a in enumerate(vectors):
        k, along = direction_parts(config, a)
        erase = torch.zeros_like(betas[i]) if rule == "write_only" else betas[i]
        state = dense_rewrite(state, k, torch.zeros_like(erase), erase)
        if targets is not None:
            state = state + outer(betas[i] * targets[i], along)
    return state
