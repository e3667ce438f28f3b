"""The command explore."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from deepdelta.cli.shared import to_read, use_threads
from deepdelta.errors import UserError
from deepdelta.explorer import explore_runs, operator_page
from deepdelta.files import write_text


@dataclass(frozen=True, kw_only=True)
class Explore:
    """A page to look at: the operator I - beta k k^T moved by hand; or, of a RUN, what its rewrites do to the state of
    each token of a prompt."""

    run: Positional[Annotated[Path | None, arg(metavar="RUN")]] = None
    """A run directory, trained or imported; without one, the operator."""
    prompt: str | None = None
    """The text whose tokens are followed through the run's depth."""
    beside: Annotated[Path | None, arg(name="with")] = None
    """Another run, shown beside the first on the same prompt."""
    out: Path | None = None
    """The page, an HTML file that needs no other; runs/operator.html or RUN/explore.html by default. The numbers of a
    run are written beside it as JSON."""
    threads: int | None = None
    """CPU threads; as many as the run was trained with by default."""

    def __call__(self) -> None:
        if self.run is None:
            if self.prompt is not None or self.beside is not None:
                raise UserError("--prompt and --with belong to a run: name its directory first, or leave them out.")
            out = self.out or Path("runs") / "operator.html"
            write_text(out, operator_page())
        else:
            if self.prompt is None:
                raise UserError("a run is explored on a text: give --prompt TEXT.")
            use_threads(self.threads, self.run)
            out = self.out or self.run / "explore.html"
            explore_runs([self.run, *([] if self.beside is None else [self.beside])], self.prompt, out)
        to_read(out)
