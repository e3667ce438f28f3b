"""The page on which one token's state goes through the depth of a model, or of two beside each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from deepdelta.errors import UserError, printable
from deepdelta.explorer.page import assemble
from deepdelta.explorer.trace import Coding, trace
from deepdelta.files import FORMAT, AnyPath, write_json, write_text
from deepdelta.training import RunDirectory, load
from deepdelta.version import __version__


def explore(
    model: nn.Module | Mapping[str, nn.Module], tokenizer: Coding, prompt: str, out: AnyPath = "explore.html"
) -> Path:
    """Write a page that follows the tokens of `prompt` through the rewrites of a model, and its numbers as JSON.

    Args:
        model: any model from ids to logits that holds the residuals of one `DeltaStream`; or several by name, shown
            beside each other.
        tokenizer: has `encode` and `decode`, as ours and those of the library transformers have.
        prompt: the text.
        out: the page, self-contained; the JSON file has its name but for the ending.

    Returns:
        The path of the page.

    Raises:
        UserError: see `trace`; also models that are not of one vocabulary, or no place to write.
    """
    models = {"model": model} if isinstance(model, nn.Module) else model
    return _write(
        prompt,
        [{"name": name, "what": type(one).__name__, **trace(one, tokenizer, prompt)} for name, one in models.items()],
        Path(out),
    )


def explore_runs(runs: Sequence[Path], prompt: str, out: Path) -> Path:
    """`explore` for run directories, whose tokenizers must make the same ids of the prompt."""
    traces = []
    for run in runs:
        model, tokenizer = load(run)
        if tokenizer is None:
            raise UserError(
                f"{run} keeps no tokenizer, so no text can be followed: import the model with --source TEXT "
                "--tokenizer FILE.json, train with --data.tokenizer FILE.json, or give deepdelta.explore a tokenizer "
                "beside the model."
            )
        config = RunDirectory(run).config().model
        rule, channels = config.residual.rule, config.residual.value_channels
        what = f"rule {rule}, V = {channels}, {config.stack}, width {config.dim}"
        traces.append({"name": str(run), "what": what, **trace(model, tokenizer, prompt)})
    return _write(prompt, traces, out)


def _write(prompt: str, traces: list[dict[str, Any]], out: Path) -> Path:
    if any(one["ids"] != traces[0]["ids"] for one in traces):
        raise UserError("models side by side must read the prompt as the same token ids: give two of one tokenizer.")
    data = {"version": __version__, "prompt": prompt, "runs": traces}
    page = assemble(
        "One token through depth", "token.html", _printable(data), ("common.js", "token_plots.js", "token.js")
    )
    write_json(out.with_suffix(".json"), {"format": FORMAT, **data})
    write_text(out, page)
    return out


def _printable(data: Any) -> Any:
    """The data with every text, keys aside, as it can be shown."""
    if isinstance(data, dict):
        return {key: _printable(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_printable(value) for value in data]
    return printable(data) if isinstance(data, str) else data
