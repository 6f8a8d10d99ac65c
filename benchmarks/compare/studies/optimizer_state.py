"""What becomes of B's moments at an update."""

from benchmarks.compare.settings import Size, Variant


def variants(size: Size, device_bytes) -> list[Variant]:
    return [Variant(f"`{state}`", "loqt", {"optimizer_state": state}) for state in ("keep", "reset", "rotate")]
