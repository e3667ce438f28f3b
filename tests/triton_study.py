"""What Triton's compiler makes of the fused step's kernels for sm_90, without a GPU: the study behind `tiles.MEASURED`.

    make triton-study     writes results/triton-sm90 and prints the table for ops/backends/cuda/tiles.py

Every tile that can be had is compiled; registers, spills and shared memory are what ptxas reports. Of the tiles
without spills the first in this order is chosen: one that holds the whole token; most bytes that the loads of a
processor's programs have in flight, more than ENOUGH of them counting no more; most warps at once; fewest warps a
program. No time is measured.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from deepdelta.files import write_text
from deepdelta.lab.analysis.stored import Stored, load_stored
from deepdelta.lab.views.tables import Column, markdown_page, table_of
from deepdelta.ops.precision import accumulation_dtype
from deepdelta.provenance import provenance, versions
from step_cases import EPS, Case, inputs

OUT = Path(__file__).parent.parent / "results" / "triton-sm90"
CHANNELS, WIDTHS, DTYPES = (1, 4, 16), (768, 1024, 2048, 4096), (torch.bfloat16, torch.float32)
PUBLISHED = tuple(product((1, 4), (768, 1024, 2048)))
"""Value channels and widths of the paper's models: nothing may spill there."""
VARIANTS = {
    "delta": lambda channels: Case(made="both", opening="norm" if channels > 1 else "alone"),
    "additive": lambda channels: Case(gates="none", offset=None, power=0, opening="norm" if channels > 1 else "alone"),
}
"""What the tiles are chosen by, which needs most registers, and the least, as a function of the value channels."""
ENOUGH = 48 * 1024
"""A memory of 4.8 TB/s that answers after a microsecond has 36 KiB of each of 132 processors in flight."""
REGISTERS, SHARED, WARPS, PROGRAMS, RESERVED = 65536, 228 * 1024, 64, 32, 1024
"""Of a processor of sm_90; RESERVED bytes of shared memory go with each program."""
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A kernel as ptxas made it."""

    kernel: str
    variant: str
    channels: int
    width: int
    dtype: str
    tile: int
    """Width of the tile, of all value channels."""
    warps: int
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread that its spills store and load."""
    shared: int
    """Bytes of a program."""
    chosen: bool = False

    @property
    def programs(self) -> int:
        """That a processor holds at once."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.warps)
        return min(PROGRAMS, WARPS // self.warps, by_registers, SHARED // (self.shared + RESERVED))

    @property
    def in_flight(self) -> int:
        """Bytes that the loads of a processor's programs ask for: X and h, in the backward pass dX' and dc' too."""
        passes = 2 if self.kernel == "backward" else 1
        itemsize = 2 if self.dtype == "bf16" else 4
        return passes * self.programs * (self.channels + 1) * min(self.width, self.tile) * itemsize

    @property
    def rank(self) -> tuple[Any, ...]:
        """Least for what is chosen."""
        whole = self.tile >= self.width
        return (not whole, -min(self.in_flight, ENOUGH), -self.programs * self.warps, self.warps, -self.tile)


@dataclass(frozen=True, kw_only=True)
class Study(Stored):
    kernels: tuple[Compiled, ...]


