"""All layers at once, or one block after the other."""

from benchmarks.compare.settings import Size, Variant


def variants(size: Size, device_bytes) -> list[Variant]:
    # "whole" leads to the same bits as "backward", which is the default and the paper's recipe
    return [Variant("`backward`", "loqt"), Variant("`stagger`", "loqt", {"update_mode": "stagger"})]
