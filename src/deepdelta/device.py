"""Which device and precision a computation takes, and what the machine has for it."""

import ctypes
import importlib.util
import os
import platform
from dataclasses import dataclass

import torch

from deepdelta.errors import UserError


@dataclass(frozen=True)
class Device:
    """A chosen device and precision, and why."""

    device: torch.device
    precision: str
    reason: str


def choose_device(name: str, precision: str) -> Device:
    """The device and precision that `auto` stands for here, or the ones asked for.

    Raises:
        UserError: a device or precision that this machine does not have.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, here in present.items() if here)
        reason = {"cuda": "a CUDA GPU is present", "mps": "an Apple GPU is present", "cpu": "no GPU is present"}[name]
    elif not present[name]:
        here = [kind for kind, there in present.items() if there]
        raise UserError(f"device '{name}' is not present on this machine; choose from: auto, {', '.join(here)}.")
    else:
        reason = "asked for"
    has_bf16 = name == "cpu" or (name == "cuda" and torch.cuda.is_bf16_supported())
    if precision == "auto":
        precision = "bf16" if name == "cuda" and has_bf16 else "fp32"
    elif precision == "bf16" and not has_bf16:
        raise UserError(f"device '{name}' has no bf16 autocast here; use precision fp32.")
    return Device(torch.device(name), precision, reason)


def compiler_problem(device: str) -> str | None:
    """What torch.compile's default backend lacks, or None."""
    if device == "cuda":
        return None if importlib.util.find_spec("triton") else "torch.compile on CUDA needs the package triton"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler, and there is none; install g++ or clang++, or name one in CXX"
    return None


def visible_devices(kind: str) -> tuple[str, ...]:
    """The devices of a kind that this process may use, as CUDA_VISIBLE_DEVICES names them; none of kinds but cuda."""
    if kind != "cuda":
        return ()
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    named = tuple(name.strip() for name in given.split(",") if name.strip())
    return named or tuple(map(str, range(torch.cuda.device_count())))


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Have the process keep the memory of freed tensors for the next ones; whether this C library can (glibc can).

    By default glibc asks the system for every block over 32 MiB anew and gives it back at once, and a training step
    spends more time on the system's zeroing of pages than on such a tensor itself. The cost is that the process holds
    the largest amount that it ever needed.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*option) for option in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**26)))
