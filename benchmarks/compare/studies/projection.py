"""The ways to get P."""

from benchmarks.compare.settings import Size, Variant


def variants(size: Size, device_bytes) -> list[Variant]:
    # other directions, another gap: their learning rates are not those of singular vectors
    rare = {"update_interval": 500}
    return [
        *(Variant(f"`{way}`", "loqt", {"projection": way}) for way in ("svd", "eigh", "randomized")),
        Variant("`random`", "loqt", {"projection": "random"}, search=True),
        Variant("`random`, gap 500", "loqt", {"projection": "random", **rare}, search=True),
        Variant("`svd`, gap 500", "loqt", rare, search=True),
    ]
