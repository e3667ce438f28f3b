"""Token ids as they come: a list, a tensor or an array."""

from collections.abc import Sequence
from operator import index

import numpy as np
from torch import Tensor

from deepdelta.errors import UserError

Ids = Sequence[int] | Tensor | np.ndarray


def id_list(ids: Ids, name: str) -> list[int]:
    """The ids as a plain list; a tensor or an array has one axis, or one row.

    Raises:
        UserError: more rows than one, or what is no whole number.
    """
    if isinstance(ids, Tensor | np.ndarray):
        if ids.ndim != 1 and (ids.ndim != 2 or len(ids) != 1):
            raise UserError(f"{name} must be one row of ids, got shape {tuple(ids.shape)}; give one row at a time.")
        ids = ids.reshape(-1).tolist()
    try:
        return [index(one) for one in ids]
    except TypeError:
        raise UserError(f"{name} must be whole numbers, got {ids!r:.60}; a tokenizer makes ids of text.") from None