def compile_for_gpu(kernel: str, case: Case, dtype: torch.dtype, tile: Any) -> Any:
    """The kernel as ops/backends/cuda has it compiled for a case in tiles of that kind."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from deepdelta.ops.backends.cuda import kernels

    function = getattr(kernels, kernel)
    parts = inputs(case)
    gates = 1 if case.gates == "one" else case.channels
    erases = case.made not in ("", "write") or "erase" in parts
    missing = {"compression", "norm_weight"} - parts.keys()
    missing |= set() if case.opens else {"c"}
    missing |= set() if erases else {"erase", "read"}
    missing |= set() if case.made else {"gating", "beta"}
    missing |= set() if case.made in ("added", "one") else {"factor"}
    constants = {
        **{prefix + name: None for name in missing for prefix in ("", "d_")},
        **{"OFFSET": case.offset, "POWER": case.power, "EPS": EPS, "V": case.channels, "D": case.width},
        **{"GATES": gates if case.made or erases else 0, "SHARE": 0.3 if case.made in ("added", "one") else None},
        **{"TARGETS": case.channels * (case.made in ("both", "write", "added")), "BLOCK_V": tile.channels},
        "BLOCK_D": tile.width,
    }
    narrow, wide = (f"*{name_of(kind)}" for kind in (dtype, accumulation_dtype(dtype)))
    kinds = dict.fromkeys(("state", "h", "new", "c", "d_new", "d_c", "d_state", "d_h"), narrow) | {"tokens": "i64"}
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, wide) for name in names}
    source = ASTSource(
        function,
        signature,
        {(i,): constants[name] for i, name in enumerate(names) if name in constants},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tile.warps})


def measure(kernel: str, variant: str, channels: int, width: int, dtype: torch.dtype, tile: Any) -> Compiled:
    """What ptxas says of it."""
    from triton import knobs

    case = VARIANTS[variant](channels)._replace(channels=channels, width=width, tokens=1)
    made = compile_for_gpu(kernel, case, dtype, tile)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", said), SPILLS.search(said)
    assert registers and spills, said
    return Compiled(
        kernel=kernel,
        variant=variant,
        channels=channels,
        width=width,
        dtype=name_of(dtype),
        tile=tile.width,
        warps=tile.warps,
        registers=int(registers[1]),
        spilled=int(spills[2]) + int(spills[3]),
        shared=made.metadata.shared,
    )


def name_of(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else f"fp{dtype.itemsize * 8}"


def candidates(channels: int, width: int) -> Iterator[Any]:
    """Tiles of 8, 16 or 32 numbers a thread: the whole token, and parts of one that is too large for a program."""
    from deepdelta.ops.backends.cuda.tiles import Blocks, power_of_two

    rows, columns = power_of_two(channels), power_of_two(width)
    widths = [columns] if rows * columns <= 4096 else [columns >> shift for shift in range(5)]
    for tile, numbers in product(widths, (8, 16, 32)):
        warps = rows * tile // (32 * numbers)
        if (1 <= warps <= 16 and rows * tile >= 2048) or (tile == columns and 1 <= warps <= 16):
            yield Blocks(rows, tile, warps, 0)


def study() -> Iterator[Compiled]:
    """Every candidate of the forward and the backward, the chosen ones marked; the chosen ones of the other kernels."""
    for channels, width, dtype in product(CHANNELS, WIDTHS, DTYPES):
        for kernel in ("forward", "backward"):
            tiles = list(candidates(channels, width))
            found = [measure(kernel, "delta", channels, width, dtype, tile) for tile in tiles]
            best = min((one for one in found if not one.spilled), key=lambda one: one.rank)
            tile = tiles[found.index(best)]
            yield from (replace(one, chosen=one is best) for one in found)
            yield replace(measure(kernel, "additive", channels, width, dtype, tile), chosen=True)
            if kernel == "forward":
                yield replace(measure("replay", "delta", channels, width, dtype, tile), chosen=True)
            print(best, file=sys.stderr, flush=True)


def table(kernels: tuple[Compiled, ...]) -> dict[tuple[str, int, int], dict[int, tuple[int, int, int]]]:
    """`tiles.MEASURED`."""
    found: dict[tuple[str, int, int], dict[int, tuple[int, int, int]]] = {}
    for one in kernels:
        if one.chosen and one.variant == "delta" and one.kernel != "replay":
            key = (one.kernel, one.channels, 2 if one.dtype == "bf16" else 4)
            found.setdefault(key, {})[one.width] = (one.tile, one.warps, one.programs)
    return found


def load(path: Path = OUT) -> Study:
    return load_stored(Study, path / "results.json", "make triton-study")


COLUMNS = [
    Column("kernel", "", lambda one: f"{one.kernel}, {one.variant}"),
    Column("V", "", lambda one: str(one.channels)),
    Column("d", "", lambda one: str(one.width)),
    Column("dtype", "", lambda one: one.dtype),
    Column("tile", "", lambda one: f"{one.channels} x {one.tile}"),
    Column("warps", "", lambda one: str(one.warps)),
    Column("registers", "", lambda one: str(one.registers)),
    Column("spilled bytes", "", lambda one: str(one.spilled)),
    Column("shared bytes", "", lambda one: f"{one.shared:,}"),
    Column("programs per processor", "", lambda one: str(one.programs)),
    Column("KiB in flight", "", lambda one: str(one.in_flight // 1024)),
]


def write_table(study: Study) -> None:
    """table.md, of the tiles that the launch takes."""
    facts = (
        study.facts(f"{len(study.kernels)} kernels compiled, none run"),
        "Registers of a thread, spills and shared memory of the tiles that the launch takes, as ptxas reports them. "
        "A tile is taken for having no spills, then for the bytes that it keeps in flight. No time was measured.",
    )
    chosen = table_of([one for one in study.kernels if one.chosen], COLUMNS)
    write_text(OUT / "table.md", markdown_page("The Triton kernels as compiled for sm_90", facts, [chosen]))


def main() -> None:
    import triton

    about = provenance("make triton-study", versions() | {"triton": triton.__version__})
    found = Study(**about, kernels=tuple(study()))
    found.save(OUT / "results.json")
    write_table(found)
    for key, widths in table(found.kernels).items():
        print(f"    {key}: {widths},")


if __name__ == "__main__":
    main()
