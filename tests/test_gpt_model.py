"""The GPT: causality, how it starts, what it stores, precision, errors."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deepdelta import GPT, PRESETS, GPTConfig, ResidualConfig, UserError, use_backend
from deepdelta.models.gpt import label_loss
from helpers import perturb, randn

RULES = ["delta", "write_only", "erase_only", "additive", "additive_erase", "two_gate"]
POOLED = {"direction": "pooled", "target": "branch"}


def small(seed: int = 0, residual: ResidualConfig | None = None, **sizes: Any) -> GPT:
    defaults = {"vocab_size": 11, "dim": 12, "heads": 2, "layers": 2, "context": 8}
    return GPT(GPTConfig(**{**defaults, **sizes, "residual": residual or PRESETS["paper-cc"]}), seed=seed)


def tokens(batch: int = 2, length: int = 8, seed: int = 0, vocabulary: int = 11) -> torch.Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


CAUSAL: list[dict[str, Any]] = [
    *(
        {"expansion": expansion, "compression": compression, "rule": rule}
        for expansion in ("repeat", "embedding_conv")
        for compression in ("channel", "channel_conv", "token")
        for rule in ("delta", "two_gate")
    ),
    *({**POOLED, "direction_pool": pool} for pool in ("mean", "flatten", "attention")),
    {"compression": "channel_conv", "compression_causal": True},
    {"compression": "token", "compression_kernel": 11, "expansion": "embedding_conv", "expansion_kernel": 11},
    {"compression": "token", "compression_sharing": "block", "compression_init": "random"},
    {"value_channels": 1, "rank": 2},
]


@pytest.mark.parametrize("options", CAUSAL, ids=lambda options: "-".join(map(str, options.values())))
def test_no_logit_depends_on_a_later_token(options):
    model = small(residual=ResidualConfig(**options)).double()
    perturb(model)
    ids = tokens()
    logits = model(ids).logits
    for t in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 1 + t) % 11
        other = model(changed).logits
        torch.testing.assert_close(other[:, :t], logits[:, :t], rtol=0, atol=1e-12)
        assert (other[:, t] != logits[:, t]).any()
    # And exactly: no derivative of a logit with respect to a later embedding, every one with respect to its own.
    rows = torch.nn.functional.embedding(ids, model.embedding.weight).detach().requires_grad_()
    hook = model.embedding.register_forward_hook(lambda module, args, out: rows)
    cotangent = randn(*logits.shape)
    out = (model(ids).logits * cotangent).sum((0, 2))
    hook.remove()
    for t in range(ids.shape[1]):
        (gradient,) = torch.autograd.grad(out[t], rows, retain_graph=True)
        assert not gradient[:, t + 1 :].any()
        assert gradient[:, t].abs().sum(-1).min() > 0
    # A prefix alone gives the same logits: nothing depends on the length either.
    torch.testing.assert_close(model(ids[:, :3]).logits, logits[:, :3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_learn_one_batch(preset):
    """Every preset trains: the loss of one batch falls, and every parameter has a gradient somewhere."""
    model = small(residual=PRESETS[preset])
    ids = tokens(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, touched = [], set()
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(ids[:, :-1], ids[:, 1:]).loss
        loss.backward()
        touched |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert touched == {name for name, _ in model.named_parameters()}


def test_how_parameters_start():
    layers, dim = 3, 192
    residual = dataclasses.replace(PRESETS["paper-cc"], gate_init=1.4)
    model = small(vocab_size=300, dim=dim, heads=4, layers=layers, residual=residual)
    std, matrices = 0.5 / math.sqrt(dim), 0
    for name, parameter in model.named_parameters():
        p = parameter.detach()
        if name == "embedding.weight":
            expected = 1 / math.sqrt(dim)
        elif name.endswith("branch.out.weight"):
            expected = std / math.sqrt(layers)
        elif "branch" in name and p.ndim == 2:
            expected = std
        elif name.endswith(("gate.outer.weight", "target.map.weight")):
            expected = std
        elif name.endswith("gate.outer.bias"):
            assert torch.allclose(p, torch.tensor(math.log(0.7 / 0.3)))
            continue
        elif name.endswith("norm.weight"):
            assert torch.equal(p, torch.ones_like(p))
            continue
        elif name == "stream.expansion.weight":
            assert torch.equal(p[..., -1], torch.ones_like(p[..., -1])) and not p[..., :-1].any()
            continue
        else:
            assert name.endswith(("compression.weight", "stream.readout.weight")), name
            assert torch.equal(p, torch.full_like(p, 1 / 4))
            continue
        matrices += 1
        # Six standard errors of a normal sample's deviation and mean.
        assert abs(float(p.std()) / expected - 1) < 6 / math.sqrt(2 * p.numel()), name
        assert abs(float(p.mean())) < 6 * expected / math.sqrt(p.numel()), name
    assert matrices == 1 + layers * (7 + 4)


def test_embedding_convolution_starts_as_repeat():
    ids = tokens()
    convolution = small(residual=PRESETS["paper-cc"])(ids).logits
    repeat = small(residual=dataclasses.replace(PRESETS["paper-cc"], expansion="repeat"))(ids).logits
    torch.testing.assert_close(convolution, repeat, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 4])
def test_rules_start_bit_equal_where_they_share(channels):
    models = {
        rule: dict(small(residual=ResidualConfig(rule=rule, value_channels=channels), seed=5).named_parameters())
        for rule in RULES
    }
    everywhere = set.intersection(*(set(parameters) for parameters in models.values()))
    assert "layers.1.mlp.branch.out.weight" in everywhere and "embedding.weight" in everywhere
    for one in RULES:
        for two in RULES:
            shared = models[one].keys() & models[two].keys()
            assert [name for name in sorted(shared) if not torch.equal(models[one][name], models[two][name])] == []
    for rule, extra in (("delta", {"gate", "target"}), ("erase_only", {"gate"}), ("additive", set())):
        parts = {name.split(".")[3] for name in models[rule] if name.startswith("layers.")}
        write = {"write"} if rule == "additive" and channels > 1 else set()
        compression = {"compression"} if channels > 1 else set()
        assert parts == {"branch", "norm"} | compression | extra | write


def test_seeds():
    one, again, other = (dict(small(seed=seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


SHARING = ["sublayer", "block"]


@pytest.mark.parametrize("sharing", SHARING)
def test_every_tensor_has_one_key(sharing):
    residual = dataclasses.replace(PRESETS["paper-tc"], compression_sharing=sharing)
    tensors = small(residual=residual).state_dict()
    pointers = [tensor.data_ptr() for tensor in tensors.values()]
    assert len(set(pointers)) == len(pointers)
    compressions = {name for name in tensors if name.endswith("compression.weight")}
    sublayers = ("attention", "mlp") if sharing == "sublayer" else ("attention",)
    assert compressions == {f"layers.{i}.{sublayer}.compression.weight" for i in range(2) for sublayer in sublayers}
    assert not any("rotary" in name or "head" in name for name in tensors)


@pytest.mark.parametrize("sharing", SHARING)
def test_deepcopy_save_and_load(tmp_path, sharing):
    model = small(residual=dataclasses.replace(PRESETS["paper-tc"], compression_sharing=sharing))
    perturb(model)
    ids = tokens()
    expected = model(ids).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(ids).logits, expected)
    save_file(twin.state_dict(), tmp_path / "model.safetensors")
    fresh = small(seed=9, residual=twin.config.residual)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(fresh(ids).logits, expected)


@pytest.mark.parametrize("sharing", SHARING)
def test_a_shared_compression_gets_both_gradients(sharing):
    model = small(layers=1, residual=dataclasses.replace(PRESETS["paper-cc"], compression_sharing=sharing)).double()
    perturb(model)
    layer = model.layers[0]
    x = model.stream.expand(randn(1, 4, 12)).requires_grad_()
    layer.mlp(x).sum().backward()
    assert (layer.attention.compression.weight.grad is not None) == (sharing == "block")


def test_loss():
    model, ids = small().double(), tokens()
    output = model(ids)
    assert output.loss is None
    labels = tokens(seed=1)
    labels[0, :5] = -1
    logits, loss = model(ids, labels)
    log_probability = logits.log_softmax(-1)
    picked = [-log_probability[b, t, labels[b, t]] for b in range(2) for t in range(8) if labels[b, t] != -1]
    assert len(picked) == 11
    torch.testing.assert_close(loss, torch.stack(picked).mean(), rtol=1e-12, atol=0)
    labels[0, :3] = -100  # PyTorch's own
    for dtype in (torch.int64, torch.int32):
        assert torch.equal(model(ids, labels.to(dtype)).loss, loss)


def test_the_loss_is_pytorch_s_bit_for_bit_where_labels_count():
    logits, labels = randn(3, 50, 64).float().requires_grad_(), torch.randint(0, 64, (3, 50))
    labels[1, 7:20] = -100
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss = label_loss(logits, labels)
    assert torch.equal(loss, expected)
    assert torch.equal(*(torch.autograd.grad(one, logits)[0] for one in (loss, expected)))


@pytest.mark.parametrize("ignored", [-1, -100])
def test_without_a_label_that_counts_loss_and_gradients_are_0(ignored):
    model = small()
    loss = model(tokens(), torch.full((2, 8), ignored)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("preset", ["additive", "paper-cc", "paper-tc"])
def test_no_rows_or_no_tokens(preset, backend):
    model = small(residual=PRESETS[preset])
    use_backend(model, backend)
    for shape in ((0, 5), (2, 0), (0, 0)):
        ids = torch.zeros(shape, dtype=torch.long)
        logits, loss = model(ids, ids)
        loss.backward()
        assert logits.shape == (*shape, 11) and loss.item() == 0
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_precisions(gate_dtypes):
    ids, labels = tokens(), tokens(seed=1)
    single, double = small(), small().double()
    assert double(ids).logits.dtype == torch.float64
    torch.testing.assert_close(single(ids).logits.double(), double(ids).logits, rtol=1e-4, atol=1e-5)
    dtypes: dict[str, set[torch.dtype]] = {"state": set(), "branch": set()}
    single.stream.expansion.register_forward_hook(lambda m, args, out: dtypes["state"].add(out.dtype))
    single.stream.readout.register_forward_pre_hook(lambda m, args: dtypes["state"].add(args[0].dtype))
    for layer in single.layers:
        for residual in (layer.attention, layer.mlp):
            residual.branch.register_forward_hook(lambda m, args, out: dtypes["branch"].add(out.dtype))
    gate_dtypes.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = single(ids, labels).loss
    loss.backward()
    assert dtypes == {"branch": {torch.bfloat16}, "state": {torch.float32}} and gate_dtypes == {torch.float32}
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), double(ids, labels).loss.double(), rtol=2e-2, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in single.parameters())


def test_pure_bfloat16_model():
    model = small().bfloat16()
    output = model(tokens(), tokens(seed=1))
    assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.loss, small()(tokens(), tokens(seed=1)).loss, rtol=5e-2, atol=0)


ERRORS = [
    (lambda: small()(tokens(length=9)), "the model's context is 8 tokens, got 9; cut the input."),
    (lambda: small(vocab_size=None), "vocab_size must be set"),
    (lambda: small(dim=12, heads=5), "dim must be a multiple of heads, got dim=12, heads=5; or set head_dim."),
    (lambda: small(layers=0), "layers must be at least 1, got 0."),
    (lambda: small(context=-1), "context must be at least 1, got -1."),
    (lambda: small(rope_fraction=1.5), "rope_fraction must lie in [0, 1], got 1.5."),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[f"case{i}" for i in range(len(ERRORS))])
def test_messages(unchecked, call, message):
    with pytest.raises(UserError) as caught:
        call()
    assert message in str(caught.value)
