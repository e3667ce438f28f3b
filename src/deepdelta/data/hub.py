"""The Hugging Face hub, asked only where it answers."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

ON_HUB = "hf://"
"""What the names of sources and tokenizers on the hub begin with."""


@contextmanager
def offline_without_network() -> Iterator[None]:
    """Have the hub's clients look at what is kept alone where the hub does not answer within three seconds; by
    themselves they would try for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or reachable(constants.ENDPOINT):
        yield
        return
    # `datasets`, where it is imported, has a switch of its own.
    places: list[Any] = [constants, *(sys.modules[name] for name in ("datasets.config",) if name in sys.modules)]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def reachable(address: str) -> bool:
    """Whether something answers there, whatever it answers."""
    try:
        with urlopen(Request(address, method="HEAD"), timeout=3):
            return True
    except HTTPError:
        return True
    except OSError:
        return False
