"""Texts to shards of ids that training maps: once for many runs, on all cores, going on where it was stopped."""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepdelta.data.config import DataConfig
from deepdelta.data.documents import QUIET, Document, Say
from deepdelta.data.formats import HEADER, MAGIC, check_text
from deepdelta.data.hub import ON_HUB
from deepdelta.data.packed import bytes_of, checked, holds_records, is_packed, records_of
from deepdelta.data.prepared import MANIFEST
from deepdelta.data.sets import TextSet, text_set
from deepdelta.data.sources import files_in
from deepdelta.data.tokenizer import CONFIG_NAME, FILE_NAME, BPETokenizer, Tokenizer, read_tokenizer
from deepdelta.errors import UserError
from deepdelta.files import FORMAT, AnyPath, atomic_path, check_format, locked, read_object, sha256_of, write_json

_AT_ONCE = 1 << 22  # characters that are encoded together, on all cores


class Recipe(NamedTuple):
    """A data set that others train on, with the tokenizer that they read it by."""

    about: str
    source: str
    tokenizer: str


RECIPES = {
    "fineweb-edu": Recipe(
        "the sample of 100 B tokens of FineWeb-Edu, by the BPE of GPT-2",
        f"{ON_HUB}datasets/HuggingFaceFW/fineweb-edu/sample-100BT:train",
        f"{ON_HUB}openai-community/gpt2",
    )
}


