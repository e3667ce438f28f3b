"""What text a run reads, how it becomes ids and how much of it is held out."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from deepdelta.config import Settings
from deepdelta.errors import UserError, check_utf8

MOST_MERGED = 1 << 20
"""The most ids that a BPE may be trained to."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """The corpus of a run.

    Attributes:
        source: "stdlib", the source code of the running interpreter's standard library; or the path to a text file, to
            a folder of text files, to a `.bin` file of ids (bare, as nanoGPT writes them, or behind the header of
            llm.c), or to a folder holding train.bin and val.bin or shards called so. (A folder that is itself called
            stdlib is written ./stdlib.) Text may be compressed (`.gz`, `.zst`) and may stand in records, a document
            each: `.jsonl`, `.ndjson`, `.parquet`, a folder that `datasets` saved, or
            hf://datasets/OWNER/NAME[@REVISION][/CONFIGURATION][:SPLIT[[:DOCUMENTS]]], streamed once from the Hugging
            Face hub to the cache. Of these the split train is read and the split validation, where there is one, held
            out as it is; of one that is named (by its own folder, or SPLIT) a part is held out. What else is no text is
            refused by name, also within a folder.
        field: the field of JSON records, the column of a Parquet table or of a data set, that holds the text.
        pattern: which files of a folder are documents, as a shell's glob relative to it; `**` spans folders. As in a
            shell, names that begin with a dot are left out unless the pattern spells the dot.
        tokenizer: "bytes", 256 ids; "bpe", a byte-level BPE trained on the training split; the path to a `tokenizers`
            JSON file, or to a folder with one or with other files of a tokenizer of transformers; or hf://OWNER/NAME,
            one of the Hugging Face hub. A `.bin` source holds ids already: "bytes" then means "no tokenizer is known",
            a path names the one that wrote them.
        bpe_vocab_size: the most ids that "bpe" may have: 256 bytes, the separator, and merges.
        bin_dtype: of ids in `.bin` files without a header, which would say it.
        bin_vocab_size: the number of ids of a `.bin` source without tokenizer; the default is GPT-2's 50,257, padded.
        validation_fraction: the share of the bytes (of the ids in a `.bin` file) held out for validation. Without
            effect on a folder that holds train.bin and val.bin, and on a data set with a split validation.
        windows: "joined", training windows run over the ends of documents; "documents", each counts only up to the end
            of the document that it begins in, so that no token is learned with another document before it.
        held_out: "validation", the validation part; or "train_tail", the last tenth of the training part, which is then
            not trained on, for choices that the validation part must not know of.
        mixture: sources and weights, for training on several: each window is one of a source drawn by them. `source` is
            validated on, and trained on where it is among them. Empty: `source` alone.
    """

    source: str = "stdlib"
    pattern: str = "**/*"
    field: str = "text"
    tokenizer: str = "bytes"
    bpe_vocab_size: Annotated[int, Ge(257), Le(MOST_MERGED), "the 256 bytes and a separator"] = 4096
    bin_dtype: Literal["uint16", "uint32"] = "uint16"
    bin_vocab_size: int = 50304
    validation_fraction: float = 0.1
    windows: Literal["joined", "documents"] = "joined"
    held_out: Literal["validation", "train_tail"] = "validation"
    mixture: tuple[tuple[str, Annotated[float, Gt(0)]], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        named = [(name, getattr(self, name)) for name in ("source", "pattern", "field", "tokenizer")]
        for name, value in (*named, *(("a source of the mixture", one) for one, _ in self.mixture)):
            if not value:
                raise UserError(f"{name} must not be empty.")
            check_utf8(name, value)
        if len(dict(self.mixture)) < len(self.mixture):
            raise UserError("the sources of a mixture must be different ones: add up the weights of one named twice.")
        if PurePath(self.pattern).is_absolute() or ".." in PurePath(self.pattern).parts:
            raise UserError(f"pattern must stay inside the folder that source names, got '{self.pattern}'.")
        most = 1 << (16 if self.bin_dtype == "uint16" else 31)
        if not 2 <= self.bin_vocab_size <= most:
            raise UserError(
                f"bin_vocab_size must lie in 2 to {most} (ids are {self.bin_dtype}, as bin_dtype says), got "
                f"{self.bin_vocab_size}."
            )
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}.")
