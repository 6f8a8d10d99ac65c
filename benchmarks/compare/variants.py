"""What the studies build their rows from: the methods, LoQT's recipes, and changes of a row.

A study is a file of `studies/` with a function `variants(size, device_bytes)`, its rows at a [`settings.Size`];
`device_bytes(variant)` counts the bytes of weights, gradients and optimizer of one of them.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from benchmarks.compare.settings import LEARNING_RATES, NAMES, Size, Variant


LOQT = Variant("LoQT", "loqt", search=True)
RANDOM = Variant(
    "random P, gap 250",
    "loqt",
    {"projection": "random", "interval_schedule": "constant", "update_interval": 250},
    search=True,
)
METHODS = [LOQT if method == "loqt" else Variant(name, method, search=True) for method, name in NAMES.items()]
# s times the rate is what moves W, the rate alone what moves everything else
SCALES = {0.125: (0.02, 0.04, 0.08), 0.25: (0.01, 0.02, 0.04), 0.5: LEARNING_RATES["loqt"], 1.0: (0.003, 0.005, 0.01)}


def named(variants: list[Variant], name: str) -> Variant:
    return next(variant for variant in variants if variant.name == name)


###############################
# A row, changed
###############################


def with_feedback(variant: Variant) -> Variant:
    """With what quantization leaves over kept on the host, and merged again at the next update."""
    return replace(variant, name=f"{variant.name}, error feedback", fields={**variant.fields, "error_feedback": True})


def scaled(variant: Variant, s: float) -> Variant:
    """LoQT with another s, and the learning rates that go with it."""
    fields = {**variant.fields, "loqt_alpha": s}
    return replace(variant, name=f"{variant.name}, s = {s:g}", fields=fields, rates=SCALES[s])


def fitted(variant: Variant, size: Size) -> Variant:
    """LoQT with s = 16 / √(n r), 3 digits, n the hidden size.

    A step of B by Adam of size η moves W by η s √(r/n), so by 16 η / n: as much at every rank, and less the wider the model.
    """
    s = round(16 / math.sqrt(size.hidden * variant.fields.get("r", size.rank)), 3)
    fields = {**variant.fields, "loqt_alpha": s}
    return replace(variant, name=f"{variant.name}, s = {s:g}", fields=fields, rates=(0.01, 0.02, 0.04))


def eight_bit(r: int, base: Variant = LOQT) -> Variant:
    """LoQT with another rank and 8-bit moments."""
    fields = {**base.fields, "r": r}
    return replace(base, name=f"{base.name}, 8-bit moments, r = {r}", fields=fields, optim="adamw_bnb_8bit")


def per_layer(variant: Variant) -> Variant:
    """With per-layer updates: no more than one gradient lies there at a time."""
    return replace(variant, name=f"{variant.name}, per-layer updates", per_layer=True)


def rotated(variant: Variant) -> Variant:
    """With B's first moments rotated into the new subspace, at the learning rate that is best without."""
    fields = {**variant.fields, "optimizer_state": "rotate"}
    return replace(variant, name=f"{variant.name}, moments rotated", fields=fields, rates=(0.02,))


def rest_at(factor: float, variant: Variant, rates: tuple[float, ...] | None = None) -> Variant:
    """With embeddings, norms and head at `factor` times the learning rate."""
    name = f"{variant.name}, the rest at {factor:g} times the rate"
    return replace(variant, name=name, rates=rates, rest_rate=factor)


###############################
# The rank that fits
###############################


def widest(variant: Callable[[int], Variant], size: Size, device_bytes: Callable[[Variant], int], limit: int) -> int:
    """The largest rank with which a variant needs no more than `limit` bytes on the device, in steps of hidden / 16."""
    # a finer search changes nothing that a table could show
    unit = max(1, size.hidden // 16)
    low, high = 1, size.hidden // unit
    while low < high:
        middle = (low + high + 1) // 2
        if device_bytes(variant(middle * unit)) <= limit:
            low = middle
        else:
            high = middle - 1
    return low * unit


def widest_per_layer(size: Size, device_bytes: Callable[[Variant], int], limit: int) -> int:
    """As [`widest`], with 8-bit moments and per-layer updates."""
    return widest(lambda r: per_layer(eight_bit(r)), size, device_bytes, limit)


def better(size: Size, r: int) -> Variant:
    """The better recipe, its moments not rotated, with the rank that its bytes allow."""
    return fitted(per_layer(eight_bit(r)), size)
