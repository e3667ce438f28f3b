"""Cached decoding: the uncached model's logits for every variant, however the ids come, and what is kept for it."""

import dataclasses
from typing import Any

import pytest
import torch

from deepdelta import GPT, PRESETS, GPTConfig, ResidualConfig, UserError, generate, recording, use_backend
from deepdelta.decoding import DecodingCache
from helpers import perturb

pytestmark = pytest.mark.usefixtures("unchecked_file")
CONTEXT = 9
TC = PRESETS["paper-tc"]


def small(residual: ResidualConfig, backend: str = "reference", dtype: torch.dtype = torch.float64) -> GPT:
    sizes = {"vocab_size": 11, "dim": 10, "heads": 2, "head_dim": 6, "layers": 2, "context": CONTEXT}
    model = GPT(GPTConfig(**sizes, residual=residual), seed=3).double()
    perturb(model)
    use_backend(model, backend)
    return model.to(dtype)


def tokens(batch: int = 2, length: int = CONTEXT, seed: int = 0) -> torch.Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(seed))


def uncached(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def fed(cache: DecodingCache, ids: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    return torch.cat([cache.decode(piece) for piece in ids.split(pieces, dim=1)], dim=1)


VARIANTS: dict[str, ResidualConfig] = {
    **PRESETS,
    **{
        f"{rule}-{channels}": ResidualConfig(rule=rule, value_channels=channels, expansion=expansion)
        for rule in ("delta", "write_only", "erase_only", "additive", "additive_erase", "two_gate")
        for channels, expansion in ((1, "repeat"), (3, "embedding_conv"))
    },
    **{f"taps-{k}": dataclasses.replace(TC, compression_kernel=k, expansion_kernel=k) for k in (1, 3, 5, 12)},
    "shared-token": dataclasses.replace(TC, compression_sharing="block", compression_init="random"),
    **{
        f"{rule}-1-token": dataclasses.replace(TC, rule=rule, value_channels=1, expansion="repeat")
        for rule in ("delta", "additive")
    },
    "shared-channel": dataclasses.replace(PRESETS["paper-cc"], compression_sharing="block"),
    "rank-2": dataclasses.replace(PRESETS["paper-cc"], rank=2),
    "rank-2-token": dataclasses.replace(TC, rank=2),
    "pooled-flat-rank-2": ResidualConfig(direction="pooled", target="branch", direction_pool="flatten", rank=2),
    "per-channel": ResidualConfig(gate_per_channel=True, norm="none", value_channels=3),
    "operator": ResidualConfig(direction_norm="operator"),
    "channels": ResidualConfig(rule="channels", value_channels=3),
    "affine": ResidualConfig(target="affine"),
    "blocks": dataclasses.replace(PRESETS["ddl"], erase_blocks=2),
    "range-1": dataclasses.replace(PRESETS["paper-cc"], gate_range=1, gate_init=0.5),
    "bounded": ResidualConfig(direction_norm="bounded", target="magnitude"),
    "free": ResidualConfig(direction_norm="free"),
    "two-layer": ResidualConfig(gate="two_layer", target="linear_input"),
    "constant": ResidualConfig(gate="constant", target="constant"),
    "causal-channels": ResidualConfig(compression="channel_conv", compression_causal=True, compression_kernel=2),
}
FUSED = """additive ddl retrofit paper-cc paper-scalar code-tc write_only-3 erase_only-1 two_gate-3 additive-1-token
shared-token rank-2 per-channel channels affine range-1""".split()
"""Those whose fused step is given different things, or that have none: numba compiles each anew."""


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "reference") for name in VARIANTS), *((name, "fused") for name in FUSED)]
)
def test_cached_logits_are_the_uncached_ones(name, backend):
    model, ids = small(VARIANTS[name], backend), tokens()
    expected = uncached(model, ids)
    for pieces in ([CONTEXT], [1] * CONTEXT, [4, 1, 3, 1]):
        logits = fed(DecodingCache(model, batch=2), ids, pieces)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    # Shorter than any convolution, then on.
    torch.testing.assert_close(DecodingCache(model, 2).decode(ids[:, :2]), expected[:, :2], rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize(
    "name", ["additive", "paper-cc", "paper-scalar", "paper-tc", "paper-v1", "shared-token", "two_gate-3"]
)
@pytest.mark.parametrize("pieces", [[CONTEXT], [1] * CONTEXT, [2, 5, 1, 1]], ids=str)
def test_a_padded_row_is_decoded_as_if_alone(name, backend, pieces):
    model, ids, padding = small(VARIANTS[name], backend), tokens(3), [0, 3, 7]
    cache = DecodingCache(model, 3, padding)
    logits = fed(cache, ids, pieces)
    assert logits.isfinite().all()
    for row, pads in enumerate(padding):
        alone = uncached(model, ids[row : row + 1, pads:])
        torch.testing.assert_close(logits[row : row + 1, pads:], alone, rtol=0, atol=1e-10)
    # Which ids the padding is makes no difference at all, and neither does having decoded something else before.
    changed = ids.clone()
    for row, pads in enumerate(padding):
        changed[row, :pads] = (changed[row, :pads] + 1) % 11
    cache.clear()
    again = fed(cache, changed, pieces)
    assert all(torch.equal(again[row, pads:], logits[row, pads:]) for row, pads in enumerate(padding))


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("name", ["additive", "paper-cc", "paper-scalar", "paper-tc"])
def test_single_precision(name, backend):
    model, ids = small(PRESETS[name], backend, torch.float32), tokens()
    expected = uncached(model, ids)
    for pieces in ([CONTEXT], [1] * CONTEXT):
        logits = fed(DecodingCache(model, 2), ids, pieces)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("name", ["paper-cc", "paper-tc"])
def test_low_precision(name, backend):
    model, ids = small(PRESETS[name], backend, torch.bfloat16), tokens()
    logits = fed(DecodingCache(model, 2), ids, [4, 1, 1, 3])
    assert logits.dtype == torch.bfloat16
    exact = uncached(small(PRESETS[name]), ids)
    # As far from the exact logits as the uncached model in this precision is, and no further.
    error, usual = (logits.double() - exact).square().mean(), (uncached(model, ids).double() - exact).square().mean()
    assert 0 < error < 4 * usual
    single = small(PRESETS[name], backend, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = fed(DecodingCache(single, 2), ids, [4, 1, 1, 3])
    assert 0 < (mixed.double() - exact).square().mean() < 4 * usual


@pytest.mark.parametrize("sharing", ["sublayer", "block"])
def test_histories_hold_the_last_inputs_of_every_convolution(sharing):
    residual = dataclasses.replace(TC, compression_kernel=3, expansion_kernel=4, compression_sharing=sharing)
    model, ids = small(residual), tokens()
    cache = DecodingCache(model, 2)
    inputs: list[torch.Tensor] = []
    parts = {id(r.compression_part()): r.compression_part() for r in model.residuals()}
    for part in (*parts.values(), model.stream.readout):
        part.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    uncached(model, ids[:, :7])
    fed(cache, ids[:, :7], [4, 1, 1, 1])
    assert len(cache.compression_histories) == len(inputs) == 2 * 2 + 1
    for history, states in zip(cache.compression_histories, inputs, strict=True):
        assert history.values.shape == (2, 2, 4, 10)
        torch.testing.assert_close(history.values, states[:, -2:], rtol=0, atol=1e-12)
    assert cache.expansion_history is not None
    assert torch.equal(cache.expansion_history.values, model.embedding(ids[:, 4:7]))
    for name, histories in (("paper-cc", 0), ("additive", 0), ("paper-tc-repeat", 5)):
        cache = DecodingCache(small(PRESETS[name]))
        assert len(cache.compression_histories) == histories
        assert (cache.expansion_history is not None) == (name == "paper-cc")


def held(cache: DecodingCache) -> int:
    """Bytes of every storage that the cache leads to and its model does not own."""
    own = {p.untyped_storage().data_ptr() for p in (*cache.model.parameters(), *cache.model.buffers())}
    storages: dict[int, int] = {}
    seen: set[int] = {id(cache.model)} | {id(module) for module in cache.model.modules()}

    def walk(thing: Any) -> None:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            if storage.data_ptr() not in own and storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            for value in (*thing.keys(), *thing.values()):
                walk(value)
        elif isinstance(thing, list | tuple | set):
            for value in thing:
                walk(value)
        elif type(thing).__module__.startswith("deepdelta"):
            walk(vars(thing))

    walk(vars(cache))
    return sum(storages.values())


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_memory(backend):
    batch, width, number = 3, 10, 8
    keys_values = 2 * 2 * batch * 2 * CONTEXT * 6 * number
    for channels in (1, 2, 8):
        for compression in ("channel", "token"):
            cache = DecodingCache(
                small(ResidualConfig(value_channels=channels, compression=compression), backend), batch
            )
            pointers = [tensor.data_ptr() for layer in cache.layers for tensor in layer]
            taps = {"channel": 1, "token": 4}[compression]
            states = 5 * channels * width if channels > 1 or compression == "token" else 0
            expected = (keys_values, batch * states * (taps - 1) * number, states * taps * number)
            assert cache.memory() == expected
            assert held(cache) == sum(expected)
            fed(cache, tokens(batch), [5, 1, 1, 2])
            # Of the tokens fed nothing more is held than there was room for, and it lies where it lay.
            assert cache.memory() == expected and held(cache) == sum(expected)
            assert pointers == [tensor.data_ptr() for layer in cache.layers for tensor in layer]
    shared = DecodingCache(small(dataclasses.replace(TC, compression_sharing="block")))
    assert shared.memory().folded_weights == 3 * 4 * width * 4 * number


@pytest.mark.parametrize("name", ["additive", "paper-cc", "code-tc"])
@pytest.mark.parametrize("length", [1, 4, CONTEXT, CONTEXT + 3])
def test_generation_equals_the_uncached_one(name, length):
    model, prompt = small(PRESETS[name]), tokens(1, length)[0].tolist()
    fed_lengths: list[int] = []
    hook = model.embedding.register_forward_pre_hook(lambda module, args: fed_lengths.append(args[0].shape[1]))
    greedy = list(generate(model, prompt, tokens=12, temperature=0.0))
    drawn = list(generate(model, prompt, tokens=12, temperature=0.8, top_k=6, seed=5))
    hook.remove()
    room = max(CONTEXT - length, 0)
    one_by_one = [min(length, CONTEXT), *[1] * room, *[CONTEXT] * (11 - room)]
    assert fed_lengths == one_by_one * 2
    ids, expected = list(prompt), []
    for _ in range(12):
        ids.append(int(uncached(model, torch.tensor([ids[-CONTEXT:]]))[0, -1].argmax()))
    assert greedy == ids[length:]
    generator, ids = torch.Generator().manual_seed(5), list(prompt)
    for _ in range(12):
        logits = uncached(model, torch.tensor([ids[-CONTEXT:]]))[0, -1]
        kept = logits >= logits.topk(6).values[-1]
        shares = torch.where(kept, (logits / 0.8).exp(), torch.zeros_like(logits))
        expected.append(int(torch.multinomial(shares / shares.sum(), 1, generator=generator)))
        ids.append(expected[-1])
    assert drawn == expected


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_recorders_see_decoding_and_gradients_do_not_pass(backend):
    model, ids = small(PRESETS["paper-cc"], backend), tokens()
    cache, records = DecodingCache(model, 2), []
    with recording(model, lambda name, record: records.append((name, record))):
        logits = fed(cache, ids[:, :4], [3, 1])
    assert not logits.requires_grad
    names = [f"layers.{i}.{part}" for i in range(2) for part in ("attention", "mlp")]
    assert [name for name, _ in records] == names * 2
    torch.testing.assert_close(logits, uncached(model, ids[:, :4]), rtol=0, atol=1e-10)
    with recording(model, lambda name, record: records.append((name, record))):
        uncached(model, ids[:, :4])
    for (_, one), (_, whole) in zip(records[4:8], records[8:], strict=True):
        torch.testing.assert_close(one.beta, whole.beta[:, 3:], rtol=0, atol=1e-10)


def test_the_backend_may_change_between_calls():
    model, ids = small(PRESETS["paper-cc"]), tokens()
    cache = DecodingCache(model, 2)
    logits = [cache.decode(ids[:, :2])]
    for t in range(2, 6):
        use_backend(model, "fused" if t % 2 else "reference")
        logits.append(cache.decode(ids[:, t : t + 1]))
    torch.testing.assert_close(torch.cat(logits, 1), uncached(model, ids[:, :6]), rtol=0, atol=1e-10)


def full(*pieces: int, batch: int = 2) -> None:
    cache = DecodingCache(small(PRESETS["paper-cc"]), 2)
    for piece in pieces:
        cache.decode(tokens(batch, piece))


ERRORS = [
    (lambda: full(10), "context is 9 tokens, of which the cache holds 0: 10 more do not fit"),
    (lambda: full(8, 1, 1), "context is 9 tokens, of which the cache holds 9: 1 more do not fit; call clear()"),
    (lambda: full(2, batch=3), "this cache decodes ids of shape (2, T) with T at least 1, got (3, 2)."),
    (lambda: full(0), "this cache decodes ids of shape (2, T) with T at least 1, got (2, 0)."),
    (lambda: DecodingCache(small(PRESETS["paper-cc"]), 0), "batch must be at least 1, got 0."),
    *(
        (lambda padding=padding: DecodingCache(small(PRESETS["paper-cc"]), 2, padding), "padding must be 2 numbers")
        for padding in ([1], [0, 9], [-1, 0], [])
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[f"case{i}" for i in range(len(ERRORS))])
def test_messages(call, message):
    with pytest.raises(UserError) as caught:
        call()
    assert message in str(caught.value)


def test_a_refused_call_leaves_the_cache_as_it_was():
    model, ids = small(TC), tokens()
    cache = DecodingCache(model, 2)
    cache.decode(ids[:, :5])
    with pytest.raises(UserError):
        cache.decode(ids[:, :5])
    torch.testing.assert_close(cache.decode(ids[:, 5:]), uncached(model, ids)[:, 5:], rtol=0, atol=1e-10)
