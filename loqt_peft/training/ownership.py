"""Which process does the work of which layer in an update: the same answer on all of them, without a word between them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest


def _largest_first(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda place: (-sizes[place], place))


def owners(shapes: Iterable[tuple[int, int]], processes: int) -> list[int]:
    """The owner of each layer, so that all processes hold about as many elements.

    The largest layer goes to whom has least so far. No process then holds more than one layer beyond its share.

    Args:
        shapes: Of the layers' weights, `[out, in]`.
        processes (`int`): How many there are.

    Returns:
        `list[int]`: A rank for each layer.
    """
    sizes = [math.prod(shape) for shape in shapes]
    loads, owner = [0] * processes, [0] * len(sizes)
    for place in _largest_first(sizes):
        owner[place] = min(range(processes), key=lambda rank: (loads[rank], rank))
        loads[owner[place]] += sizes[place]
    return owner


def rounds(shapes: Iterable[tuple[int, int]], processes: int) -> list[list[tuple[int, int]]]:
    """The layers in the order of work: in each round one of every process, and all of about the same size.

    Args:
        shapes: Of the layers' weights, `[out, in]`.
        processes (`int`): How many there are.

    Returns:
        Of each round the places of its layers, each with its owner, in the order of ranks.
    """
    shapes = list(shapes)
    owner = owners(shapes, processes)
    queues: list[list[int]] = [[] for _ in range(processes)]
    for place in _largest_first([math.prod(shape) for shape in shapes]):
        queues[owner[place]].append(place)
    return [
        [(place, rank) for rank, place in enumerate(places) if place is not None] for places in zip_longest(*queues)
    ]