@dataclass(kw_only=True)
class _Split:
    """The shards of one split: what is written, and what comes next."""

    name: str
    dtype: str
    shards: list[dict[str, Any]] = field(default_factory=list)
    held: list[np.ndarray] = field(default_factory=list)
    tokens: int = 0

    @property
    def written(self) -> int:
        """Tokens in whole shards."""
        return sum(shard["tokens"] for shard in self.shards)

    def add(self, ids: list[int]) -> None:
        self.held.append(np.array(ids, self.dtype))
        self.tokens += len(ids)

    def flush(self, out: Path, header: bool) -> None:
        """Write a shard of what is held, if anything is."""
        if not self.tokens:
            return
        path = out / f"{self.name}_{len(self.shards):06d}.bin"
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            if header:
                numbers = np.zeros(HEADER // 4, "<i4")
                numbers[:3] = MAGIC[self.dtype], 1, self.tokens
                file.write(numbers.tobytes())
            for ids in self.held:
                file.write(ids.tobytes())
        self.shards.append({"name": path.name, "tokens": self.tokens, "sha256": sha256_of(path)})
        self.held, self.tokens = [], 0


def prepare(
    source: AnyPath,
    out: AnyPath,
    *,
    tokenizer: AnyPath | None = None,
    field: str = "text",
    pattern: str = "**/*",
    shard_tokens: int = 100_000_000,
    validation_fraction: float = 0.005,
    header: bool = True,
    progress: Say | None = None,
) -> dict[str, int]:
    """Write the documents of a file, a folder or a data set as shards `train_000000.bin`, `val_000000.bin` and so on,
    and `tokenizer.json`, to the folder `out`, which `DataConfig.source` takes.

    Every document begins with the separator. Which split it is in depends on its file's name and its number there
    alone; a data set that has a split validation of its own keeps its splits. A shard ends with a document, when it
    holds `shard_tokens` or more. Ids are uint16, or uint32 for more than 65,536 of them; the header is that of llm.c.
    Stopped, the same call goes on after the last whole shard, with the same result.

    Args:
        source: text files, compressed ones, records, tables and data sets, as `DataConfig.source` takes them; or a name
            in `RECIPES`.
        tokenizer: a file, a folder or a name on the hub, as `read_tokenizer` takes them; None: the recipe's.
        progress: called with a line of text after each shard, and every two seconds.

    Returns:
        Tokens by split.

    Raises:
        UserError: no documents, one that is no text, or none for a split; `out` holds something else, or what other
            settings or sources wrote.
    """
    say, out = progress or (lambda _: None), Path(out)
    if (recipe := RECIPES.get(str(source))) is not None:
        source, tokenizer = recipe.source, tokenizer or recipe.tokenizer
    if tokenizer is None:
        raise UserError(f"prepare needs a tokenizer, or one of the sources that say theirs: {', '.join(RECIPES)}.")
    source = source if str(source).startswith(ON_HUB) else os.path.expanduser(source)
    DataConfig(source=str(source), pattern=pattern, field=field, validation_fraction=validation_fraction)
    if shard_tokens < 1:
        raise UserError(f"shard_tokens must be at least 1, got {shard_tokens}.")
    encoder, found = read_tokenizer(os.path.expanduser(tokenizer)), text_set(str(source))
    texts: TextSet | list[Document] = found or files_in(Path(source), pattern)
    settings: dict[str, Any] = {
        "files": _files(texts),
        "tokenizer": encoder.sha256,
        "field": field,
        "shard_tokens": shard_tokens,
        "validation_fraction": validation_fraction,
        "header": header,
    }
    with locked(out):
        kept = _begun(out, settings)
        dtype = "<u2" if encoder.vocab_size <= 1 << 16 else "<u4"
        train, val = (_Split(name=name, dtype=dtype, shards=kept[name]) for name in ("train", "val"))
        if not kept["finished"]:
            done = int(kept["documents"])

            def write(documents: int, finished: bool = False) -> None:
                shards = {"train": train.shards, "val": val.shards}
                about = {"format": FORMAT, "settings": settings, "documents": documents, "finished": finished}
                write_json(out / MANIFEST, about | shards)

            def commit(documents: int) -> None:
                for split in (train, val):
                    split.flush(out, header)
                write(documents)

            begun, said = False, time.monotonic()
            for number, held_out, ids in _encoded(_texts(texts, field, done, validation_fraction), encoder):
                (val if held_out else train).add([encoder.separator, *ids])
                if not begun:
                    # What is written from here on is known to be of these settings, under which a document was read.
                    encoder.save(out)
                    write(done)
                    begun = True
                done = number + 1
                if whole := max(train.tokens, val.tokens) >= shard_tokens:
                    commit(done)
                if whole or time.monotonic() - said >= QUIET:
                    tokens = train.written + train.tokens + val.written + val.tokens
                    say(f"{done:,} documents, {tokens:,} tokens.")
                    said = time.monotonic()
            commit(done)
            sums = {split.name: split.written for split in (train, val)}
            if empty := [name for name, tokens in sums.items() if not tokens]:
                _clear(out, (*train.shards, *val.shards))
                raise UserError(
                    f"with validation_fraction={validation_fraction} no document of {source} fell to {empty[0]}; "
                    "choose another fraction, or give more documents. Nothing was kept."
                )
            write(done, finished=True)
    return {split.name: split.written for split in (train, val)}


def _clear(out: Path, shards: Iterable[dict[str, Any]]) -> None:
    """Delete what was written, which no run could train on."""
    for name in (MANIFEST, FILE_NAME, CONFIG_NAME, *(shard["name"] for shard in shards)):
        (out / name).unlink(missing_ok=True)


def _begun(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What is there already of these settings."""
    file = out / MANIFEST
    if not file.exists():
        if held := [name for name in sorted(os.listdir(out)) if name.endswith(".bin")]:
            raise UserError(f"{out} must be a folder for prepared text alone, and holds {held[0]}; choose another.")
        return {"documents": 0, "finished": False, "train": [], "val": []}
    kept = read_object(file, "choose another folder, or delete this one")
    check_format(kept, file)
    if other := sorted(name for name, value in settings.items() if kept["settings"].get(name) != value):
        raise UserError(f"{out} was begun with other {', '.join(other)}; give those again, or choose another folder.")
    for shard in (*kept["train"], *kept["val"]):
        if not (path := out / shard["name"]).exists() or sha256_of(path) != shard["sha256"]:
            raise UserError(f"{path} is damaged or gone; delete the folder and prepare anew.")
    return kept


def _files(texts: TextSet | list[Document]) -> list[list[Any]]:
    """What tells these sources from others."""
    if isinstance(texts, list):
        return [[one.name, one.size] for one in texts]
    files = [[file.name, file.stat().st_size] for split in texts.splits for file in split.files()]
    return files or [[str(split.place), 0] for split in texts.splits]


def _encoded(texts: Iterator[tuple[int, bool, str]], encoder: Tokenizer) -> Iterator[tuple[int, bool, list[int]]]:
    """Number of the documents, whether they are held out, and ids."""
    waiting: list[tuple[int, bool, str]] = []
    size = 0
    for number, held_out, text in texts:
        if not text:
            continue
        waiting.append((number, held_out, text))
        size += len(text)
        if size >= _AT_ONCE:
            yield from _encode(waiting, encoder)
            waiting, size = [], 0
    yield from _encode(waiting, encoder)


def _encode(waiting: list[tuple[int, bool, str]], encoder: Tokenizer) -> Iterator[tuple[int, bool, list[int]]]:
    texts = [text for _, _, text in waiting]
    several = encoder.encode_all(texts) if isinstance(encoder, BPETokenizer) else map(encoder.encode, texts)
    for (number, held_out, _), ids in zip(waiting, several, strict=True):
        yield number, held_out, ids


def _texts(
    sources: TextSet | list[Document], field: str, skip: int, fraction: float
) -> Iterator[tuple[int, bool, str]]:
    """Number of the documents from number `skip` on, whether they are held out, and text; a split validation first."""
    if isinstance(sources, list):
        for number, (name, text) in enumerate(_texts_of_files(sources, field)):
            if number >= skip:
                yield number, _share(name) < fraction, text
        return
    first, own = 0, False
    if sources.validation is not None:  # from its beginning: how long it is says where the training part begins
        for number, text in _texts_of_set(sources.validation, field, 0):
            first, own = number + 1, own or text != ""
            if number >= skip:
                yield number, True, text
    for number, text in _texts_of_set(sources, field, max(skip - first, 0)):
        yield first + number, not own and _share(f"{sources.name}:{number}") < fraction, text


def _texts_of_set(rows: TextSet, field: str, skip: int) -> Iterator[tuple[int, str]]:
    for number, found in rows.texts(field, skip):
        for part in checked(iter([(f"row {number:,}", found)]), str(rows.place), field):
            yield number, part.decode()


def _texts_of_files(files: list[Document], field: str) -> Iterator[tuple[str, str]]:
    for one in files:
        if is_packed(one.path) and holds_records(one.path):
            parts: Iterator[bytes] = records_of(one.path, field)
        else:
            if not is_packed(one.path):
                check_text(one)
            parts = iter([b"".join(bytes_of(one.path))])
        for number, part in enumerate(parts):
            try:
                yield f"{one.name}:{number}", part.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{one.path} must be UTF-8; byte {error.start:,} of document {number:,} in it is not. Convert the "
                    "file, or leave it out by the pattern."
                ) from None


def _share(name: str) -> float:
    """A number in [0, 1) that is the document's own."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64
