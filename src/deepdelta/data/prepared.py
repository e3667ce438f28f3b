"""What `prepare` says of the shards that it wrote, held against the shards that are there."""

from collections.abc import Sequence
from pathlib import Path

from deepdelta.data.cache import remembered
from deepdelta.data.documents import Document
from deepdelta.errors import UserError
from deepdelta.files import check_format, read_object, sha256_of

MANIFEST = "prepared.json"


def check_prepared(shards: Sequence[Document], cache: Path | None) -> None:
    """Refuse shards of a folder that `prepare` wrote and has not finished, or that are not as it wrote them.

    Raises:
        UserError: naming the first shard that is gone or has another hash.
    """
    folder = shards[0].path.parent
    file = folder / MANIFEST
    if not file.exists():
        return
    told = read_object(file, f"restore it, or delete {folder} and prepare anew")
    check_format(told, file)
    if not told["finished"]:
        raise UserError(f"{folder} must be prepared to its end: run the same `deepdelta prepare` again.")
    there = [shard for shard in shards if shard.path.parent == folder]
    hashes = remembered(cache, "file sha256", there, lambda: [sha256_of(shard.path) for shard in there])
    found = {shard.path.name: sha256 for shard, sha256 in zip(there, hashes, strict=True)}
    for shard in (*told["train"], *told["val"]):
        if (name := shard["name"]) not in found:
            raise UserError(f"{folder / name} is gone: restore it, or delete {folder} and prepare anew.")
        if found[name] != shard["sha256"]:
            raise UserError(
                f"{folder / name} must have the hash {shard['sha256'][:12]}... that {MANIFEST} holds, and has "
                f"{found[name][:12]}...: restore it, or delete {folder} and prepare anew."
            )
