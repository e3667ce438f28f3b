"""The project's own GPT with plain residuals: other residuals around the same branches and norms."""

from dataclasses import replace

from torch import nn

from deepdelta.errors import UserError
from deepdelta.models import GPT
from deepdelta.retrofitting.blocks import Job, place


def retrofit_gpt(model: nn.Module, job: Job) -> None:
    """Convert a GPT of rule 'additive' at V = 1; it stays a GPT in all that it can do.

    Raises:
        UserError: it has delta residuals already, or convolutions or queries before its branches.
    """
    assert isinstance(model, GPT)
    plain = model.config.residual
    if (plain.rule, plain.value_channels) != ("additive", 1):
        raise UserError(
            "retrofit takes a GPT with plain residuals, rule='additive' and value_channels=1, got "
            f"rule='{plain.rule}' and value_channels={plain.value_channels}: it has delta residuals already."
        )
    if plain.compression != "channel":
        raise UserError(
            f"retrofit takes a GPT with compression='channel', got '{plain.compression}': delta residuals would take "
            "the place of its convolutions."
        )
    if plain.query:
        raise UserError("retrofit takes a GPT with query=False: delta residuals would take the place of its queries.")
    stream = job.stream(
        model.config.dim, init_factor=model.config.init_factor, norm=plain.norm, norm_eps=plain.norm_eps
    )
    for layer in model.layers:
        for name in ("attention", "mlp"):
            old = getattr(layer, name)
            new = stream.wrap(old.branch)
            new.norm, new.runtime = old.norm, old.runtime
            place(new, layer)
            job.part(layer, name)
            job.change(layer, name, new)
    place(stream, model)
    job.part(model, "stream")
    job.change(model, "stream", stream)
    job.change(model, "config", replace(model.config, residual=stream.config))
