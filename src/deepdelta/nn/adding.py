"""Modules that add their input themselves: wrapped as they are, they would add it inside the delta residual too."""

from torch import nn

from deepdelta.errors import UserError

ADDING = {
    "torch.nn.modules.transformer.TransformerEncoderLayer": "wrap its self-attention and its feed-forward apart",
    "torch.nn.modules.transformer.TransformerDecoderLayer": "wrap its attentions and its feed-forward apart",
    "torchvision.models.resnet.BasicBlock": "wrap deepdelta.nn.resnet_branch(block)",
    "torchvision.models.resnet.Bottleneck": "wrap deepdelta.nn.resnet_branch(block)",
    "deepdelta.nn.residual.DeltaResidual": "it is wrapped already; call it on the state",
}
"""Known classes by full name (torchvision need not be installed), and what to do instead."""


def refuse_adding(branch: nn.Module) -> None:
    """Raise UserError for a module that is known to add its input to its output."""
    for kind in type(branch).__mro__:
        if advice := ADDING.get(f"{kind.__module__}.{kind.__qualname__}"):
            raise UserError(f"{kind.__name__} adds its input itself, which a delta residual replaces: {advice}.")


def resnet_branch(block: nn.Module) -> nn.Sequential:
    """F of a torchvision BasicBlock or Bottleneck: its convolutions and norms without the addition and the last ReLU.

    The modules are the block's own, not copies. After the rewrite the network's ReLU acts on each value channel:
    `state = torch.relu(residual(state))`.

    Raises:
        UserError: another kind of block, or one that changes width or resolution: there, reduce the state, apply the
            block as it is, and expand again.
    """
    name = type(block).__name__
    if name not in ("BasicBlock", "Bottleneck"):
        raise UserError(f"resnet_branch takes a torchvision BasicBlock or Bottleneck, got {name}.")
    if getattr(block, "downsample", None) is not None:
        raise UserError(
            f"this {name} changes width or resolution, so its output is no rewrite of its input's state: "
            "use stream.reduce, the block as it is, and the next stream's expand."
        )
    names = ["conv1", "bn1", "relu", "conv2", "bn2"] + (["relu", "conv3", "bn3"] if name == "Bottleneck" else [])
    return nn.Sequential(*(block.get_submodule(part) for part in names))
