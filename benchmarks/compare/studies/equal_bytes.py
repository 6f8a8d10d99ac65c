"""GaLore beside LoQT with 8-bit moments, at the largest rank whose bytes on the device are no more than GaLore's.

LoQT's s is GaLore's scale, 0.25, and smaller where the rank is the larger one: a step of B by Adam moves W by s √(r/n).
"""

from collections.abc import Callable

from benchmarks.compare.settings import NAMES, Size, Variant
from benchmarks.compare.variants import LOQT, METHODS, eight_bit, named, scaled, widest


def variants(size: Size, device_bytes: Callable[[Variant], int]) -> list[Variant]:
    galore = named(METHODS, NAMES["galore"])
    wide = eight_bit(widest(eight_bit, size, device_bytes, device_bytes(galore)))
    quarter = (scaled(variant, 0.25) for variant in (LOQT, eight_bit(size.rank)))
    return [galore, LOQT, *quarter, *(scaled(wide, s) for s in (0.125, 0.25))]
