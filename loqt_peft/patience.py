"""A progress bar where people would otherwise wait without a word."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from accelerate import PartialState
from tqdm import tqdm


Item = TypeVar("Item")
# before that nobody wonders
SECONDS = 5


def patiently(items: Iterable[Item], what: str, total: int | None = None, at_once: bool = False) -> Iterator[Item]:
    """`items`, with a bar and the time left on the first process if they take longer than five seconds.

    Args:
        items: What is gone through.
        what (`str`): What people read beside the bar.
        total (`int`, *optional*): How many there are, if `items` has no length.
        at_once (`bool`): Show the bar from the beginning.
    """
    # asking for the state would create one, with a device
    waits = not PartialState._shared_state or PartialState().is_main_process
    yield from tqdm(items, what, total, leave=at_once, delay=0 if at_once else SECONDS, disable=not waits)
