"""The command doctor."""

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from deepdelta.cli.shared import use_threads
from deepdelta.device import choose_device, compiler_problem
from deepdelta.errors import UserError
from deepdelta.nn.backend import Work, described
from deepdelta.provenance import machine, versions
from deepdelta.selfcheck import self_check


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """What this machine can run, and whether it computes values and gradients of the rewrite rightly."""

    threads: int | None = None
    """CPU threads; torch's choice by default."""

    def __call__(self) -> None:
        use_threads(self.threads)
        for name, value in (versions() | machine()).items():
            print(f"{name:<10} {value}")
        chosen = choose_device("auto", "auto")
        print(f"device     {chosen.device} ({chosen.reason}), precision {chosen.precision}")
        print(f"compiler   {compiler_problem(chosen.device.type) or 'torch.compile has what it needs'}")
        for channels in (1, 4):
            taken = described("auto", Work(channels, 768, "delta"), torch.empty(0, device=chosen.device))
            print(f"backend    at V = {channels}, d 768, {taken}")
        print("sharding   by FSDP2: a sharded or hooked layer opens its own state; print(model) says which holds")
        table = Table("backend", "device", "dtype", "values", "gradients", "", title="errors against fp64")
        checks = list(self_check())
        for check in checks:
            errors = ("-" if e is None else f"{e:.1e}" for e in (check.value_error, check.gradient_error))
            table.add_row(check.backend, check.device, check.dtype, *errors, check.verdict)
        Console().print(table)
        if any(check.verdict == "WRONG" for check in checks):
            raise UserError("a backend computes wrong numbers here: use the backend 'reference', and please report it.")
