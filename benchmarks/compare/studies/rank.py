"""Ranks at one s, each at the best of its learning rates."""

from benchmarks.compare.settings import Size, Variant


def variants(size: Size, device_bytes) -> list[Variant]:
    ranks = [max(1, size.hidden // part) for part in (16, 8, 4, 2)]
    return [Variant(f"r = {r}", "loqt", {"r": r}, search=True) for r in ranks]
