"""What the residuals of a model move through memory, and what a training step does, counted operation by operation.

Every operation that PyTorch dispatches reads its arguments and writes its results, and what it changes in place, once;
views move nothing, a tensor that is expanded counts as often as it is stored, a table that is looked up counts whole. A
fused kernel is one operation: what it keeps in registers is not counted. A compiled model joins operations out of
sight, so the model is counted uncompiled.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATES = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("lift_fresh", "detach", "_unsafe_view"),
)
"""Operations that touch no number."""


def moved_bytes(step: Callable[[], object]) -> int:
    """Bytes that `step` moves, with what its backward pass and its optimiser do."""
    counter = _Counter()
    with counter:
        step()
    return counter.bytes


def numbers_per_token(
    build: Callable[[int], nn.Module], kinds: tuple[type[nn.Module], ...], *, vocab_size: int, layers: int, tokens: int
) -> float:
    """fp32 numbers that a forward pass moves per token and sublayer outside the branches.

    Counted with gradients off at `layers` layers and at one, with `tokens` tokens and with half of them: what belongs
    to the embedding, the head and the parameters cancels.

    Args:
        build: the model of so many layers, two sublayers each; a call with (B, T) ids runs it.
        kinds: the classes of the branches, whose insides are not counted.
        layers: at least 2.
        tokens: at least 2, even.
    """

    def moved(model: nn.Module, count: int) -> int:
        ids = torch.arange(count, device=next(model.parameters()).device).remainder(vocab_size).view(1, -1)
        counter = _Counter()
        with counter.without(model, kinds), counter, torch.no_grad():
            model(ids)
        return counter.bytes

    deep, flat = build(layers), build(1)
    per_token = [(moved(model, tokens) - moved(model, tokens // 2)) / (tokens - tokens // 2) for model in (deep, flat)]
    return (per_token[0] - per_token[1]) / (2 * (layers - 1)) / torch.float32.itemsize


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self._inside = 0

    @contextmanager
    def without(self, model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[None]:
        """Count nothing inside modules of these kinds."""

        def enter(*_: object) -> None:
            self._inside += 1

        def leave(*_: object) -> None:
            self._inside -= 1

        handles = []
        for module in model.modules():
            if isinstance(module, kinds):
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        moves = not function.is_view and function._schema.name.removeprefix("aten::") not in ALLOCATES
        if moves and not self._inside:
            written = _written(function._schema, args, kwargs or {}, result)
            self.bytes += sum(map(stored, tree_leaves((args, kwargs, written))))
        return result


def _written(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Any]:
    """New results, and the arguments that are changed in place, which some operations return and others do not."""
    given = {one.name: value for one, value in zip(schema.arguments, args, strict=False)} | dict(kwargs)
    changes = [one.name for one in schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    results = result if len(schema.returns) > 1 else (result,)
    new = [one for one, how in zip(results, schema.returns, strict=False) if how.alias_info is None]
    return [*map(given.get, changes), *new]


def stored(value: Any) -> int:
    """The bytes of a tensor that are stored once: expanded axes are one entry long."""
    if not isinstance(value, Tensor):
        return 0
    count = 1
    for size, stride in zip(value.shape, value.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count * value.element_size()
