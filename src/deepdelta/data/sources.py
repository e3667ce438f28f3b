"""From the configuration's source to documents, and from documents to the two splits."""

import glob
import hashlib
import os
import platform
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Literal

import numpy as np

from deepdelta.data.config import DataConfig
from deepdelta.data.documents import Document, FileState, reading
from deepdelta.data.formats import check_text, ids_in
from deepdelta.data.hub import ON_HUB
from deepdelta.data.packed import holds_records, is_packed, unpacked, unpacked_set
from deepdelta.data.sets import TextSet, text_set
from deepdelta.errors import UserError

# Near-duplicates, generated files and tests, wherever they lie; then what is no part of the library.
_LEFT_OUT = {"encodings", "pydoc_data", "idlelib", "lib2to3", "test", "tests", "idle_test"}
_LEFT_OUT |= {"site-packages", "dist-packages", "lib-dynload", "_bundled", "__pycache__"}
_LEFT_OUT |= {"sitecustomize.py", "usercustomize.py"}
_SHARD = re.compile(r"(?:.*[_-])?(train|val)[_-]\d+\.bin")
_LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The documents that a source holds.

    Attributes:
        title: the source in plain English.
        split_by: "module" and "document" leave the split to `split_by_group`; with "position", "file" and "source" the
            group of a document is its split, "train" or "validation".
        dtype: of the ids that the documents are, as numpy writes it; None where they are text.
        origins: files that the documents were unpacked from.
    """

    title: str
    documents: Sequence[Document]
    split_by: Literal["module", "document", "position", "file", "source"]
    dtype: str | None = None
    origins: tuple[FileState, ...] = ()

    @property
    def ids(self) -> bool:
        """Whether the documents are ids, not text."""
        return self.dtype is not None


def list_source(config: DataConfig, cache: Path | None = None) -> Listing:
    """The documents of `config.source`; packed ones are unpacked to the cache, `default_cache()` if None.

    Raises:
        UserError: it is missing, empty, unreadable or no text, or a `.bin` file is no row of ids.
    """
    if config.source == "stdlib":
        return _list_stdlib()
    path = Path(os.path.expanduser(config.source))
    with reading(path):
        texts = text_set(config.source if config.source.startswith(ON_HUB) else str(path))
    if texts is not None:
        return _list_set(texts, config.field, cache)
    with reading(path):
        if not path.exists() and not path.is_symlink():
            raise UserError(
                f"source must be 'stdlib' or the path of a file or folder; there is nothing at '{config.source}'."
            )
        held = sorted(os.listdir(path)) if path.is_dir() else None
    if held is not None:
        shards = _shards(path, held)
        return _list_token_files(path, shards, config.bin_dtype) if shards else _list_folder(path, config, cache)
    if is_packed(path) and holds_records(path):
        documents = unpacked(path, path.name, config.field, cache)
        if not documents:
            raise UserError(f"{path} must hold at least one record whose '{config.field}' is not empty; it holds none.")
        title, origins = f"the records of {path}", (FileState.now(path),)
        return Listing(title=title, documents=documents, split_by="document", origins=origins)
    return _list_file(path, config, cache)


def _list_set(texts: TextSet, field: str, cache: Path | None) -> Listing:
    splits = [unpacked_set(split, field, cache) for split in texts.splits]
    documents = splits[0][0]
    if not documents:
        raise UserError(f"{texts.place} must hold a row whose '{field}' is not empty; it holds none.")
    own = [replace(document, group="validation") for part, _ in splits[1:] for document in part]
    if own:
        documents = [*(replace(document, group="train") for document in documents), *own]
    return Listing(
        title=f"the data set {texts.name}",
        documents=documents,
        split_by="source" if own else "document",
        origins=tuple(file for _, files in splits for file in files),
    )


def _shards(folder: Path, held: list[str]) -> dict[str, list[str]]:
    """The token files in a folder by split: train.bin and val.bin, or shards that are called so; or none."""
    if pair := [name for name in ("train.bin", "val.bin") if name in held]:
        if len(pair) == 1:
            raise UserError(
                f"a folder with token files must hold train.bin and val.bin; {folder} holds {pair[0]} only."
            )
        return {"train": ["train.bin"], "validation": ["val.bin"]}
    found: dict[str, list[str]] = {"train": [], "validation": []}
    for name in held:
        if match := _SHARD.fullmatch(name):
            found["train" if match[1] == "train" else "validation"].append(name)
    if any(found.values()) and not all(found.values()):
        there, missing = ("training", "val_") if found["train"] else ("validation", "train_")
        raise UserError(
            f"a folder with shards of token files must hold both splits; {folder} holds {there} shards only, and none "
            f"called {missing}....bin."
        )
    return found if found["train"] else {}


def split_by_group(
    documents: Sequence[Document], fraction: float, listing: Listing
) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, whole groups held out until about `fraction` of the bytes are.

    The groups are walked in the order of the SHA-256 of their names, an order that has nothing to do with what they
    hold and is the same everywhere. A group goes to validation if that brings the held-out bytes nearer to
    `fraction` of all; a group too large for what is missing stays in training and the walk goes on. With the library
    of CPython 3.11 to 3.13, about 190 groups, this ends within 1 percentage point of the fraction.

    Raises:
        UserError: no group can be held out, or none is left for training.
    """
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.group] += document.size
    wanted = fraction * sizes.total()
    taken = 0
    held: set[str] = set()
    for name in sorted(sizes, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()):
        if abs(taken + sizes[name] - wanted) < abs(taken - wanted):
            held.add(name)
            taken += sizes[name]
    if not held or len(held) == len(sizes):
        raise UserError(
            f"{listing.title}: holding out about {fraction:.0%} of the bytes by whole {listing.split_by}s would leave "
            f"the {'training' if held else 'validation'} split empty, with {len(sizes):,} of them. Add documents, "
            "change validation_fraction, or join them to one file, which is split by position."
        )
    return [d for d in documents if d.group not in held], [d for d in documents if d.group in held]


