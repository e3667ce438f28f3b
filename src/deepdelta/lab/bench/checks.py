"""What must hold before anything is timed: a fast wrong answer has no speed.

- every fused case computes the loss and all gradients, at the group's width, depth, context and value
  channels on one sequence, from parameters that are moved off their starting values; the truth is the reference in
  fp64, and the fused case may be ROUNDING times as far from it as the reference in the timed precision is;
- the fused operator computes the values and all gradients of the reference, in fp64, on OPERATOR_TOKENS tokens;
- small networks compute the loss and all gradients of the reference, in fp64;
- rivals give a finite loss and finite gradients;
- cached decoding gives the logits of the uncached reference model, likewise;
- a compiled model computes what the uncompiled one does (checked when its group's turn comes: it is compiled once).
"""

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from deepdelta.decoding import DecodingCache
from deepdelta.device import Device
from deepdelta.errors import UserError
from deepdelta.lab.bench.config import Case, Group
from deepdelta.lab.bench.networks import images_and_labels
from deepdelta.lab.bench.subjects import Operands, Subject, build_model, build_network, random_ids
from deepdelta.lab.measure.agreement import agreement, gradients, loss_and_gradients
from deepdelta.models import GPT
from deepdelta.nn import use_backend
from deepdelta.training.step import backward

OPERATOR_TOKENS = 37
OPERATOR_TOLERANCE = 1e-9
ROUNDING, LEAST = 4, 1e-4
"""Rounding grows with depth, so its size is measured; below LEAST nothing is called an error."""
COMPILED_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""By precision. Errors are relative, see `agreement`."""


def check(group: Group, cases: tuple[Case, ...], chosen: Device) -> Iterator[str]:
    """What was found, in a sentence per case.

    Raises:
        UserError: a case does not agree with its reference, or is not finite.
    """
    for case in cases:
        where = f"{group.name}: {case.name}"
        if group.work == "operator":
            if case.backend == "fused":
                error = agreeing(where, _operator_error(group, case, chosen), OPERATOR_TOLERANCE)
                yield f"{where}: values and gradients of the reference in fp64 within {error:.1e}"
        elif group.work == "network":
            error = agreeing(where, _network_error(group, case), OPERATOR_TOLERANCE)
            yield f"{where}: loss and gradients of the reference in fp64 within {error:.1e}"
        elif group.work == "decoding":
            error = agreeing(where, *_decoding_errors(group, case, chosen))
            yield f"{where}: logits of the uncached reference within {error:.1e}"
        elif case.rival is not None:
            _refuse_not_finite(where, group, case, chosen)
            yield f"{where}: finite loss and gradients"
        elif case.backend == "fused":
            error = agreeing(where, *_model_errors(group, case, chosen))
            yield f"{where}: loss and gradients of the reference within {error:.1e}"


def check_compiled(group: Group, case: Case, subject: Subject, chosen: Device) -> str:
    """The same of a compiled model against the uncompiled one, on what is timed."""
    assert subject.verify is not None
    where = f"{group.name}: {case.name}"
    error = agreeing(where, subject.verify(), COMPILED_TOLERANCE[chosen.precision])
    return f"{where}: the uncompiled model's numbers within {error:.1e}"


def agreeing(where: str, error: float, tolerance: float) -> float:
    """The error, where it is small enough."""
    if not error <= tolerance:
        raise UserError(
            f"{where}: must agree with its reference within {tolerance:.1e} before it is timed, got a relative error "
            f"of {error:.2e}; nothing was timed. This is a fault to report; `deepdelta bench` cannot go on."
        )
    return error


def _model_errors(group: Group, case: Case, chosen: Device) -> tuple[float, float]:
    """How far the fused case is from the truth, and how far it may be."""
    model = build_model(group, case, chosen.device)
    disturb(model)
    ids = random_ids(group, chosen.device, group.context + 1, batch=1)
    fused = loss_and_gradients(model, model, ids, chosen)
    use_backend(model, "reference")
    reference, exact = loss_and_gradients(model, model, ids, chosen), copy.deepcopy(model).double()
    truth = loss_and_gradients(exact, exact, ids, replace(chosen, precision="fp32"))
    return agreement(fused, truth), max(LEAST, ROUNDING * agreement(reference, truth))


def _operator_error(group: Group, case: Case, chosen: Device) -> float:
    assert case.residual is not None
    operands = Operands(case.residual, OPERATOR_TOKENS, group.dim, torch.float64, chosen.device)
    found = []
    for backend in ("fused", "reference"):
        outputs = operands.forward(backend)
        tensors = (*outputs, *operands.backward(outputs))
        found.append({str(number): tensor.detach() for number, tensor in enumerate(tensors)})
    return agreement(*found)


def _network_error(group: Group, case: Case) -> float:
    made = build_network(group, case).double()
    disturb(made)
    images, labels = images_and_labels(group.batch)
    found = []
    for backend in (case.backend, "reference"):
        use_backend(made, backend)
        made.zero_grad()
        loss = F.cross_entropy(made(images.double()), labels)
        backward([loss])
        found.append({"loss": loss.detach()} | dict(gradients(made)))
    return agreement(*found)


@torch.no_grad()
def _decoding_errors(group: Group, case: Case, chosen: Device) -> tuple[float, float]:
    model = build_model(group, case, chosen.device).eval()
    assert isinstance(model, GPT)
    disturb(model)
    ids = random_ids(group, chosen.device, group.context, batch=1)
    cache = DecodingCache(model)
    cached = torch.cat([cache.decode(ids[:, i : i + 1]) for i in range(group.context)], dim=1)
    use_backend(model, "reference")
    reference, truth = model(ids).logits, {"logits": copy.deepcopy(model).double()(ids).logits}
    return agreement({"logits": cached}, truth), max(LEAST, ROUNDING * agreement({"logits": reference}, truth))


def _refuse_not_finite(where: str, group: Group, case: Case, chosen: Device) -> None:
    model = build_model(group, case, chosen.device)
    ids = random_ids(group, chosen.device, group.context + 1, batch=1)
    for name, tensor in loss_and_gradients(model, model, ids, chosen).items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{where}: must be finite before it is timed, but {name} is not; nothing was timed.")


@torch.no_grad()
def disturb(model: nn.Module, seed: int = 1) -> None:
    """Move every parameter: targets and gates start at zero weights, where an error in them would not show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += (0.02 * torch.randn(parameter.shape, generator=generator)).to(parameter)
