"""Whether a quantized model stops learning early.

Long runs are too dear for grids: rates that did well in short ones.
"""

from collections.abc import Callable
from dataclasses import replace

from benchmarks.compare.settings import NAMES, Size, Variant
from benchmarks.compare.studies.rest import FULL_AT_5, FULL_AT_10
from benchmarks.compare.variants import (
    LOQT,
    METHODS,
    RANDOM,
    better,
    eight_bit,
    named,
    widest,
    widest_per_layer,
)


STEPS = 10


def variants(size: Size, device_bytes: Callable[[Variant], int]) -> list[Variant]:
    nq = named(METHODS, NAMES["loqt-nq"])
    limit = device_bytes(LOQT)
    wide = eight_bit(widest(eight_bit, size, device_bytes, limit), RANDOM)
    slow = [replace(variant, rates=(0.005,)) for variant in (nq, LOQT, RANDOM, wide)]
    fast = replace(better(size, widest_per_layer(size, device_bytes, limit)), rates=(0.02,))
    return [*(replace(full, rates=(0.001,)) for full in (FULL_AT_5, FULL_AT_10)), *slow, fast]
