"""The command prepare."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from deepdelta.cli.shared import following
from deepdelta.data.prepare import prepare
from deepdelta.data.tokenizer import read_tokenizer
from deepdelta.errors import printable
from deepdelta.progress import show


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Write texts as shards of ids, which runs then map: once for many runs, on all cores; the same command goes on
    where it was stopped."""

    source: Positional[str]
    """A text file or a folder; compressed files, JSON lines, Parquet tables and data sets that datasets saved too, a
    document a record; hf://datasets/OWNER/NAME/CONFIGURATION:SPLIT, streamed from the Hugging Face hub; or fineweb-edu,
    a recipe: its sample of 100 B tokens by GPT-2's tokenizer."""
    out: Path
    """The folder of the shards, made if absent."""
    tokenizer: str | None = None
    """A JSON file of the tokenizers library, a folder with one or with other files of a tokenizer of transformers, or
    hf://OWNER/NAME on the Hugging Face hub; a recipe's own by default."""
    field: str = "text"
    """The field of JSON records, the column of a Parquet table, that holds the text."""
    pattern: str = "**/*"
    """Which files of a folder are documents."""
    shard_tokens: int = 100_000_000
    """A shard ends with the document with which it holds so many."""
    validation_fraction: float = 0.005
    """The share of the documents that is held out."""
    header: bool = True
    """Begin each shard with the header of llm.c; without it shards are bare, as nanoGPT has them."""

    def __call__(self) -> None:
        options = {name: value for name, value in vars(self).items() if name not in ("source", "out")}
        sums = prepare(
            self.source, self.out, progress=lambda line: print(printable(line), file=sys.stderr, flush=True), **options
        )
        show(f"{sums['train']:,} training and {sums['val']:,} validation tokens in {self.out}")
        tokenizer = ("--data.tokenizer", self.out / "tokenizer.json")
        # A header says how wide ids are; without one, two bytes are taken.
        wide = not self.header and read_tokenizer(self.out).vocab_size > 1 << 16
        width = ("--data.bin-dtype", "uint32") if wide else ()
        following(("deepdelta", "train", "runs/new", "--data.source", self.out, *tokenizer, *width))
