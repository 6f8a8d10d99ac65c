"""The steps between updates."""

from benchmarks.compare.settings import Size, Variant


def gap(kind: str, name: str, growth: float = 1.2, interval: int = 100) -> Variant:
    fields = {"update_interval": interval, "interval_schedule": kind, "interval_growth": growth}
    return Variant(name, "loqt", fields)


def variants(size: Size, device_bytes) -> list[Variant]:
    return [
        gap("exponential", "growing, 100 + ⌊1.2^i⌋"),
        gap("exponential", "growing, 100 + ⌊2^i⌋", growth=2.0),
        gap("linear", "linear, 100 + ⌊1.2 i⌋"),
        gap("linear", "linear, 100 + ⌊20 i⌋", growth=20.0),
        gap("constant", "constant, 100"),
        gap("constant", "constant, 50", interval=50),
        gap("constant", "constant, 250", interval=250),
    ]
