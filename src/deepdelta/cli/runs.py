"""The commands about one run: train, evaluate, generate, audit, import."""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from deepdelta.cli.shared import following, to_read, use_threads
from deepdelta.data import DataConfig, load_corpus, load_tokenizer
from deepdelta.decoding import generate
from deepdelta.device import choose_device
from deepdelta.errors import UserError, printable
from deepdelta.files import locked
from deepdelta.progress import reporting, show
from deepdelta.training import RunDirectory, TrainConfig, evaluate, import_published, load, train
from deepdelta.training.checkpoints import CHECKPOINT
from deepdelta.training.loop import corpus_facts
from deepdelta.training.ranks import TIMEOUT, starts_first
from deepdelta.training.tracking import tracking


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a GPT into a run directory, or continue the run that is there."""

    run: Positional[Path]
    """The run directory, made if absent; the same command continues it, with more --steps extends it."""
    recipe: str | None = None
    """Settings of a whole run by name, small or medium as the authors have them, large, xl, 3b, 7b; what is given by
    file or option beside it wins."""
    config: Path | None = None
    """A TOML or JSON file with settings; options given beside it win."""
    preset: str | None = None
    """A named residual, as docs/settings.md lists them: additive, ddl, ...; options given beside it win."""
    init_from: Path | None = None
    """A run whose weights a new run starts from."""
    inexact_resume: bool = False
    """Continue although versions, machine, threads or device differ, so not bit for bit."""
    timeout: float = TIMEOUT
    """Seconds that the processes which torchrun has started wait for each other."""
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also write what metrics.jsonl gets for these, in the run directory; Weights & Biases offline."""
    settings: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)
    """What is trained."""

    def __call__(self) -> None:
        first = starts_first()
        with tracking(self.track if first else (), self.run, self.settings) as on_row:
            trained = train(
                self.settings,
                self.run,
                init_from=self.init_from,
                inexact_resume=self.inexact_resume,
                timeout=self.timeout,
                on_row=on_row,
            )
        if trained.finished and first:
            following(*_uses(self.run))


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Loss, perplexity and bits per byte of a run on its validation split; or with --tasks, how it does in tasks of
    lm-eval."""

    run: Positional[Path]
    """A run directory."""
    tasks: tuple[str, ...] | None = None
    """Tasks by name: arc_easy, arc_challenge, hellaswag, piqa, winogrande, openbookqa, sciq, boolq, any other of
    lm-eval's, and those whose data ship: deepdelta_words, deepdelta_python, deepdelta_repeat, deepdelta_prose."""
    shots: int = 0
    """Of --tasks: worked examples before each question."""
    limit: int | None = None
    """Of --tasks: the first so many questions of each alone."""
    task_data: Path | None = None
    """Of --tasks: a folder with copies of data set repositories, each under its name on the Hugging Face hub."""
    tokens: int | None = None
    """Evaluate on about so many tokens, in whole windows evenly spread over the split; all of it by default."""
    repeats: int | None = None
    """Of a looped GPT: repeat its layers so often; as often as in training (model.repeats) by default."""
    checkpoint: str = CHECKPOINT
    """Which of the run's: best.safetensors where keep_best was set."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    batch_size: int = 8
    """Windows per forward pass."""
    threads: int | None = None
    """CPU threads; as many as the run was trained with by default."""

    def __call__(self) -> None:
        given = [name for name in ("shots", "limit", "task_data") if getattr(self, name)]
        if self.tasks == ():
            raise UserError("--tasks needs the name of at least one task; name some, or leave it out for the loss.")
        if given and not self.tasks:
            raise UserError(f"--{given[0].replace('_', '-')} belongs to --tasks; name some, or leave it out.")
        if self.tasks:
            self._tasks(self.tasks)
        else:
            self._loss()

    def _tasks(self, tasks: tuple[str, ...]) -> None:
        # Here, since it needs the packages of the extra `eval`, which the other commands do without.
        from deepdelta.harness import evaluate_tasks, table
        from deepdelta.harness.results import FILE_NAME, FOLDER

        if self.tokens is not None:
            raise UserError("--tokens belongs to the loss, and --tasks have a --limit.")
        if self.repeats is not None:
            raise UserError("--repeats belongs to the loss; --tasks repeat the layers as often as in training.")
        use_threads(self.threads, self.run)
        results = evaluate_tasks(
            self.run,
            tasks,
            checkpoint=self.checkpoint,
            shots=self.shots,
            limit=self.limit,
            data=self.task_data,
            batch_size=self.batch_size,
            device=self.device,
        )
        Console().print(table(results))
        show(f"Numbers: {self.run / FOLDER / FILE_NAME}")

    def _loss(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise UserError(f"tokens must be at least 1, got {self.tokens}.")
        directory = RunDirectory(self.run)
        config, environment = directory.config(), directory.environment()
        use_threads(self.threads, self.run)
        chosen = choose_device(self.device, "fp32")
        if environment["corpus_sha256"] is None:
            raise UserError(f"{self.run} was imported without a corpus; import it again with --source.")
        corpus = load_corpus(config.data, progress=lambda text: print(printable(text), file=sys.stderr))
        directory.check_environment(corpus_facts(corpus), exact=False)
        model = directory.model(self.checkpoint).eval().to(chosen.device)
        total = corpus.validation.shape[0]
        with reporting(f"Evaluating {self.run}", total) as reporter:
            result = evaluate(
                model,
                corpus,
                batch_size=self.batch_size,
                repeats=self.repeats,
                device=chosen.device,
                tokens=self.tokens,
                progress=lambda done, batches: reporter.update(done * total // batches, ""),
            )
        print(f"loss            {result.loss:.4f} nats per token")
        print(f"perplexity      {result.perplexity:.3f} per token")
        whole = result.tokens == total - 1
        if corpus.validation_bytes is not None:
            read = corpus.validation_bytes if whole else round(corpus.validation_bytes * result.tokens / total)
            note = "" if whole else ", for as many bytes per token as the whole split has"
            print(f"bits per byte   {result.bits_per_byte(read):.4f}{note}")
        again = "" if self.repeats is None else f"; the layers repeated {self.repeats} times"
        part = "the whole validation split" if whole else f"of the {total:,} of the validation split"
        print(f"on {result.tokens:,} tokens, {part}; contexts: {result.how}{again}")
        following(("deepdelta", "audit", self.run))


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
    top_p: float = 1.0
    """Draw among the likeliest only that have together at least this probability."""
    seed: int = 0
    checkpoint: str = CHECKPOINT
    """Which of the run's: best.safetensors where keep_best was set."""
    threads: int | None = None
    """CPU threads; as many as the run was trained with by default."""

    def __call__(self) -> None:
        model, tokenizer = load(self.run, self.checkpoint)
        if tokenizer is None:
            imported = "imported_from" in RunDirectory(self.run).environment()
            raise UserError(
                f"{self.run} was imported without a text, so it keeps no tokenizer; import the model again, into "
                "another run directory, with --source TEXT --tokenizer FILE.json."
                if imported
                else f"{self.run} was trained on bare token ids, so there is no text; train with --data.tokenizer "
                "FILE.json to have the tokenizer kept with the run."
            )
        use_threads(self.threads, self.run)
        ids = generate(
            model,
            tokenizer.encode(self.prompt),
            tokens=self.tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
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
    checkpoint: str = CHECKPOINT
    """Which of the run's: best.safetensors where keep_best was set."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    out: Path | None = None
    """Where audit.json, table.md and audit.html with its script go; RUN/audit by default."""
    threads: int | None = None
    """CPU threads; as many as the run was trained with by default."""
    self_contained: bool = False
    """The page holds the script that draws its pictures (5 MB), instead of plotly.min.js beside it."""

    def __call__(self) -> None:
        # Here, since it needs the packages of the extra `lab`, which the other commands do without.
        from deepdelta.lab.audit.audit_run import Text, audit_run
        from deepdelta.lab.views.audit import print_audit, write_audit

        out = self.out or self.run / "audit"
        use_threads(self.threads, self.run)
        with locked(out):
            results = audit_run(
                self.run,
                Text(self.source, self.tokenizer),
                out,
                tokens=self.tokens,
                sample=self.sample,
                batch_size=self.batch_size,
                checkpoint=self.checkpoint,
                device=self.device,
                command=shlex.join(["deepdelta", *sys.argv[1:]]),
                say=lambda text: print(printable(text), file=sys.stderr),
            )
            write_audit(results, out, self_contained=self.self_contained)
        print_audit(results, Console())
        show(f"Numbers: {out / 'audit.json'}\nTables:  {out / 'table.md'}")
        to_read(out / "audit.html")


@dataclass(frozen=True, kw_only=True)
class Import:
    """Make a run directory of a published checkpoint: a folder with config.json and its tensors."""

    folder: Positional[Path]
    """Holds config.json and model.safetensors or pytorch_model.bin."""
    run: Path
    """The run directory to make."""
    source: str | None = None
    """The corpus to evaluate on; without one, the run is for loading and for training with --init-from."""
    tokenizer: str | None = None
    """For the text of --source: the tokenizers JSON file of the model; bytes by default."""

    def __call__(self) -> None:
        if self.tokenizer is not None and self.source is None:
            raise UserError("--tokenizer belongs to the text of --source; give that too, or leave it out.")
        data = None if self.source is None else DataConfig(source=self.source, tokenizer=self.tokenizer or "bytes")
        model = import_published(self.folder, self.run, data)
        count = sum(parameter.numel() for parameter in model.parameters())
        show(f"{self.run} holds the published model: {count:,} parameters, {model.config.residual}")
        if data is not None:
            following(*_uses(self.run))
        else:
            onward = ("--config", self.run / "config.json", "--init-from", self.run, "--data.source", "TEXT")
            following(("deepdelta", "train", "NEW", *onward))


def _uses(run: Path) -> list[tuple[str | Path, ...]]:
    """What a run that holds a model and its corpus is for."""
    writes = load_tokenizer(run) is not None and RunDirectory(run).config().model.rival is None
    text = [("deepdelta", "generate", run, "--prompt", "TEXT")] if writes else []
    return [*text, ("deepdelta", "evaluate", run)]
