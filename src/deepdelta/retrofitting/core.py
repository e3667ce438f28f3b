"""Delta residuals for a network that exists, which computes the same function until it is trained further."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, Unpack

import torch
from torch import nn

from deepdelta.config import from_plain, to_plain
from deepdelta.errors import UserError
from deepdelta.nn.presets import PRESETS, preset_named
from deepdelta.releases import check_tested
from deepdelta.retrofitting.blocks import Deltas, Job, has_own_forward
from deepdelta.retrofitting.config import RetrofitConfig, RetrofitOptions, RetrofitReport
from deepdelta.retrofitting.described import retrofit_stack
from deepdelta.retrofitting.describing import full_name
from deepdelta.retrofitting.encoder import retrofit_encoder, retrofit_layer
from deepdelta.retrofitting.families import STACKS
from deepdelta.retrofitting.gpt import retrofit_gpt
from deepdelta.retrofitting.huggingface import MARK, MarkedConfig, is_pretrained
from deepdelta.retrofitting.places import named, of_peft, places
from deepdelta.retrofitting.resnet import retrofit_resnet

Model = TypeVar("Model", bound=nn.Module)
Adapter = Callable[[nn.Module, Job], None]

_TORCH = "torch.nn.modules.transformer."
ADAPTERS: dict[str, Adapter] = {
    "torchvision.models.resnet.ResNet": retrofit_resnet,
    f"{_TORCH}TransformerEncoder": retrofit_encoder,
    f"{_TORCH}TransformerEncoderLayer": retrofit_layer,
    "deepdelta.models.gpt.GPT": retrofit_gpt,
}
"""The modules that run blocks whose forward no table says, by full name: their libraries need not be installed."""

REFUSED = {
    f"{_TORCH}TransformerDecoder": "its layers also attend to a memory; retrofit the encoder alone",
    f"{_TORCH}TransformerDecoderLayer": "it also attends to a memory; retrofit the encoder alone",
}
TRACED = ("torch.fx.graph_module.GraphModule", "torch.jit._script.ScriptModule")
"""What holds a forward pass as a graph, in which additions have no place of their own."""

ATTRIBUTE = "_deepdelta_retrofit"


class Retrofitted(NamedTuple):
    """What a model remembers of its retrofit."""

    job: Job
    families: tuple[str, ...]
    plain: int
    """Parameters before."""
    added: Mapping[str, int]
    """Parameters added, by the name of the module that holds them."""
    names: Mapping[nn.Module, str]
    """Every module of the model, by which it is known whatever is wrapped around it later."""
    keys: tuple[str, ...]
    """Names of the tensors that are new."""
    tensors: frozenset[str]
    """Names of all tensors."""


def retrofit(
    model: Model, value_channels: int = 4, *, preset: str = "retrofit", **options: Unpack[RetrofitOptions]
) -> Model:
    """Replace the residual additions x + F(x) of `model`, in place, by delta residuals that compute the same at first.

    Every residual is X' = X + h w_h^T - a beta k (k^T X) (rule additive_erase), w_h = 1 + W c / sqrt(D), with a = 0 and
    W = 0 at the start: exactly X + h. The state starts as V equal copies, read with weights that add up to 1. The
    gradients of `a`, W and the readings are not zero, and those of the gates are not once `a` has moved. The parameters
    of `model` keep names, values and identity.

    Args:
        model: a model that holds a network of transformers that `retrofitting/families.py` has a table for (Llama,
            Mistral, Gemma, GPT-2, BERT, T5, ViT and others), or one that was described to `retrofitting.register`; a
            torchvision ResNet, an nn.TransformerEncoder (or layers of one), or a `deepdelta.GPT` with plain residuals.
        value_channels: V.
        preset: of `deepdelta.PRESETS`, `retrofit` alone.
        options: the other fields of `RetrofitConfig`: trainable, gate, erase_init, seed and so on.

    Returns:
        The same object. `retrofitted(model)` reports on it, `undo_retrofit(model)` takes everything back.

    Raises:
        UserError: another preset, no residual structure that is known, blocks that are not the library's own, a model
            that has been retrofitted already, or an unknown option. The model is then as it was.
    """
    if preset_named(preset) != PRESETS["retrofit"]:
        raise UserError(f"the preset of a retrofit is 'retrofit', whose parts are options, got '{preset}'.")
    config = from_plain(RetrofitConfig, {"value_channels": value_channels, **options}, where="retrofit")
    if not isinstance(model, nn.Module):
        raise UserError(f"retrofit takes a torch.nn.Module, got {type(model).__name__}.")
    _refuse_again(model)
    if config.seed is None:
        config = replace(config, seed=int(torch.randint(2**62, (), device="cpu")))
    job = Job(config, {module: name for name, module in named(model, {})})
    found = list(_stacks(model))
    if not found:
        raise UserError(_nothing_found(model))
    before, keys = list(model.parameters()), set(places(model, {}))
    try:
        for module, name in found:
            if name in ADAPTERS:
                ADAPTERS[name](module, job)
            else:
                retrofit_stack(module, STACKS[name], job)
    except BaseException:
        job.undo()
        raise
    families = tuple(_short(name) for _, name in found)
    converted = {module for stack, _ in found for module in stack.modules()}
    for module in model.modules():
        if is_pretrained(module) and not converted.isdisjoint(module.modules()):
            mark = {"options": to_plain(config), "families": list(families)}
            job.mark(module.config, MARK, MarkedConfig, mark)
    if config.trainable == "residual":
        old = set(before)
        for module in list(model.modules()):
            for name, parameter in module._parameters.items():
                if parameter in old:
                    job.freeze(module, name)
    job.hook(model.register_state_dict_pre_hook(refuse_losing))  # type: ignore[no-untyped-call]
    tensors = places(model, {})
    new = tuple(key for key in tensors if key not in keys)
    added = dict.fromkeys(job.parts, 0)
    for key in new:
        part = next(part for part in added if f"{key}.".startswith(f"{part}.") or not part)
        added[part] += tensors[key].value().numel()
    plain = sum(parameter.numel() for parameter in before)
    names = {module: name for name, module in named(model, {})}
    setattr(model, ATTRIBUTE, Retrofitted(job, families, plain, added, names, new, frozenset(tensors)))
    return model


def retrofitted(model: nn.Module) -> RetrofitReport:
    """What was done to a model by `retrofit`.

    Raises:
        UserError: nothing was.
    """
    record = record_of(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return RetrofitReport(record.families, record.job.config, record.added, record.plain, trained)


def undo_retrofit(model: Model) -> Model:
    """Give `model` its plain residuals back; its own parameters stay as they are now, what was added is dropped.

    Raises:
        UserError: the model was not retrofitted, or something that was put on or around its blocks since would break:
            a forward of their own (hooks of device maps), an adapter in place of what was added. Nothing is changed.
    """
    job = record_of(model).job
    job.check_undo()
    job.undo()
    delattr(model, ATTRIBUTE)
    return model


def refreeze(model: nn.Module) -> None:
    """Freeze what `trainable='residual'` froze, when loading has put other parameters in its place."""
    record_of(model).job.frozen(False)


def refuse_losing(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """State-dict hook: what a retrofit added and a PEFT adapter does not hold is lost when that is saved.

    Where it is frozen beside the adapter, as PEFT leaves it, that is said once.

    Raises:
        UserError: it is trained beside such an adapter.
    """
    inside = prefix.startswith("base_model.") and "peft" in sys.modules
    if not inside and not any(map(of_peft, model.modules())):
        return
    check_tested("peft")
    record = record_of(model)
    found = places(model, record.names)
    beside = [key for key in record.keys if key in found]
    if lost := [key for key in beside if found[key].trained]:
        raise UserError(
            f"a PEFT adapter does not save what is trained outside of it, and '{lost[0]}' and {len(lost) - 1} more "
            "tensors of the retrofit are: give the adapter modules_to_save=['delta'], or freeze them first and keep "
            "them with deepdelta.save_retrofit."
        )
    held = (child for module in model.modules() if of_peft(module) for child in module.children())
    if beside and not record.job.told and not any(isinstance(child, Deltas) for child in held):
        record.job.told = True
        warnings.warn(
            f"what the retrofit added ({len(beside)} tensors) is frozen beside this adapter, and so stays as it was; "
            "to train and save it, give the adapter modules_to_save=['delta'].",
            UserWarning,
            stacklevel=2,
        )


def record_of(model: nn.Module) -> Retrofitted:
    record: Retrofitted | None = getattr(model, ATTRIBUTE, None)
    if record is None:
        raise UserError(
            f"this {type(model).__name__} was not retrofitted: give the module that deepdelta.retrofit was called with."
        )
    return record


def _refuse_again(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, ATTRIBUTE) or isinstance(module, Deltas):
            where = f"its module '{name}'" if name else "the model"
            raise UserError(
                f"{where} has been retrofitted already; call deepdelta.undo_retrofit on it first to change options."
            )


def _stacks(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules that run blocks, each with the name that it is known by, outermost only."""
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        bases: dict[str, Any] = {full_name(kind): kind for kind in type(module).__mro__}
        for name, reason in REFUSED.items():
            if name in bases:
                raise UserError(f"retrofit does not know {_short(name)} ('{path}'): {reason}.")
        name = next((name for name in bases if name in ADAPTERS or name in STACKS), "")
        if not name or module in inside:
            continue
        if type(module).forward is not bases[name].forward or has_own_forward(module):
            raise UserError(
                f"{type(module).__name__} has a forward of its own in place of {_short(name)}'s, and may use what its "
                "blocks return; wrap the branches with deepdelta.DeltaStream."
            )
        inside.update(module.modules())
        yield module, name


def _nothing_found(model: nn.Module) -> str:
    kind, known = type(model).__name__, sorted(map(_short, (*ADAPTERS, *STACKS)))
    if any(full_name(base) in TRACED for module in model.modules() for base in type(module).__mro__):
        return (
            f"retrofit cannot see blocks in {kind}, which was traced or scripted to a graph: retrofit the module that "
            f"it was made from. It looks for the modules {', '.join(known)}."
        )
    return (
        f"retrofit knows no residual structure in {kind}: it looked for the modules {', '.join(known)}. Describe its "
        "blocks with deepdelta.retrofitting.register, or wrap its branches with deepdelta.DeltaStream."
    )


def _short(name: str) -> str:
    return name.rpartition(".")[2]
