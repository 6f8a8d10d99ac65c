"""LoQT's s: at the size's rank, and s = 16 / √(n r) at other ranks, with which one learning rate should be best for all."""

from benchmarks.compare.settings import Size, Variant
from benchmarks.compare.variants import SCALES, fitted


def variants(size: Size, device_bytes) -> list[Variant]:
    rows = [Variant(f"s = {s:g}", "loqt", {"loqt_alpha": s}, search=True, rates=rates) for s, rates in SCALES.items()]
    ranks = [max(1, size.hidden // part) for part in (16, 8, 2, 1)]
    return rows + [fitted(Variant(f"r = {r}", "loqt", {"r": r}, search=True), size) for r in ranks]
