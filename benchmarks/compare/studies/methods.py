"""Every method, each at the best of its learning rates."""

from benchmarks.compare.settings import Size, Variant
from benchmarks.compare.variants import METHODS


def variants(size: Size, device_bytes) -> list[Variant]:
    return METHODS
