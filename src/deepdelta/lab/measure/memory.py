"""The peak memory of allocated tensors during a training step.

Counted are the bytes of tensor storages: parameters, optimiser state and batch (`held`), and all that the step
allocates: activations, what is saved for backward, gradients, temporaries. Not counted are the allocator's reserve,
code, and scratch memory inside a kernel.

On CUDA the allocator's own statistics are read (sizes rounded up to 512 bytes). Elsewhere there are none, so every
storage that an operation returns is registered and struck off when it is freed. The profiler's memory events say the
same to within some kilobytes of scratch memory, but can only be had by writing and parsing a trace file.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(step: Callable[[], object], held: Iterable[Tensor]) -> int:
    """Bytes of `held`, plus the most that was allocated at one time during `step` above what was before it.

    Run the step once before: the first one also allocates the optimiser's state, and on CUDA libraries' workspaces.

    Args:
        step: one training step; on devices other than CUDA it must not be compiled, since compiled code allocates
            out of sight.
        held: the tensors that exist before the step and belong to it, all on one device; others are not counted. They
            are taken to outlive the step.
    """
    storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in held)}
    own: int = sum(storage.nbytes() for storage in storages.values())
    device = next((storage.device for storage in storages.values() if storage.device.type == "cuda"), None)
    if device is None:
        ledger = _Ledger()
        with ledger:
            step()
        return own + ledger.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before: int = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    peak: int = torch.cuda.max_memory_allocated(device)
    return own + peak - before


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is allocated, in bytes, relative to the moment of entry, and its peak.

    An operation's result in a storage not seen before is an allocation. A storage that is first seen as an argument
    existed at entry: it counts nothing while it lives, and its size less once it is freed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocated = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for argument in tree_leaves((args, kwargs)):
            self._register(argument)
        result = function(*args, **kwargs)
        for leaf in tree_leaves(result):
            self.allocated += self._register(leaf)
        self.peak = max(self.peak, self.allocated)
        return result

    def _register(self, value: Any) -> int:
        """The bytes of a tensor's storage where it is new here, else 0."""
        if not isinstance(value, Tensor):
            return 0
        storage = value.untyped_storage()
        size, address = storage.nbytes(), storage.data_ptr()
        if size == 0 or address in self._alive:
            return 0
        self._alive[address] = weakref.ref(storage, partial(self._freed, address, size))
        return size

    def _freed(self, address: int, size: int, _: object) -> None:
        del self._alive[address]
        self.allocated -= size