def _list_stdlib() -> Listing:
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if any(part in _LEFT_OUT or part.startswith(_LEFT_OUT_PREFIXES) for part in name.parts):
            continue
        if document := _whole_file(path, name.as_posix(), group=name.parts[0].removesuffix(".py")):
            documents.append(document)
    if not documents:
        raise UserError(
            f"the source code of Python's standard library must lie at {root}, and it does not (it may be zipped or "
            "stripped in this installation): set source to a text file or folder of your own."
        )
    title = f"the source code of the {platform.python_implementation()} {platform.python_version()} standard library"
    return Listing(title=title, documents=documents, split_by="module")


def files_in(path: Path, pattern: str) -> list[Document]:
    """A file, or those of a folder that match, each whole and not empty, in the order of their names.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    with reading(path):
        if not path.exists() and not path.is_symlink():
            raise UserError(f"source must be the path of a file or folder; there is nothing at '{path}'.")
    names, folder = [path.name], path.parent
    if path.is_dir():
        folder = path
        _check_folders(folder, PurePath(pattern).parts)
        names = [Path(name).as_posix() for name in sorted(set(glob.iglob(pattern, root_dir=folder, recursive=True)))]
    found = [document for name in names if (document := _whole_file(folder / name, name, group=name))]
    if not found and path.is_dir():
        raise UserError(f"the folder {path} must hold at least one non-empty file that matches '{pattern}'; none does.")
    if not found:
        raise UserError(f"source must be a file with something in it or a folder; '{path}' is not.")
    return found


def _list_folder(folder: Path, config: DataConfig, cache: Path | None) -> Listing:
    documents: list[Document] = []
    origins = []
    for document in files_in(folder, config.pattern):
        if is_packed(document.path):
            documents += unpacked(document.path, document.name, config.field, cache)
            origins.append(FileState.now(document.path))
        else:
            check_text(document, pattern=config.pattern)
            documents.append(document)
    return Listing(title=f"the folder {folder}", documents=documents, split_by="document", origins=tuple(origins))


def _whole_file(path: Path, name: str, *, group: str) -> Document | None:
    """The file as a document; None for folders and other things that are no files, and for empty ones."""
    with reading(path):
        found = path.stat()
    if not stat.S_ISREG(found.st_mode) or not found.st_size:
        return None
    return Document(name=name, group=group, path=path, start=0, stop=found.st_size, modified_ns=found.st_mtime_ns)


def _check_folders(folder: Path, parts: Sequence[str]) -> None:
    """Raise for a folder on the way of a pattern of `parts` that cannot be listed, which glob would pass over, and,
    where the pattern has no end, for a link by which a folder would contain itself."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}. Mend it or choose a narrower pattern.")

    above: dict[str, tuple[Path, ...]] = {str(folder): (folder.resolve(),)}
    for here, names, _ in os.walk(folder, followlinks=True, onerror=refuse):
        level = len(above[here]) - 1
        endless = "**" in parts[: level + 1]
        wanted = "*" if endless else parts[level]
        if not endless and level == len(parts) - 1:
            names.clear()  # the last part is the files' own
        names[:] = [n for n in names if fnmatchcase(n, wanted) and (n[0] != "." or wanted[0] == ".")]
        for name in names:
            child = os.path.join(here, name)
            real = Path(child).resolve()
            if endless and any(parent.is_relative_to(real) for parent in above[here]):
                raise UserError(
                    f"the link {child} leads to a folder that contains it, so the folder has no end: remove the link "
                    "or choose a pattern without **."
                )
            above[child] = (*above[here], real)


