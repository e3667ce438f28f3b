"""The additive GPT at V = 1 against a plain pre-norm transformer written here, from its description alone."""

import math

import pytest
import torch
from torch import Tensor

from deepdelta import GPT, PRESETS, GPTConfig
from deepdelta.errors import UserError
from helpers import randn


def rotated(x: Tensor, base: float, share: float) -> Tensor:
    """(B, H, T, E): half-split rotation of the first features; angles in fp32."""
    width = x.shape[-1]
    half = int(width * share) // 2
    frequency = 1 / base ** (2 * torch.arange(half, dtype=torch.float32) / max(2 * half, 1))
    angle = torch.arange(x.shape[-2], dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def returned(h: Tensor, p: dict[str, Tensor], sublayer: str) -> Tensor:
    """What a branch returns: normed where the model has a weight for it."""
    weight = p.get(sublayer + "branch.out_norm.weight")
    return h if weight is None else rms(h, weight)


def plain_transformer(p: dict[str, Tensor], config: GPTConfig, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Embedding, per layer x + attention(norm(x)) and x + swiglu(norm(x)), norm, tied head; explicit softmax."""
    heads, width = config.heads, config.head_dim or config.dim // config.heads
    x, tokens = p["embedding.weight"][ids], ids.shape[1]
    hidden_mask = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    for i in range(config.layers):
        a, m = f"layers.{i}.attention.", f"layers.{i}.mlp."
        c = rms(x, p[a + "norm.weight"])
        q, k, v = (
            (c @ p[a + f"branch.{part}.weight"].T).unflatten(-1, (heads, width)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        q, k = rotated(q, config.rope_base, config.rope_fraction), rotated(k, config.rope_base, config.rope_fraction)
        if config.qk_norm:
            q, k = rms(q, p[a + "branch.query_norm.weight"]), rms(k, p[a + "branch.key_norm.weight"])
        scores = (q @ k.mT / math.sqrt(width)).masked_fill(hidden_mask, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + returned(mixed @ p[a + "branch.out.weight"].T, p, a)
        c = rms(x, p[m + "norm.weight"])
        gate, up = c @ p[m + "branch.gate.weight"].T, c @ p[m + "branch.up.weight"].T
        x = x + returned((gate / (1 + (-gate).exp()) * up) @ p[m + "branch.out.weight"].T, p, m)
    logits = rms(x, p["norm.weight"]) @ p["embedding.weight"].T
    kept = labels.flatten() != -1
    rows = logits.flatten(0, 1)[kept]
    log_probability = rows - rows.logsumexp(-1, keepdim=True)
    return logits, -log_probability.gather(1, labels.flatten()[kept][:, None]).mean()


CONFIGS = {
    "default": {},
    "wide heads": {"heads": 3, "head_dim": 6},
    "odd heads": {"heads": 2, "head_dim": 7},
    "partly rotated": {"rope_fraction": 0.5, "rope_base": 100.0},
    "no qk norm": {"qk_norm": False},
    "not rotated": {"rope_fraction": 0.0},
    "normed branches": {"out_norm": 0.25},
    "narrow MLP": {"mlp_dim": 5},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_loss_and_every_gradient(changes):
    config = GPTConfig(
        **{
            "vocab_size": 13,
            "context": 9,
            "layers": 2,
            "heads": 2,
            "dim": 16,
            "residual": PRESETS["additive"],
            **changes,
        }
    )
    model = GPT(config, seed=3).double()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += 0.2 * randn(*parameter.shape, seed=i)
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(13, (3, 7), generator=generator)
    labels = torch.randint(13, (3, 7), generator=generator)
    labels[0, :3], labels[2, -1] = -1, -1
    output = model(ids, labels)
    logits, loss = plain_transformer(parameters, config, ids, labels)
    torch.testing.assert_close(output.logits, logits, rtol=1e-9, atol=1e-9)
    # The loss is taken in fp32 whatever the model's precision.
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-6, atol=1e-6)
    cotangent = randn(*logits.shape, seed=5)
    one = torch.autograd.grad(output.logits, parameters.values(), cotangent, retain_graph=True)
    two = torch.autograd.grad(logits, parameters.values(), cotangent, retain_graph=True)
    through_loss = zip(
        torch.autograd.grad(output.loss, parameters.values()),
        torch.autograd.grad(loss, parameters.values()),
        strict=True,
    )
    for name, a, b, (c, d) in zip(parameters, one, two, through_loss, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(c, d, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}, loss: {text}")


def test_the_norms_of_branches_start_where_they_are_told_and_change_nothing_else():
    sizes = {"vocab_size": 13, "context": 9, "layers": 2, "heads": 2, "dim": 16, "residual": PRESETS["additive"]}
    plain, normed = (dict(GPT(GPTConfig(**sizes, out_norm=start)).named_parameters()) for start in (None, 0.25))
    added = {name: value for name, value in normed.items() if name not in plain}
    assert sorted(added) == [
        f"layers.{i}.{part}.branch.out_norm.weight" for i in (0, 1) for part in ("attention", "mlp")
    ]
    for value in added.values():
        torch.testing.assert_close(value.detach(), torch.full((16,), 0.25))
    for name, value in plain.items():
        assert torch.equal(normed[name], value), name


@pytest.mark.parametrize("start", [0.0, -1.0, math.inf, math.nan])
def test_a_norm_that_cannot_start_there_is_refused(start):
    with pytest.raises(UserError, match="out_norm must be None or lie in"):
        GPTConfig(vocab_size=13, out_norm=start)


def test_it_has_the_parameters_of_a_plain_transformer():
    """d = 16, hidden floor(8/3 d) = 42; per layer 4 d^2 + 3 d 42 matrices, two norms, two norms per head."""
    config = GPTConfig(vocab_size=13, context=9, layers=2, heads=2, dim=16, residual=PRESETS["additive"])
    count = sum(parameter.numel() for parameter in GPT(config).parameters())
    assert count == 13 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 42 + 2 * 16 + 2 * 8) + 16
