"""Modules that add their input themselves: wrapped as they are, they would add it inside the delta residual too."""

import re

from torch import nn

from deepdelta.errors import UserError

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names under which torch's wrappers (compile, activation checkpointing, FSDP) hold the one module they wrap."""

_RESNET = "wrap deepdelta.nn.resnet_branch(block)"
_APART = "wrap its self-attention and its feed-forward apart"
_BRANCHES = "wrap its branches (attention, feed-forward, convolutions) apart, without the addition"
ADDING = {
    "torch.nn.modules.transformer.TransformerEncoderLayer": _APART,
    "torch.nn.modules.transformer.TransformerDecoderLayer": "wrap its attentions and its feed-forward apart",
    "torch.nn.modules.transformer.TransformerEncoder": "wrap the parts of its layers",
    "torch.nn.modules.transformer.TransformerDecoder": "wrap the parts of its layers",
    "torch.nn.modules.transformer.Transformer": "wrap the parts of its layers",
    "torchvision.models.resnet.BasicBlock": _RESNET,
    "torchvision.models.resnet.Bottleneck": _RESNET,
    "torchvision.models.convnext.CNBlock": "wrap its `block`",
    "torchvision.models.vision_transformer.EncoderBlock": _APART,
    "torchvision.models.swin_transformer.SwinTransformerBlock": _APART,
    "transformers.modeling_layers.GradientCheckpointingLayer": _BRANCHES,
    "deepdelta.nn.residual.DeltaResidual": "it is wrapped already; call it on the state",
}
"""Known classes by full name (no library need be installed), and what to do instead."""
LAYERS = re.compile(r"\w*(EncoderLayer|DecoderLayer|Res(idual|[nN]et)(Block|Unit)|ConvN[eE][xX]t(V2|1d)?(Layer|Block))")
"""How transformers names layers that are whole, where they are not its GradientCheckpointingLayer."""
SUBLAYERS = re.compile(r"\w+Layer(SelfAttention|CrossAttention|FF)")
"""How it names T5's sublayers, which add their input too; what is inside of them does not."""


def unwrapped(module: nn.Module) -> nn.Module:
    """What torch's wrappers are around."""
    while name := next((name for name in WRAPPERS if name in module._modules), None):
        module = module.get_submodule(name)
    return module


def refuse_adding(branch: nn.Module) -> None:
    """Raise UserError for a module that is known to add its input to its output, or a Sequential of such."""
    branch = unwrapped(branch)
    kinds = [_adding(child) for child in branch] if isinstance(branch, nn.Sequential) else [_adding(branch)]
    if kinds and all(kinds) and kinds[0] is not None:
        name, instead = kinds[0]
        raise UserError(f"{name} adds its input itself, which a delta residual replaces: {instead}.")


def _adding(module: nn.Module) -> tuple[str, str] | None:
    """The name of a class that adds its input, and what to wrap instead."""
    module = unwrapped(module)
    kind = type(module)
    if kind.__module__.startswith("transformers.models."):
        if SUBLAYERS.fullmatch(kind.__name__):
            return kind.__name__, "wrap the attention or the feed-forward that it holds"
        if LAYERS.fullmatch(kind.__name__):
            return kind.__name__, _BRANCHES
    known = _known(module)
    if known is None:
        return None
    # Of the base class of transformers' layers the name says nothing.
    name = kind.__name__ if known.startswith("transformers.") else known.rpartition(".")[2]
    return name, ADDING[known]


def _known(module: nn.Module) -> str | None:
    """The full name under which `ADDING` knows the module's class or one that it derives from."""
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__)
    return next((name for name in names if name in ADDING), None)


def resnet_branch(block: nn.Module) -> nn.Sequential:
    """F of a torchvision BasicBlock or Bottleneck: its convolutions and norms without the addition and the last ReLU.

    The modules are the block's own, not copies. After the rewrite the network's ReLU acts on each value channel:
    `state = torch.relu(residual(state))`.

    Raises:
        UserError: another kind of block, or one that changes width or resolution: there, reduce the state, apply the
            block as it is, and expand again.
    """
    name = (_known(block) or "").rpartition(".")[2]
    if name not in ("BasicBlock", "Bottleneck"):
        raise UserError(f"resnet_branch takes a torchvision BasicBlock or Bottleneck, got {type(block).__name__}.")
    if getattr(block, "downsample", None) is not None:
        raise UserError(
            f"this {name} changes width or resolution, so its output is no rewrite of its input's state: "
            "use stream.reduce, the block as it is, and the next stream's expand."
        )
    names = ["conv1", "bn1", "relu", "conv2", "bn2"] + (["relu", "conv3", "bn3"] if name == "Bottleneck" else [])
    return nn.Sequential(*(block.get_submodule(part) for part in names))
