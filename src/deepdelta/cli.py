"""The command `deepdelta`: the only file that knows every room."""

import io
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

import torch
import tyro
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from tyro.conf import Positional, UseAppendAction, arg, subcommand

from deepdelta import interruption
from deepdelta.analysis.selfcheck import self_check
from deepdelta.data import DataConfig, load_corpus
from deepdelta.errors import UserError, check_utf8, nearest, printable
from deepdelta.files import read_object
from deepdelta.interop import import_published
from deepdelta.models import generate
from deepdelta.nn import use_backend
from deepdelta.nn.config import Rule
from deepdelta.studies.config import load_study, named_studies
from deepdelta.training import RunDirectory, TrainConfig, evaluate, load, train
from deepdelta.training.config import run_settings
from deepdelta.training.environment import choose_device, compiler_problem, machine, versions
from deepdelta.training.loop import corpus_facts
from deepdelta.training.progress import reporting, show


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a GPT into a run directory, or continue the run that is there."""

    run: Path
    """The run directory, made if absent; the same command continues it, with more --steps extends it."""
    config: Path | None = None
    """A TOML or JSON file with settings; options given beside it win."""
    preset: str | None = None
    """A named residual (additive, ddl, ...); options given beside it win."""
    init_from: Path | None = None
    """A run whose weights a new run starts from."""
    inexact_resume: bool = False
    """Continue although versions, machine, threads or device differ, so not bit for bit."""
    settings: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)
    """What is trained."""

    def __call__(self) -> None:
        train(self.settings, self.run, init_from=self.init_from, inexact_resume=self.inexact_resume)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Loss, perplexity and bits per byte of a run on its whole validation split."""

    run: Positional[Path]
    """A run directory."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    batch_size: int = 8
    """Windows per forward pass."""

    def __call__(self) -> None:
        directory = RunDirectory(self.run)
        config, environment = directory.config(), directory.environment()
        chosen = choose_device(self.device, "fp32")
        if environment["corpus_sha256"] is None:
            raise UserError(f"{self.run} was imported without a corpus; import it again with --source.")
        corpus = load_corpus(config.data, progress=lambda text: print(printable(text), file=sys.stderr))
        directory.check_environment(corpus_facts(corpus), exact=False)
        model = load(self.run).model.to(chosen.device)
        total = corpus.validation.shape[0]
        with reporting(f"Evaluating {self.run}", total) as reporter:
            result = evaluate(
                model,
                corpus,
                batch_size=self.batch_size,
                device=chosen.device,
                progress=lambda done, batches: reporter.update(done * total // batches, ""),
            )
        print(f"loss            {result.loss:.4f} nats per token")
        print(f"perplexity      {result.perplexity:.3f} per token")
        if corpus.validation_bytes is not None:
            print(f"bits per byte   {result.bits_per_byte(corpus.validation_bytes):.4f}")
        print(f"on {result.tokens:,} tokens, the whole validation split; contexts: {result.how}")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Stream text that a trained model continues a prompt with."""

    run: Positional[Path]
    """A run directory."""
    prompt: str
    tokens: int = 256
    """How many tokens to draw."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Draw among the k likeliest only."""
    seed: int = 0

    def __call__(self) -> None:
        model, tokenizer = load(self.run)
        if tokenizer is None:
            raise UserError(
                f"{self.run} was trained on bare token ids, so there is no text; "
                "train with --data.tokenizer FILE.json to have the tokenizer kept with the run."
            )
        use_backend(model)
        ids = generate(
            model,
            tokenizer.encode(self.prompt),
            tokens=self.tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
            vocab_size=tokenizer.vocab_size,
        )
        # A model may have learnt, or been made, to write what a terminal obeys; a file gets the text as it is.
        shown = printable if sys.stdout.isatty() else str
        print(shown(self.prompt), end="", flush=True)
        for piece in tokenizer.stream(ids):
            print(shown(piece), end="", flush=True)
        print()


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What the rewrites of a run do, sublayer by sublayer, and its loss without parts of them; JSON, tables, a page."""

    run: Positional[Path]
    """A run directory, trained or imported."""
    source: str | None = None
    """Another text than the run's: a file, a folder or a .bin file of ids, whose held-out part is read."""
    tokenizer: str | None = None
    """For the text of --source and a run that keeps no tokenizer: bytes, or the model's tokenizers JSON file."""
    tokens: int = 16384
    """How much held-out text is read: whole windows of the model's context, evenly spread."""
    sample: int = 64
    """Tokens that the spectrum of the composed shortcut is taken over."""
    batch_size: int = 8
    """Windows per forward pass."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    out: Path | None = None
    """Where audit.json, table.md and audit.html go; RUN/audit by default."""

    def __call__(self) -> None:
        # Here, since it needs the packages of the extra `study`, which the other commands do without.
        from deepdelta.analysis.audit_run import Text, audit_run
        from deepdelta.report.audit import print_audit, write_audit

        out = self.out or self.run / "audit"
        results = audit_run(
            self.run,
            Text(self.source, self.tokenizer),
            out,
            tokens=self.tokens,
            sample=self.sample,
            batch_size=self.batch_size,
            device=self.device,
            command=shlex.join(["deepdelta", *sys.argv[1:]]),
            say=lambda text: print(printable(text), file=sys.stderr),
        )
        write_audit(results, out)
        print_audit(results, Console())
        show(f"Numbers: {out / 'audit.json'}\nTables:  {out / 'table.md'}\nPage:    {out / 'audit.html'}")


@dataclass(frozen=True, kw_only=True)
class Import:
    """Make a run directory of a published checkpoint: a folder with config.json and its tensors."""

    folder: Positional[Path]
    """Holds config.json and model.safetensors or pytorch_model.bin."""
    run: Path
    """The run directory to make."""
    source: str | None = None
    """The corpus to evaluate on; without one, the run is for loading and for training with --init-from."""
    tokenizer: str = "bytes"
    """bytes, or the tokenizers JSON file of the model."""

    def __call__(self) -> None:
        data = None if self.source is None else DataConfig(source=self.source, tokenizer=self.tokenizer)
        model = import_published(self.folder, self.run, data)
        count = sum(parameter.numel() for parameter in model.parameters())
        show(f"{self.run} holds the published model: {count:,} parameters, {model.config.residual}")


@dataclass(frozen=True, kw_only=True)
class Study:
    """Run a comparison: rates tuned, conditions x seeds at matched budgets, statistics, tables and report; or a search,
    or fits over sizes, as its file says. Interrupted, the same command continues."""

    study: Positional[Annotated[str, arg(metavar="NAME|FILE.toml")]]
    """A named study, or a TOML file of your own."""
    out: Path | None = None
    """Where runs, cells, results.json and report.html go; runs/study-NAME by default. A run whose cell is there is not
    made again."""
    seeds: tuple[int, ...] | None = None
    """Other seeds than the study's."""
    steps: int | None = None
    """Another number of steps per run than the study's; the warm-up keeps its share."""
    source: str | None = None
    """Another corpus than the study's: a file, a folder or a .bin file."""
    workers: int | None = None
    """Runs side by side; one per core by default."""

    def __call__(self) -> None:
        # Here, since it needs the packages of the extra `study`, which the other commands do without.
        from deepdelta.studies.runner import run

        overrides: dict[str, Any] = {}
        if self.seeds is not None:
            overrides["seeds"] = list(self.seeds)
        if self.source is not None:
            overrides["train"] = {"data": {"source": self.source}}
        config = load_study(self.study, overrides)
        if self.seeds is not None and config.search is not None:
            raise UserError(f"{config.name} searches on the seeds of its rungs; leave --seeds out.")
        if self.steps is not None:
            config = config.lasting(self.steps)
        command = shlex.join(["deepdelta", *sys.argv[1:]])
        run(config, self.out or Path("runs") / f"study-{config.name}", workers=self.workers, command=command)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Run a task beyond text: every condition once per seed, paired comparisons, a table. Finished runs are kept."""

    name: Positional[str]
    """words, recall, digits, dynamics or tabular."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    set: Annotated[tuple[str, ...], UseAppendAction] = ()
    """A setting of all conditions as KEY=VALUE, any number of times: --set group=S3 --set residual.gate_init=0.5."""
    out: Path | None = None
    """Where cells, results.json and table.md go; runs/task-NAME by default, the settings of --set added to it."""
    workers: int | None = None
    """Runs side by side; one per core by default."""

    def __call__(self) -> None:
        # Here, since it needs the packages of the extra `study`, which the other commands do without.
        from deepdelta.tasks.runner import default_folder, run_task
        from deepdelta.tasks.task import read_overrides

        out = self.out or default_folder(self.name, self.set)
        command = shlex.join(["deepdelta", *sys.argv[1:]])
        overrides = read_overrides(self.set)
        run_task(self.name, self.seeds, out, overrides=overrides, workers=self.workers, command=command)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time a named suite: correctness first, then interleaved rounds; JSON, table and plot."""

    name: Positional[str] = "bar"
    """bar (the table of figures to reach), peers, growth, operator or gpu; gradients measures errors, no times."""
    out: Path | None = None
    """Where results.json, table.md, plot.svg and plot.html go; runs/bench-NAME by default."""
    rounds: int | None = None
    """Another number of interleaved rounds than the suite's."""
    threads: int | None = None
    """CPU threads; all cores by default."""
    quick: bool = False
    """Small sizes, five rounds, nothing compiled: to see that all of it runs. No measurement."""

    def __call__(self) -> None:
        # Here: importing what compares takes time that the other commands need not spend.
        from deepdelta.benchmarks import GRADIENTS, load_suite, run_gradients, run_suite
        from deepdelta.benchmarks.config import quick

        out = self.out or Path("runs") / f"bench-{self.name}"
        command = shlex.join(["deepdelta", *sys.argv[1:]])
        if self.name == GRADIENTS:
            if self.rounds is not None:
                raise UserError(f"{GRADIENTS} measures no times, so it has no rounds; leave --rounds out.")
            run_gradients(out, threads=self.threads, quick=self.quick, command=command)
            return
        suite = load_suite(self.name)
        run_suite(
            quick(suite) if self.quick else suite,
            out,
            rounds=self.rounds,
            threads=self.threads,
            quick=self.quick,
            command=command,
        )


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """What this machine can run, and whether it computes values and gradients of the rewrite rightly."""

    def __call__(self) -> None:
        for name, value in (versions() | machine()).items():
            print(f"{name:<10} {value}")
        chosen = choose_device("auto", "auto")
        print(f"device     {chosen.device} ({chosen.reason}), precision {chosen.precision}")
        print(f"compiler   {compiler_problem(chosen.device.type) or 'torch.compile has what it needs'}")
        table = Table("backend", "device", "dtype", "values", "gradients", "", title="errors against fp64")
        checks = list(self_check())
        for check in checks:
            errors = ("-" if e is None else f"{e:.1e}" for e in (check.value_error, check.gradient_error))
            table.add_row(check.backend, check.device, check.dtype, *errors, check.verdict)
        Console().print(table)
        if any(check.verdict == "WRONG" for check in checks):
            raise UserError("a backend computes wrong numbers here: use the backend 'reference', and please report it.")


