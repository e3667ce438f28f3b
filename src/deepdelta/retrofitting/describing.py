"""Blocks as tables: where a block adds, what it adds, and what runs the blocks; of libraries, and of one's own.

Nothing here computes. `described.py` does what a table says, `families.py` holds the tables of transformers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from deepdelta.errors import UserError

Step = str | Callable[[Tensor], Tensor]
"""A module, number or parameter of the block by its name, or a function that can be pickled."""
Takes = Mapping[str, str] | tuple[str, ...]
ALL: Takes = {}
"""All further arguments of the block, as they are."""


@dataclass(frozen=True)
class Branch:
    """F of one x + F(x): steps one after another."""

    steps: tuple[Step, ...]
    """Names within the block ("mlp", "output.dense"). A module is called, and of a tuple that it returns the first goes
    on; a number is the probability of a dropout; a parameter multiplies; None does nothing. Or functions."""
    norm: str = ""
    """The norm before the branch, by name; what it gives is also what the gate sees. Where the width stands last."""
    takes: Takes = ()
    """Further arguments of the block that the first step gets: these; or, of a mapping, all, under the new names that
    it has for some, without those that it maps to ''."""


@dataclass(frozen=True)
class Addition:
    """One x + F(x) of a block, or x + F(x) + G(x): branches that read the same x are one addition."""

    name: str
    """Of its residual."""
    branches: tuple[Branch, ...]
    after: str = ""
    """A norm or activation after the addition, by name; it acts on each value channel."""
    given: str = ""
    """The argument of the block without which this addition is not made; blocks may lack its modules."""
    shortcut: str = ""
    """The map of x where the block changes width or resolution, in the first block of a stack alone. An nn.Identity is
    none."""


@dataclass(frozen=True)
class Block:
    """A class of blocks: its additions in the order of application."""

    additions: tuple[Addition, ...]
    when: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of a block and the values with which this describes it."""
    returns_rest: bool = False
    """Whether the block returns a tuple: vectors, then what the first steps of branches returned beside their own."""


Blocks = Mapping[type[nn.Module] | str, Block | tuple[Block, ...]]


@dataclass(frozen=True)
class Stack:
    """A module that runs blocks one after another, each on what the one before it returned and nothing else between."""

    path: str
    """The blocks from that module on, `*` for each of a list: "layers.*"."""
    blocks: Blocks
    """By class or full name. Of several descriptions the first whose `when` fits is taken."""
    width: str = "config.hidden_size"
    """Where the width stands, from the module on."""
    norm: Literal["none", "rms"] = "none"
    """rms: an RMSNorm for the gate and W alone, where branches have no norm before them and the vectors no size that
    they keep to."""
    channel_first: bool = False
    """Vectors (N, C, H, W) in place of (B, T, D)."""
    end: tuple[str, ...] = ()
    """What reads the last block's output within that module, the first of these that it has: there the state is reduced
    if the last block was not run."""
    loop: str = ""
    """The submodule whose forward runs the blocks, where it is not that module's own."""
    depth: str = ""
    """The setting that must be the number of blocks, from the module on."""

    @property
    def plain_axes(self) -> int:
        """Axes of vectors; a state has one more."""
        return 4 if self.channel_first else 3

    def known(self) -> dict[str, tuple[Block, ...]]:
        """The blocks by full name."""
        return {
            kind if isinstance(kind, str) else full_name(kind): (one,) if isinstance(one, Block) else one
            for kind, one in self.blocks.items()
        }


def full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def found(owner: nn.Module, path: str) -> Any:
    """An attribute by its path; a number is an index of a list.

    Raises:
        UserError: there is none.
    """
    here: Any = owner
    for name in path.split("."):
        try:
            here = here[int(name)] if name.lstrip("-").isdigit() else getattr(here, name)
        except (AttributeError, IndexError) as error:
            raise UserError(
                f"the description of {type(owner).__name__} names '{path}', and {type(here).__name__} has no '{name}'."
            ) from error
    return here


def each(owner: nn.Module, path: str) -> list[Any]:
    """What stands at a path in which `*` is each of a list."""
    first, star, rest = path.partition("*")
    here: Any = found(owner, first.rstrip(".")) if first else owner
    if not star:
        return [here]
    rest = rest.lstrip(".")
    return [one for item in here for one in (each(item, rest) if rest else [item])]
