"""Finite groups as permutations and as orthogonal matrices, and each matrix as at most two reflections.

Shapes: S symbols (all elements of a group), D width of the representation, r rewrites per symbol.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from deepdelta.errors import UserError, nearest

Floats = NDArray[np.float64]
Permutation = tuple[int, ...]
GROUPS = ("Z2", "S3", "D4", "A5")


@dataclass(frozen=True, eq=False)
class Group:
    """A group; `elements[0]` is the identity.

    Fields:
        elements: as permutations p, point i going to p[i].
        matrices: (S, D, D), orthogonal, one per element: a faithful representation.
        table: (S, S), the number of a b (first b, then a) at [a, b].
    """

    name: str
    elements: tuple[Permutation, ...]
    matrices: Floats
    table: NDArray[np.int64]


@cache
def group(name: str) -> Group:
    """Z2 acts on the ends of a segment, S3 on a triangle, D4 on a square, A5 on the icosahedron.

    Raises:
        UserError: another name.
    """
    if name not in GROUPS:
        raise UserError(f"group must be one of {', '.join(GROUPS)}, got '{name}'; {nearest(name, GROUPS)}")
    pairs = _icosahedral() if name == "A5" else _polygon({"Z2": 2, "S3": 3, "D4": 4}[name])
    pairs.sort(key=lambda pair: pair[0])
    elements = tuple(permutation for permutation, _ in pairs)
    number = {permutation: i for i, permutation in enumerate(elements)}
    table = [[number[tuple(a[i] for i in b)] for b in elements] for a in elements]
    return Group(name, elements, np.array([matrix for _, matrix in pairs]), np.array(table))


def reflections(matrix: Floats) -> list[Floats]:
    """Unit vectors k_1, .., k_r with matrix = H(k_r) .. H(k_1), H(k) = I - 2 k k^T, r <= D (Cartan and Dieudonne).

    H(k) for k along Qx - x takes a unit vector x to Qx, so H(k) Q fixes x, and so on in what is left.
    """
    found: list[Floats] = []
    rest = matrix
    while not np.allclose(rest, np.eye(len(rest)), atol=1e-9):
        # The axis that moves farthest: what moves little would give k with little precision.
        moved = rest - np.eye(len(rest))
        k = moved[:, np.argmax(np.linalg.norm(moved, axis=0))]
        k = k / np.linalg.norm(k)
        rest = rest - 2 * np.outer(k, k @ rest)
        found.insert(0, k)
    return found


def _polygon(corners: int) -> list[tuple[Permutation, Floats]]:
    """The symmetries of a regular polygon; of a segment, whose width is 1, for two corners."""
    if corners == 2:
        return [((0, 1), np.array([[1.0]])), ((1, 0), np.array([[-1.0]]))]
    step = 2 * math.pi / corners
    pairs = []
    for turn, mirrored in itertools.product(range(corners), (False, True)):
        sign = -1 if mirrored else 1
        cos, sin = math.cos(turn * step), math.sin(turn * step)
        # Corner i stands at the angle i * step; mirrored, it goes to -i first.
        pairs.append(
            (
                tuple((turn + sign * i) % corners for i in range(corners)),
                np.array([[cos, -sign * sin], [sin, sign * cos]]),
            )
        )
    return pairs


def _icosahedral() -> list[tuple[Permutation, Floats]]:
    """The 60 rotations of the icosahedron, and how each permutes the five frames of its two-fold axes."""
    golden = (1 + math.sqrt(5)) / 2
    axis = np.array([0, 1, golden]) / math.sqrt(1 + golden**2)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    angle = 2 * math.pi / 5
    fifth = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
    half = np.diag([-1.0, -1.0, 1.0])
    rotations = [np.eye(3)]
    for rotation in rotations:
        for generator in (fifth, half):
            made = generator @ rotation
            if not any(np.allclose(made, known) for known in rotations):
                rotations.append(made)
    axes = [_line(rotation) for rotation in rotations if np.isclose(np.trace(rotation), -1)]
    frames: list[list[Floats]] = []
    for line in axes:
        if not any(np.allclose(abs(line @ other), 1) for frame in frames for other in frame):
            frames.append(
                [line, *(other for other in axes if abs(line @ other) < 1e-9 and _in_frame(line, other, axes))]
            )
    return [(tuple(_frame_of(rotation @ frame[0], frames) for frame in frames), rotation) for rotation in rotations]


def _line(rotation: Floats) -> Floats:
    """The axis of a half turn, 2 n n^T - I."""
    outer = (rotation + np.eye(3)) / 2
    n: Floats = outer[:, np.argmax(np.diag(outer))]
    return n / np.linalg.norm(n)


def _in_frame(line: Floats, other: Floats, axes: list[Floats]) -> bool:
    """Whether the third direction of the two is an axis too."""
    return any(np.allclose(abs(np.cross(line, other) @ axis), 1) for axis in axes)


def _frame_of(line: Floats, frames: list[list[Floats]]) -> int:
    return next(i for i, frame in enumerate(frames) if any(np.allclose(abs(line @ axis), 1) for axis in frame))