COMMANDS = {
    "train": Train,
    "evaluate": Evaluate,
    "generate": Generate,
    "audit": Audit,
    "study": Study,
    "task": Task,
    "import": Import,
    "doctor": Doctor,
    "bench": Bench,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Exit code 0, or 2 for an error that is the user's to mend, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    interruption.imported()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal of ASCII shows what it can
    try:
        command = _at_home(_parse(given))
        command()
        print(end="", flush=True)
    except BrokenPipeError:
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError, SafetensorError, MemoryError, RuntimeError) as error:
        if (message := _in_one_line(error)) is None:
            raise
        Console(stderr=True, soft_wrap=True).print(f"error: {printable(message)}", markup=False, highlight=False)
        sys.exit(2)


def _in_one_line(error: Exception) -> str | None:
    """What the user is told of an error that is theirs to mend, or their machine's; None for one that is ours."""
    if isinstance(error, OSError):
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror or error}"
    # torch has a class for a GPU's memory alone.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        first = str(error).partition("\n")[0]
        return f"there is not enough memory: make the model or the batch smaller. {first}".strip()
    return None if isinstance(error, RuntimeError) else str(error)


def _parse(given: list[str]) -> Any:
    for word in given:
        check_utf8("every argument", word)
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        raise UserError(f"there is no command '{given[0]}'; {nearest(given[0], COMMANDS)}")
    defaults: dict[str, Any] = {}
    if given[:1] == ["train"]:
        defaults["train"] = Train(run=tyro.MISSING, settings=_settings(given))
    kinds = tuple(
        Annotated[kind, subcommand(name, default=defaults[name]) if name in defaults else subcommand(name)]
        for name, kind in COMMANDS.items()
    )
    description = f"Delta residuals, trained against their controls. Named studies: {', '.join(named_studies())}."
    commands: Any = Union[kinds]  # noqa: UP007
    parse = partial(tyro.cli, commands, prog="deepdelta", description=description, args=given)
    try:
        with redirect_stderr(io.StringIO()):
            return parse(console_outputs=False)
    except SystemExit as ended:
        # What a setting's own check says is behind the exit: tyro words it with names of its own.
        error: BaseException | None = ended
        while error is not None:
            if isinstance(error, UserError):
                raise error from None
            error = error.__context__
    return parse()  # once more, for the help or what tyro says of the options themselves


def _at_home(command: Any) -> Any:
    """The command, its paths with a leading ~ in the home directory: shells leave it alone in --run=~/runs."""
    return replace(command, **{name: _home(path) for name, path in vars(command).items() if isinstance(path, Path)})


def _home(path: Path) -> Path:
    return Path(os.path.expanduser(path))


def _value_of(option: str, given: list[str]) -> str | None:
    """The value of an option that decides the defaults of the others, so must be known before they are parsed."""
    for position, word in enumerate(given):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and position + 1 < len(given):
            return given[position + 1]
    return None


def _settings(given: list[str]) -> TrainConfig:
    """What the settings are before the options: those of --config, the residual that of --preset or of a typed rule."""
    file, preset, rule = (_value_of(option, given) for option in ("--config", "--preset", "--model.residual.rule"))
    typed = {"preset": preset, "rule": rule if rule in get_args(Rule) else None}
    residual = {name: value for name, value in typed.items() if value is not None}
    layer = {"model": {"residual": residual}} if residual else {}
    below = {} if file is None else read_object(_home(Path(file)), "mend it, or give another --config")
    return run_settings(below, layer, where=file or "")
