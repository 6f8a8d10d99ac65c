"""P from the gradient of all micro-batches of an update step, or of the last few of them."""

from benchmarks.compare.settings import Size, Variant


def variants(size: Size, device_bytes) -> list[Variant]:
    of = max(size.micro_batches, 4 if size.batch < 8 else 8)
    counts = [count for count in (1, 2, 4, 8) if count <= of]
    return [
        Variant(f"P from {count} of {of}", "loqt", micro_batches=of, projection_micro_batches=count)
        for count in counts
    ]
