"""What the machine has, compared with what a piece of work needs before it is begun."""

import os
from pathlib import Path

import torch

from deepdelta.errors import UserError

MOST_THREADS = 1024

# The memory that a container may use, in bytes; the files of two generations of Linux's control groups.
CONTAINERS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def available_bytes(device: torch.device | None = None) -> int:
    """Bytes that this process may still take: of a CUDA device, else of the machine, swap included.

    On systems that do not say what is free, it is all that the machine has.
    """
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    facts = Path("/proc/meminfo")
    if not facts.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = (line.split() for line in facts.read_text(encoding="utf-8").splitlines())
    kibibytes = {words[0]: int(words[1]) for words in lines}
    limits = [kibibytes.get("MemAvailable:", kibibytes["MemTotal:"]) * 1024 + kibibytes.get("SwapFree:", 0) * 1024]
    for name in CONTAINERS:
        if (file := Path(name)).exists() and (text := file.read_text(encoding="utf-8").strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def check_memory(needed: int, what: str, device: torch.device | None = None) -> None:
    """Refuse what cannot fit; `needed` is a lower bound, so that nothing that fits is refused.

    Args:
        what: what takes the memory, for the message.

    Raises:
        UserError: more bytes than are available.
    """
    if needed > (there := available_bytes(device)):
        raise UserError(
            f"{what} must fit into memory: at least {needed / 2**30:,.2f} GiB are needed, {there / 2**30:,.2f} GiB are "
            "available; make it smaller."
        )


def check_threads(threads: int | None) -> None:
    """Refuse a number of CPU threads that no machine has; None stands for a default.

    Raises:
        UserError: a number outside of 1 to `MOST_THREADS`.
    """
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        bound = f"at least 1, got {threads}" if threads < 1 else f"at most {MOST_THREADS:,}, got {threads:,}"
        raise UserError(f"threads must be {bound}.")
