"""Data sets of the library `datasets`: those that it saved to a folder, and those of the Hugging Face hub, streamed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepdelta.data.hub import ON_HUB, offline_without_network
from deepdelta.errors import UserError, require

_SETS = f"{ON_HUB}datasets/"
_HOW = f"{_SETS}OWNER/NAME[@REVISION][/CONFIGURATION][:SPLIT[[:DOCUMENTS]]]"
_NAMED = re.compile(
    re.escape(_SETS) + r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<configuration>[\w.-]+))?"
    r"(:(?P<split>\w+)(\[:(?P<first>\d+)\])?)?"
)
_DICT, _STATE = "dataset_dict.json", "state.json"
_TRAIN, _VALIDATION = "train", "validation"


@dataclass(frozen=True)
class TextSet:
    """Rows of which one column is text.

    Attributes:
        name: the same wherever a saved one lies.
        place: the folder, or what `ON_HUB` stands before.
        validation: the split of the same data set that is called so; None where there is none, or one split was named.
        optional: whether that there is no such split (which of the hub's is known when it is read), or no such column
            in it, is to have no rows.
    """

    name: str
    place: Path | str
    validation: "TextSet | None" = None
    optional: bool = False

    @property
    def splits(self) -> tuple["TextSet", ...]:
        return (self,) if self.validation is None else (self, self.validation)

    def files(self) -> list[Path]:
        """What a saved one consists of."""
        return [] if isinstance(self.place, str) else sorted(path for path in self.place.iterdir() if path.is_file())

    def texts(self, field: str, skip: int = 0) -> Iterator[tuple[int, Any]]:
        """Number and text of the rows from number `skip` on.

        Raises:
            UserError: there is no such column, or no such data set; the hub cannot be reached; the extra `data` is
                absent.
        """
        for number, row in enumerate(self._rows(skip), skip):
            if field not in row:
                if self.optional:
                    return
                held = ", ".join(map(repr, row))
                raise UserError(
                    f"{self.place} has no column '{field}', but {held}; name the one with the text by field."
                )
            yield number, row[field]

    def _rows(self, skip: int) -> Iterator[dict[str, Any]]:
        require("Data sets of the hub and of the library datasets", "data", "datasets")
        import datasets
        from huggingface_hub.errors import HfHubHTTPError

        data: Any
        try:
            if isinstance(self.place, Path):
                data = datasets.load_from_disk(str(self.place)).with_format(None).to_iterable_dataset()
                yield from data.skip(skip)
                return
            named = _NAMED.fullmatch(self.place)
            assert named is not None
            split = named["split"] or _TRAIN
            with offline_without_network():
                data = datasets.load_dataset(
                    named["repository"],
                    named["configuration"],
                    split=None if self.optional else split,
                    revision=named["revision"],
                    streaming=True,
                )
            if self.optional:
                if split not in data:
                    return
                data = data[split]
            yield from (data if named["first"] is None else data.take(int(named["first"]))).skip(skip)
        except (OSError, ValueError, HfHubHTTPError) as error:
            first = str(error).strip().partition("\n")[0]
            mend = "give a folder that save_to_disk of `datasets` wrote"
            if isinstance(self.place, str):
                which = f" of the configuration {named['configuration']}" if named and named["configuration"] else ""
                mend = (
                    f"without a network, place the Parquet files{which} of that repository of the Hugging Face hub in "
                    "a folder, and give the folder in its place"
                )
            raise UserError(f"{self.place} cannot be read ({type(error).__name__}: {first}); {mend}.") from error


def text_set(source: str) -> TextSet | None:
    """The data set that a source names; None for other sources.

    Of several splits it is the one called train, with the one called validation beside it, if there is one. Another of
    a folder is named by its own folder.

    Raises:
        UserError: a name on the hub of another form, or a folder of several splits without train.
    """
    if source.startswith(ON_HUB):
        named = _NAMED.fullmatch(source)
        if named is None:
            raise UserError(f"a source on the Hugging Face hub must be {_HOW}, got '{source}'.")
        name = source.removeprefix(_SETS).partition("[")[0]
        if named["split"]:
            return TextSet(name, source)
        return TextSet(name, source, TextSet(f"{name}:{_VALIDATION}", f"{source}:{_VALIDATION}", optional=True))
    folder = Path(source)
    if (folder / _DICT).is_file():
        if not (folder / _TRAIN / _STATE).is_file():
            held = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{_STATE}")))
            raise UserError(f"the data set {folder} has no split '{_TRAIN}', but {held}: name one by its own folder.")
        own = TextSet(f"{folder.name}:{_VALIDATION}", folder / _VALIDATION, optional=True)
        return TextSet(folder.name, folder / _TRAIN, own if (folder / _VALIDATION / _STATE).is_file() else None)
    return TextSet(folder.name, folder) if (folder / _STATE).is_file() else None
