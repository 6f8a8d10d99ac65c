"""The number of compensation steps K, and error feedback: from random weights, with frequent updates, from a trained base."""

from benchmarks.compare.settings import Size, Variant
from benchmarks.compare.variants import with_feedback


# with so few steps between updates, what one merges comes close to what quantizing loses
OFTEN = {"interval_schedule": "constant", "update_interval": 10}


def variants(size: Size, device_bytes) -> list[Variant]:
    # quantizing random weights loses nothing that was learned
    trained = {"base": {"steps": size.steps, "lr": 0.003}, "search": True, "rates": (0.005,)}
    return [
        *(Variant(f"K = {k}", "loqt", {"compensation_steps": k}) for k in (0, 1, 5, 10)),
        *(Variant(f"K = {k}, gap 10", "loqt", {"compensation_steps": k, **OFTEN}) for k in (0, 5)),
        Variant("not quantized, gap 10", "loqt-nq", OFTEN),
        *(Variant(f"K = {k}, trained base", "loqt", {"compensation_steps": k}, **trained) for k in (0, 1, 5, 10)),
        Variant("not quantized, trained base", "loqt-nq", **trained),
        with_feedback(Variant("K = 5, trained base", "loqt", **trained)),
        with_feedback(Variant("K = 0, trained base", "loqt", {"compensation_steps": 0}, **trained)),
    ]
