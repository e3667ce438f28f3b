"""What a rewrite can tell about itself, handed to a recorder that the caller supplies."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from deepdelta.nn.residual import DeltaResidual, RewriteRecord

Recorder = Callable[[str, RewriteRecord], None]


@contextmanager
def recording(module: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Within the context, every delta residual in `module` hands each of its rewrites to `recorder`.

    Outside it nothing is computed or kept. Under torch.compile the residuals are compiled anew on entry, since the
    recorded values are additional outputs of the same operation.

    Args:
        module: any module that holds residuals made by `DeltaStream.wrap`.
        recorder: called as recorder(name of the residual in `module`, record), once per rank, in the order of
            application.
    """
    residuals = [(name, part) for name, part in module.named_modules() if isinstance(part, DeltaResidual)]
    for name, residual in residuals:
        residual.recorder = _named(recorder, name)
    try:
        yield
    finally:
        for _, residual in residuals:
            residual.recorder = None


def _named(recorder: Recorder, name: str) -> Callable[[RewriteRecord], None]:
    return lambda record: recorder(name, record)
