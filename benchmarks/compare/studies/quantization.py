"""What 4 bits cost: W and P quantized, one of them, neither."""

from benchmarks.compare.settings import Size, Variant


def variants(size: Size, device_bytes) -> list[Variant]:
    return [
        Variant("W and P quantized", "loqt"),
        Variant("W only", "loqt", {"quantize_projection": None}),
        Variant("P only", "loqt", {"quantize_weight": None}),
        Variant("neither", "loqt-nq"),
    ]
