"""What is neither text nor a file of ids, recognised before anything is trained on its bytes."""

import json
import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from deepdelta.data.documents import Document, head
from deepdelta.errors import UserError

HEAD = 1 << 13
"""How many bytes of a document are looked at."""


class _Kind(NamedTuple):
    """A format, by the end of a file's name or by how the file begins."""

    what: str
    mend: str
    suffixes: str
    start: bytes
    """A regular expression."""


_RECORDS = "let its name end in .jsonl, and name the field with the text by field"
_TABLE = "write its text column to a text file, or to one file per document in a folder"
_IDS = "write ids by numpy as array.astype('uint16').tofile('ids.bin')"
_KINDS = (
    _Kind("is compressed", "decompress it (gunzip), or let its name end in .gz", ".tgz", rb"\x1f\x8b"),
    _Kind("is compressed", "decompress it (zstd -d), or let its name end in .zst", ".zstd", rb"\x28\xb5\x2f\xfd"),
    _Kind("is compressed", "decompress it (bunzip2)", ".bz2 .tbz2", rb"BZh[1-9]1AY&SY"),
    _Kind("is compressed", "decompress it (unxz)", ".xz .txz .lzma", rb"\xfd7zXZ\0"),
    _Kind("is compressed", "decompress it", ".lz4 .br .z .snappy", rb"\x04\x22\x4d\x18|\x1f\x9d"),
    _Kind("holds pickled objects or weights", "give text", ".pkl .pickle .pt .pth .ckpt", rb"\x80[\x02-\x05]"),
    _Kind("is an array of numpy", _IDS, ".npy .npz", rb"\x93NUMPY"),
    _Kind("is a document of an office program", "save it as plain text", ".docx .odt .epub", rb"\xd0\xcf\x11\xe0"),
    _Kind("is a table", _TABLE, ".xlsx .ods .xls", rb"(?!)"),
    _Kind("is an archive", "unpack it to a folder", ".zip .jar .whl", rb"PK(\x03\x04|\x05\x06|\x07\x08)"),
    _Kind("is an archive", "unpack it to a folder", ".tar .7z .rar", rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07|.{257}ustar"),
    _Kind("is a Parquet file", "let its name end in .parquet", "", rb"PAR1"),
    _Kind("is a table", _TABLE, ".arrow .feather .avro", rb"ARROW1|FEA1|Obj\x01"),
    _Kind("is a database", _TABLE, ".sqlite .h5 .hdf5", rb"SQLite format 3\0|\x89HDF\r\n\x1a\n"),
    _Kind("holds weights", "give text", ".safetensors .gguf", rb".{5}\0\0\0\{\"|GGUF"),
    _Kind("is a PDF", "extract its text (pdftotext)", ".pdf", rb"%PDF-"),
    _Kind("is a document of an office program", "save it as plain text", ".rtf", rb"\{\\rtf"),
    _Kind(
        "is an image, sound or film",
        "give text",
        ".png .jpg .jpeg .gif .webp .bmp .tiff .ico .wav .mp3 .flac .ogg .mp4 .webm",
        rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF.{4}(WAVE|WEBP|AVI )|II\*\0|MM\0\*|OggS|fLaC|ID3[\2-\4]|.{4}ftyp",
    ),
    _Kind("is a compiled program", "give text", ".so .o .pyc .exe .dll", rb"\x7fELF|\xcf\xfa\xed\xfe"),
    _Kind(
        "is JSON, one record a line",
        _RECORDS,
        "",
        rb"\s*\[?\s*\{\s*\"(text|content|messages|prompt)\"\s*:",
    ),
    _Kind(
        "stands for a file that Git LFS keeps elsewhere", "fetch that (git lfs pull)", "", rb"version https://git-lfs"
    ),
    _Kind("is UTF-16 or UTF-32", "convert it to UTF-8 (iconv)", "", rb"\xff\xfe|\xfe\xff|\0\0\xfe\xff"),
    _Kind(
        "holds ids, not text",
        "give one .bin file, or a folder with train.bin and val.bin, or with shards called train_... and val_...",
        ".bin .idx",
        rb"MMIDIDX",
    ),
)
_BY_SUFFIX = {suffix: kind for kind in _KINDS for suffix in kind.suffixes.split()}
_BY_START = [(re.compile(kind.start, re.DOTALL), kind) for kind in _KINDS]

_LLM_C = {20240520: "<u2", 20240801: "<u4"}
"""How files of llm.c begin, as an int32, and the ids that follow its header."""
MAGIC = {dtype: number for number, dtype in _LLM_C.items()}
HEADER = 1024
"""Bytes of that header: 256 int32, of which the third is the number of ids."""
_BITS = {"uint16": "<u2", "uint32": "<u4"}
_HALVES = 64
"""16-bit numbers needed to tell that every second one is the upper half of a wider id."""


def check_text(document: Document, *, pattern: str | None = None) -> None:
    """Refuse a document that is no plain text, by its name and by how it begins.

    Args:
        pattern: what it was found by in a folder.

    Raises:
        UserError: with what it is, and what to do.
    """
    start = head(document, HEAD)
    kind = _BY_SUFFIX.get(document.path.suffix.lower()) or _kind_by_start(start)
    if kind is None and _is_json_lines(start):
        kind = next(one for one in _KINDS if one.mend is _RECORDS)
    if kind is not None:
        what, mend = kind.what, kind.mend
    elif (position := start.find(b"\0")) >= 0:
        what, mend = f"byte {position:,} is NUL, which text does not hold", "give text"
    else:
        return
    apart = "" if pattern is None else f", or leave it out by another pattern than '{pattern}', such as '**/*.txt'"
    raise UserError(f"{document.path} must be plain text, but {what}: {mend}{apart}.")


def ids_in(document: Document, bare: str) -> tuple[Document, str]:
    """The ids of a file without the header of llm.c, if it has one, and their dtype, as far as its length and its
    beginning tell.

    Args:
        bare: uint16 or uint32, for a file without a header.

    Raises:
        UserError: it is no row of ids, with what it is, and what to do.
    """
    start = head(document, HEAD)
    if dtype := _LLM_C.get(int.from_bytes(start[:4], "little")):
        width, count = np.dtype(dtype).itemsize, int.from_bytes(start[8:12], "little")
        if document.size != HEADER + count * width:
            raise UserError(
                f"{document.path} begins with a header of llm.c that announces {count:,} ids of {width} bytes each, "
                f"and holds {max(document.size - HEADER, 0):,} bytes of them. It is cut off; give a whole one."
            )
        return replace(document, start=HEADER), dtype
    dtype = _BITS[bare]
    width = np.dtype(dtype).itemsize
    where = f"{document.path} must hold {bare} ids of {width} bytes each"
    # Two or three bytes can be an id.
    if kind := _kind_by_start(start, least=4):
        raise UserError(f"{where}, but {kind.what}: {kind.mend}.")
    if document.size % width:
        length = "odd" if width == 2 else "no multiple of 4"
        raise UserError(
            f"{where}; its length of {document.size:,} bytes is {length}. It is cut off, or was not written by "
            f"numpy.{bare}'s tofile."
        )
    halves = np.frombuffer(start[: len(start) // 4 * 4], "<u2")
    # Ids of the largest vocabularies in use are below 4 * 65,536.
    wide = not document.size % 4 and len(halves) >= _HALVES and halves[1::2].max() < 4 <= halves[::2].max()
    if wide and bare == "uint16":
        raise UserError(
            f"{where}, but every second number is near 0, as where ids are uint32 or wider: set bin_dtype to uint32, "
            f"or {_IDS}, if all of them are below 65,536."
        )
    return document, dtype


def _kind_by_start(start: bytes, least: int = 1) -> _Kind | None:
    for pattern, kind in _BY_START:
        if (found := pattern.match(start)) and found.end() >= least:
            return kind
    return None


def _is_json_lines(start: bytes) -> bool:
    """Whether the first two lines are a JSON object each."""
    lines = start.split(b"\n", 2)[:2]
    return len(lines) == 2 and all(_is_object(line) for line in lines)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
