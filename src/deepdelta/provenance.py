"""What a number depends on besides its configuration: versions, machine, commit."""

import datetime
import hashlib
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepdelta.version import __version__


def versions() -> dict[str, str]:
    return {
        "deepdelta": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def machine() -> dict[str, str]:
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {"cores": str(os.cpu_count())}


def now() -> str:
    """The time in UTC, as ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What the figures in a file depend on besides its settings. Every kind of results inherits it."""

    command: str
    """As it was typed."""
    commit: str | None
    versions: dict[str, str]
    machine: dict[str, str]

    def facts(self, *more: str) -> str:
        """All of it on one line, `more` before the command."""
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        facts = (f"{', '.join(self.machine.values())} cores", packages, f"commit {self.commit or 'unknown'}")
        return "; ".join([*facts, *more, self.command])


def provenance(command: str, packages: dict[str, str] | None = None) -> dict[str, Any]:
    """The fields of `Provenance` here and now; `packages` are other versions than `versions()`."""
    here = Provenance(command=command, commit=commit(), versions=packages or versions(), machine=machine())
    return vars(here)


def commit() -> str | None:
    """The commit of the source tree that this package runs from, '+changes' where it differs.

    None where there is no repository, or one that does not track this file, such as that of a project in whose folder
    the package is installed. Nothing that a repository's configuration names is run, and no variable of the
    environment chooses another repository.
    """
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "--verify", "HEAD^{commit}").strip()
        # Each entry: mode, kind and id, a tab, the path in `folder`.
        entries = [entry.partition("\t") for entry in _git(folder, "ls-tree", "-rz", head).split("\0")[:-1]]
    except (OSError, subprocess.CalledProcessError):
        return None
    tree = {name: about.rpartition(" ")[2] for about, _, name in entries}
    if Path(__file__).relative_to(folder).as_posix() not in tree:
        return None
    kind = hashlib.sha1 if len(head) == 40 else hashlib.sha256
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")} | set(tree)
    same = all(_blob(folder / name, kind) == tree.get(name) for name in here)
    return head if same else f"{head}+changes"


def _blob(path: Path, kind: Callable[[bytes], Any]) -> str | None:
    """Git's id of a file's content; None where there is no such file."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    return str(kind(b"blob %d\0" % len(content) + content).hexdigest())


def _git(folder: Path, *arguments: str) -> str:
    """What a command of git prints that reads objects alone: no filter, monitor or hook has a part in that."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # A partial clone would fetch what it lacks, by a command that it names itself.
    environment |= {"GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none"}
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments]
    return os.fsdecode(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


def _processor() -> str:
    description = Path("/proc/cpuinfo")
    if description.exists():
        for line in description.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
