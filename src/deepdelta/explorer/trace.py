"""One prompt through the depth of a model: what each rewrite did, and what the model would say before and after it.

Shapes: T tokens, V value channels, D width, N rewrites.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepdelta.data import Tokenizer
from deepdelta.errors import UserError
from deepdelta.nn import DeltaStream, RewriteRecord, recording

SHOWN = 8
"""How many tokens the logit lens names."""
AT_ONCE = 4
"""States that the lens looks through in one pass."""


@runtime_checkable
class Coding(Protocol):
    """What turns text into ids and ids into text: a tokenizer of ours or of the library transformers."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


@torch.no_grad()
def trace(model: nn.Module, tokenizer: Coding, prompt: str) -> dict[str, Any]:
    """What the rewrites of `model` do to the state of every token of `prompt`, as plain data.

    The numbers of a rewrite are those of its `RewriteRecord`. The states between rewrites follow from them,
    X' = X + k (w^T - b k^T X) (docs/method.md#rules). The logit lens is the model's own way out, from the stream's
    readout on, taken from each of these states.

    Raises:
        UserError: no token in the prompt, more than the model takes, no delta residuals, more than one stream, a model
            that gives no logits per token, or one that changes its state between rewrites.
    """
    ids = list(tokenizer.encode(prompt))
    if not ids:
        raise UserError("the prompt must hold at least one token, got none.")
    streams = [module for module in model.modules() if isinstance(module, DeltaStream)]
    if len(streams) != 1:
        raise UserError(f"a model with one DeltaStream is needed to follow its state, got {len(streams)}.")
    input_ids = torch.tensor([ids], device=next(model.parameters()).device)
    records: list[tuple[str, RewriteRecord]] = []
    seen: list[Tensor] = []  # what enters and what leaves the residuals
    with _evaluating(model):
        entry = streams[0].expansion.register_forward_hook(lambda module, args, state: seen.append(state))
        end = streams[0].readout.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with recording(model, lambda *named: records.append(named)), _hooked(entry), _hooked(end):
            _logits(model, input_ids)
        states = _between(seen, [record for _, record in records])
        lens = _lens(model, streams[0], states, input_ids, tokenizer)
    named = {*ids, *(one for state in lens for token in state for one, _ in token["top"])}
    return {
        "ids": ids,
        "texts": {str(one): tokenizer.decode([one]) for one in sorted(named)},
        "rewrites": [_plain(name, record, state[0]) for (name, record), state in zip(records, states[1:], strict=True)],
        "lens": lens,
    }


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _hooked(hook: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


def _between(seen: list[Tensor], records: list[RewriteRecord]) -> list[Tensor]:
    """The N + 1 states (1, T, V, D) before, between and after the rewrites."""
    if len(seen) != 2 or not records or seen[0].ndim != 4:
        raise UserError("the model must expand its tokens once, rewrite the state and read it out once.")
    states = [seen[0].to(records[0].read.dtype)]
    for record in records:
        change = record.write if record.erase is None else record.write - record.erase * record.read
        states.append(states[-1] + change[..., None] * record.direction[..., None, :])
    if not states[-1].isfinite().all():
        raise UserError("the model's state must stay finite on this prompt, got numbers that are not; train it anew.")
    if (states[-1] - seen[1]).norm() > 1e-2 * seen[1].norm():
        raise UserError("the model changes its state between rewrites, which the records of these do not tell.")
    return states


def _logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    output = model(input_ids)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != input_ids.shape:
        raise UserError("the model must give logits (1, tokens, vocabulary) for ids (1, tokens), or what holds such.")
    return logits


def _lens(
    model: nn.Module, stream: DeltaStream, states: list[Tensor], input_ids: Tensor, tokenizer: Coding
) -> list[list[dict[str, Any]]]:
    """Per state and token the likeliest next tokens as (id, probability), and those of the prompt's own next token."""
    lens: list[list[dict[str, Any]]] = []
    following = [*input_ids[0].tolist()[1:], None]
    known = tokenizer.vocab_size if isinstance(tokenizer, Tokenizer) else None
    for part in torch.split(torch.cat(states), AT_ONCE):
        replaced = stream.readout.register_forward_pre_hook(lambda module, args, part=part: (part.to(args[0].dtype),))
        with _hooked(replaced):
            logits = _logits(model, input_ids.expand(len(part), -1))
        for state in logits[..., :known].double().softmax(-1):
            top = state.topk(min(SHOWN, state.shape[-1]))
            lens.append([])
            for ids, values, chance, after in zip(top.indices.tolist(), top.values, state, following, strict=True):
                own = None if after is None else [_numbers(chance[after]), 1 + int((chance > chance[after]).sum())]
                lens[-1].append({"top": list(zip(ids, _numbers(values), strict=True)), "next": own})
    return lens


def _plain(name: str, record: RewriteRecord, after: Tensor) -> dict[str, Any]:
    """A rewrite's record as lists per token; what it erased is b k^T X, and `after` is the state that it made."""
    erased = None if record.erase is None else record.erase * record.read
    kept = ("beta", "erase", "read", "target", "cosine", "state_norm", "norm")
    values = {key: getattr(record, key) for key in kept} | {"erased": erased, "written": record.write}
    lists = {key: None if value is None else _numbers(value[0]) for key, value in values.items()}
    return {"name": name, **lists, "state_norm_after": _numbers(after.norm(dim=-1))}


def _numbers(values: Any) -> Any:
    """Lists of numbers of a tensor or a list; nine digits give each fp32 value back exactly."""
    plain = values.tolist() if isinstance(values, Tensor) else values
    return [_numbers(value) for value in plain] if isinstance(plain, list) else float(f"{plain:.9g}")
