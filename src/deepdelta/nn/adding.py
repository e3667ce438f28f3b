"""Modules that add their input themselves: wrapped as they are, they would add it inside the delta residual too."""

from torch import nn

from deepdelta.errors import UserError

_RESNET = "wrap deepdelta.nn.resnet_branch(block)"
_APART = "wrap its self-attention and its feed-forward apart"
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
    "deepdelta.nn.residual.DeltaResidual": "it is wrapped already; call it on the state",
}
"""Known classes by full name (torchvision need not be installed), and what to do instead."""


def refuse_adding(branch: nn.Module) -> None:
    """Raise UserError for a module that is known to add its input to its output, or a Sequential of such."""
    if isinstance(branch, nn.Sequential):
        kinds = [_known(child) for child in branch]
        known = kinds[0] if kinds and all(kinds) else None
    else:
        known = _known(branch)
    if known is not None:
        name = known.rpartition(".")[2]
        raise UserError(f"{name} adds its input itself, which a delta residual replaces: {ADDING[known]}.")


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
