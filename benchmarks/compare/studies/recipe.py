"""Settings that might beat the paper's recipe at no more bytes on the device."""

from collections.abc import Callable

from benchmarks.compare.settings import Size, Variant
from benchmarks.compare.variants import (
    LOQT,
    RANDOM,
    better,
    eight_bit,
    fitted,
    per_layer,
    rotated,
    scaled,
    widest,
    widest_per_layer,
    with_feedback,
)


CONSTANT = {"interval_schedule": "constant"}


def loqt(name: str, **fields) -> Variant:
    return Variant(name, "loqt", fields, search=True)


def variants(size: Size, device_bytes: Callable[[Variant], int]) -> list[Variant]:
    oftener, rarer = (loqt(f"gap {gap}", update_interval=gap, **CONSTANT) for gap in (50, 250))
    limit = device_bytes(LOQT)
    r = widest(eight_bit, size, device_bytes, limit)
    # with per-layer updates for the paper's recipe too, and for the wider one alone
    limits = (device_bytes(per_layer(LOQT)), limit)
    ranks = sorted({widest_per_layer(size, device_bytes, most) for most in limits})
    freeing = [per_layer(eight_bit(r, base)) for r in ranks for base in (LOQT, RANDOM)]
    # how often directions should change
    freeing += [per_layer(eight_bit(ranks[-1], base)) for base in (oftener, rarer)]
    return [
        LOQT,
        loqt("random P", projection="random"),
        RANDOM,
        loqt("random P, gap 500", projection="random", update_interval=500, **CONSTANT),
        *(scaled(RANDOM, s) for s in (0.125, 0.25)),
        scaled(rarer, 0.25),
        loqt("moments rotated", optimizer_state="rotate"),
        with_feedback(LOQT),
        eight_bit(r),
        eight_bit(r, RANDOM),
        *(scaled(eight_bit(r, RANDOM), s) for s in (0.125, 0.25)),
        *(fitted(variant, size) for variant in (eight_bit(r), eight_bit(r, RANDOM), *freeing)),
        rotated(better(size, ranks[-1])),
    ]
