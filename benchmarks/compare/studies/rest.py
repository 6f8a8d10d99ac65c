"""Whether what trains at full rank in every method (embeddings, norms, head) wants another learning rate.

LoQT's best rates are higher than full-rank AdamW's, and one rate is for all: some of the distance may come from there.
"""

from benchmarks.compare.settings import NAMES, Size, Variant
from benchmarks.compare.variants import LOQT, METHODS, RANDOM, named, per_layer, rest_at


FULL, LORA = (named(METHODS, NAMES[method]) for method in ("full", "lora"))
FULL_AT_3, FULL_AT_5 = (rest_at(factor, FULL, (0.0005, 0.001, 0.002, 0.003)) for factor in (3.0, 5.0))
FULL_AT_10 = rest_at(10.0, FULL, (0.001, 0.002, 0.003, 0.005))


def variants(size: Size, device_bytes) -> list[Variant]:
    rows = [FULL, FULL_AT_3, FULL_AT_5, FULL_AT_10]
    # as the better recipe, without clipping
    rows.append(per_layer(rest_at(10.0, FULL, (0.002, 0.003))))
    rows += [LORA, *(rest_at(factor, LORA, (0.001, 0.002, 0.003)) for factor in (3.0, 10.0))]
    for variant in (LOQT, RANDOM):
        rows += [variant, rest_at(0.3, variant), rest_at(3.0, variant, (0.003, 0.005, 0.01))]
    return rows