def _list_token_files(folder: Path, shards: dict[str, list[str]], bare: str) -> Listing:
    documents, dtypes = [], {}
    for group, names in shards.items():
        for name in names:
            whole = _whole_file(folder / name, "ids" if len(names) == 1 else name, group=group)
            if whole is None:
                raise UserError(f"{folder / name} must hold {bare} ids; it is empty.")
            document, dtypes[name] = ids_in(whole, bare)
            documents.append(document)
    if len(set(dtypes.values())) > 1:
        one, two = (next(name for name, dtype in dtypes.items() if dtype == kind) for kind in ("<u2", "<u4"))
        raise UserError(f"the token files in {folder} must hold ids of one width; {one} holds uint16, {two} uint32.")
    return Listing(
        title=f"the token files in {folder}", documents=documents, split_by="file", dtype=next(iter(dtypes.values()))
    )


def _list_file(given: Path, config: DataConfig, cache: Path | None) -> Listing:
    ids, fraction = given.suffix == ".bin", config.validation_fraction
    whole = _whole_file(given, "ids" if ids else "text", group="")
    if whole is None:
        raise UserError(f"source must be a file with something in it or a folder; '{given}' is not.")
    dtype: str | None = None
    origins: tuple[FileState, ...] = ()
    if ids:
        whole, dtype = ids_in(whole, config.bin_dtype)
        width = np.dtype(dtype).itemsize
        cut = whole.start + int(whole.size // width * (1 - fraction)) * width
    else:
        if is_packed(given):
            origins = (FileState.now(given),)
            whole = next(iter(unpacked(given, "text", config.field, cache)), None)
            if whole is None:
                raise UserError(f"source must be a file with something in it; what '{given}' holds is empty.")
            whole = replace(whole, name="text")
        check_text(whole)
        cut = _start_of_character(whole.path, int(whole.size * (1 - fraction)))
    if not whole.start < cut < whole.stop:
        raise UserError(
            f"{given} with its {whole.size:,} bytes is too short to hold out {fraction:.0%} of it at the end: one "
            "split would be empty."
        )
    parts = [replace(whole, group="train", stop=cut), replace(whole, group="validation", start=cut)]
    title = f"the {'token' if ids else 'text'} file {given}"
    return Listing(title=title, documents=parts, split_by="position", dtype=dtype, origins=origins)


def _start_of_character(path: Path, position: int) -> int:
    """The first position from `position` on that is not inside a UTF-8 character, so that every tokenizer can split
    there; `position` itself if the bytes there are no UTF-8."""
    with reading(path), path.open("rb") as file:
        file.seek(position)
        ahead = file.read(4)
    for distance, byte in enumerate(ahead):
        if byte & 0xC0 != 0x80:
            return position + distance
    return position if len(ahead) == 4 else position + len(ahead)
