"""What is compared: model sizes, methods with their settings and learning rates, and the studies.

A run is a *spec*: a dictionary of everything that its result depends on. Two runs with the same spec are the same run,
whichever study asks for it.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from loqt_peft import LoQTConfig


@dataclass(frozen=True)
class Size:
    """A LLaMA, its batches and the rank and scale of every low-rank method at this size.

    `length` is in tokens, `batch` in sequences an optimizer step, `scale` is LoQT's s.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    batch: int
    micro_batches: int
    rank: int
    scale: float
    steps: int

    @property
    def model(self) -> dict:
        names = ("hidden", "intermediate", "layers", "heads", "vocabulary", "length")
        return {name: getattr(self, name) for name in names}


# "tiny" is for trying things out; from "300k" to "3m" only the model changes, so that their losses can be compared; the
# largest is the paper's
SIZES = {
    "tiny": Size(32, 48, 1, 2, 320, 16, 4, 1, 8, 0.5, 20),
    "300k": Size(64, 172, 4, 4, 1024, 64, 16, 1, 16, 0.5, 1000),
    "1m": Size(128, 344, 5, 4, 1024, 64, 16, 1, 32, 0.5, 1000),
    "3m": Size(192, 512, 6, 4, 1024, 64, 16, 1, 48, 0.5, 1000),
    "9m": Size(256, 688, 8, 4, 4096, 128, 64, 1, 64, 0.5, 4000),
    "60m": Size(512, 1376, 8, 8, 32000, 256, 512, 8, 128, 0.4, 10000),
}

LEARNING_RATES = {
    "full": (0.001, 0.002, 0.003, 0.01),
    "lora": (0.001, 0.002, 0.003, 0.005),
    "relora": (0.001, 0.002, 0.003, 0.005),
    "galore": (0.005, 0.01, 0.02, 0.04),
    "apollo": (0.003, 0.005, 0.01, 0.02),
    "loqt-nq": (0.003, 0.005, 0.01, 0.02),
    "loqt": (0.003, 0.005, 0.01, 0.02),
}
NAMES = {
    "full": "full-rank AdamW",
    "lora": "LoRA",
    "relora": "ReLoRA",
    "galore": "GaLore",
    "apollo": "APOLLO",
    "loqt-nq": "LoQT-nq",
    "loqt": "LoQT",
}
LOQT_FIELDS = (
    "r",
    "loqt_alpha",
    "quantize_weight",
    "quantize_projection",
    "compensation_steps",
    "update_interval",
    "interval_schedule",
    "interval_growth",
    "projection",
    "optimizer_state",
    "full_rank_modules",
)


# told apart, and hashed, as objects: two studies may have the same row
@dataclass(frozen=True, eq=False)
class Variant:
    """A row of a table: a method with its settings.

    Attributes:
        name (`str`): As the tables call it.
        method (`str`): One of `LEARNING_RATES`.
        fields (`dict`): Settings of the method that differ from its own.
        search (`bool`): Whether it gets a learning rate of its own from the grid; if not, it runs at LoQT's best.
        rates (`tuple[float]`, *optional*): Its grid, if not the method's.
        optim (`str`): The Trainer's `optim`.
        per_layer (`bool`): Whether each gradient is applied and freed inside backward, without clipping by their norm.
        micro_batches (`int`, *optional*): Of an optimizer step, if not the size's.
        projection_micro_batches (`int`, *optional*): How many of them (the last) P is computed from; `None`: all.
        base (`dict`, *optional*): Steps ("steps") and rate ("lr") of a training at full rank that comes first.
        candidate (`dict`, *optional*): A mechanism of `candidates.py`, its name and arguments.
    """

    name: str
    method: str
    fields: dict = field(default_factory=dict)
    search: bool = False
    rates: tuple[float, ...] | None = None
    optim: str | None = None
    per_layer: bool = False
    micro_batches: int | None = None
    projection_micro_batches: int | None = None
    base: dict | None = None
    candidate: dict | None = None


def method_fields(method: str, size: Size, steps: int, changes: dict) -> dict:
    """The settings of a method; LoQT's are the paper's but for rank and scale, the others' those of their authors."""
    if method.startswith("loqt"):
        quantization = {"quantize_weight": None, "quantize_projection": None} if method == "loqt-nq" else {}
        config = LoQTConfig.paper("60m", **{"r": size.rank, "loqt_alpha": size.scale, **quantization, **changes})
        # absent unless changed: the other fields, which the finished runs do not name
        return {name: getattr(config, name) for name in dict.fromkeys((*LOQT_FIELDS, *changes))}
    restart_every = max(1, steps // 4)
    own = {
        "full": {},
        "lora": {"r": size.rank, "lora_alpha": size.rank},
        # four cycles, of which each warms up for a tenth of its steps, as the whole run does
        "relora": {
            "r": size.rank,
            "lora_alpha": size.rank,
            "restart_every": restart_every,
            "restart_warmup": max(1, restart_every // 10),
        },
        "galore": {"rank": size.rank, "update_proj_gap": 200, "scale": 0.25},
        "apollo": {"rank": size.rank, "update_proj_gap": 200, "scale": 1.0},
    }[method]
    return {**own, **changes}


OPTIMIZERS = {"galore": "galore_adamw", "apollo": "apollo_adamw"}


def make_spec(variant: Variant, size: str, lr: float, seed: int, steps: int, text: str, dtype: str, device: str):
    """The run of a variant, as a dictionary that JSON can hold. `text` is the fingerprint of its token blocks."""
    sizes = SIZES[size]
    micro_batches = variant.micro_batches or sizes.micro_batches
    projection = variant.projection_micro_batches
    spec = {
        "size": size,
        "model": sizes.model,
        "batch": sizes.batch,
        "micro_batches": micro_batches,
        # that P is computed from all is the default, and the same run
        "projection_micro_batches": None if projection == micro_batches else projection,
        "method": variant.method,
        "fields": method_fields(variant.method, sizes, steps, variant.fields),
        "candidate": variant.candidate,
        "optim": variant.optim or OPTIMIZERS.get(variant.method, "adamw_torch"),
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "text": text,
        "dtype": dtype,
        "device": device,
    }
    # absent where they are not so, as from the runs before there was a choice
    if variant.per_layer:
        spec["per_layer"] = True
    if variant.base:
        spec["base"] = variant.base
    return spec


def key_of(spec: dict) -> str:
    """Identifies a run by its whole spec."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


###############################
# Studies
###############################

LOQT = Variant("LoQT", "loqt", search=True)
RANDOM = Variant(
    "random P, gap 250",
    "loqt",
    {"projection": "random", "interval_schedule": "constant", "update_interval": 250},
    search=True,
)
METHODS = [LOQT if method == "loqt" else Variant(name, method, search=True) for method, name in NAMES.items()]


def named(variants: list[Variant], name: str) -> Variant:
    return next(variant for variant in variants if variant.name == name)


def methods(size: Size, device_bytes) -> list[Variant]:
    return METHODS


def with_feedback(variant: Variant) -> Variant:
    """With what quantization leaves over kept on the host, and merged again at the next update."""
    return replace(variant, name=f"{variant.name}, error feedback", fields={**variant.fields, "error_feedback": True})


def compensation(size: Size, device_bytes) -> list[Variant]:
    # with so few steps between updates, what one merges comes close to what quantizing loses
    often = {"interval_schedule": "constant", "update_interval": 10}
    # quantizing random weights loses nothing that was learned
    trained = {"base": {"steps": size.steps, "lr": 0.003}, "search": True, "rates": (0.005,)}
    return [
        *(Variant(f"K = {k}", "loqt", {"compensation_steps": k}) for k in (0, 1, 5, 10)),
        *(Variant(f"K = {k}, gap 10", "loqt", {"compensation_steps": k, **often}) for k in (0, 5)),
        Variant("not quantized, gap 10", "loqt-nq", often),
        *(Variant(f"K = {k}, trained base", "loqt", {"compensation_steps": k}, **trained) for k in (0, 1, 5, 10)),
        Variant("not quantized, trained base", "loqt-nq", **trained),
        with_feedback(Variant("K = 5, trained base", "loqt", **trained)),
        with_feedback(Variant("K = 0, trained base", "loqt", {"compensation_steps": 0}, **trained)),
    ]


def gaps(size: Size, device_bytes) -> list[Variant]:
    def gap(kind: str, name: str, growth: float = 1.2, interval: int = 100) -> Variant:
        fields = {"update_interval": interval, "interval_schedule": kind, "interval_growth": growth}
        return Variant(name, "loqt", fields)

    return [
        gap("exponential", "growing, 100 + ⌊1.2^i⌋"),
        gap("exponential", "growing, 100 + ⌊2^i⌋", growth=2.0),
        gap("linear", "linear, 100 + ⌊1.2 i⌋"),
        gap("linear", "linear, 100 + ⌊20 i⌋", growth=20.0),
        gap("constant", "constant, 100"),
        gap("constant", "constant, 50", interval=50),
        gap("constant", "constant, 250", interval=250),
    ]


def quantization(size: Size, device_bytes) -> list[Variant]:
    return [
        Variant("W and P quantized", "loqt"),
        Variant("W only", "loqt", {"quantize_projection": None}),
        Variant("P only", "loqt", {"quantize_weight": None}),
        Variant("neither", "loqt-nq"),
    ]


def rank(size: Size, device_bytes) -> list[Variant]:
    ranks = [max(1, size.hidden // part) for part in (16, 8, 4, 2)]
    return [Variant(f"r = {r}", "loqt", {"r": r}, search=True) for r in ranks]


# s times the rate is what moves W, the rate alone what moves everything else
SCALES = {0.125: (0.02, 0.04, 0.08), 0.25: (0.01, 0.02, 0.04), 0.5: LEARNING_RATES["loqt"], 1.0: (0.003, 0.005, 0.01)}


def scale(size: Size, device_bytes) -> list[Variant]:
    rows = [Variant(f"s = {s:g}", "loqt", {"loqt_alpha": s}, search=True, rates=rates) for s, rates in SCALES.items()]
    # at other ranks: whether one learning rate is best for all of them then
    ranks = [max(1, size.hidden // part) for part in (16, 8, 2, 1)]
    return rows + [fitted(Variant(f"r = {r}", "loqt", {"r": r}, search=True), size) for r in ranks]


def scaled(variant: Variant, s: float) -> Variant:
    """LoQT with another s, and the learning rates that go with it."""
    fields = {**variant.fields, "loqt_alpha": s}
    return replace(variant, name=f"{variant.name}, s = {s:g}", fields=fields, rates=SCALES[s])


def fitted(variant: Variant, size: Size) -> Variant:
    """LoQT with s = 16 / √(n r), 3 digits, n the hidden size.

    A step of B by Adam of size η moves W by η s √(r/n), so by 16 η / n: as much at every rank, and less the wider the model.
    """
    s = round(16 / math.sqrt(size.hidden * variant.fields.get("r", size.rank)), 3)
    fields = {**variant.fields, "loqt_alpha": s}
    return replace(variant, name=f"{variant.name}, s = {s:g}", fields=fields, rates=(0.01, 0.02, 0.04))


def projection(size: Size, device_bytes) -> list[Variant]:
    ways = [Variant(f"`{way}`", "loqt", {"projection": way}) for way in ("svd", "eigh", "randomized")]
    # other directions, another gap: their learning rates are not those of singular vectors
    rare = {"update_interval": 500}
    return [
        *ways,
        Variant("`random`", "loqt", {"projection": "random"}, search=True),
        Variant("`random`, gap 500", "loqt", {"projection": "random", **rare}, search=True),
        Variant("`svd`, gap 500", "loqt", rare, search=True),
    ]


def optimizer_state(size: Size, device_bytes) -> list[Variant]:
    return [Variant(f"`{state}`", "loqt", {"optimizer_state": state}) for state in ("keep", "reset", "rotate")]


def update_mode(size: Size, device_bytes) -> list[Variant]:
    # "whole" leads to the same bits as "backward", which is the default and the paper's recipe
    return [Variant("`backward`", "loqt"), Variant("`stagger`", "loqt", {"update_mode": "stagger"})]


def micro_batches(size: Size, device_bytes) -> list[Variant]:
    of = max(size.micro_batches, 4 if size.batch < 8 else 8)
    counts = [count for count in (1, 2, 4, 8) if count <= of]
    return [
        Variant(f"P from {count} of {of}", "loqt", micro_batches=of, projection_micro_batches=count)
        for count in counts
    ]


def widest(variant: Callable[[int], Variant], size: Size, device_bytes: Callable[[Variant], int], limit: int) -> int:
    """The largest rank with which a variant needs no more than `limit` bytes on the device, in steps of hidden / 16."""
    # a finer search changes nothing that a table could show
    unit = max(1, size.hidden // 16)
    low, high = 1, size.hidden // unit
    while low < high:
        middle = (low + high + 1) // 2
        if device_bytes(variant(middle * unit)) <= limit:
            low = middle
        else:
            high = middle - 1
    return low * unit


def eight_bit(r: int, base: Variant = LOQT) -> Variant:
    """LoQT with another rank and 8-bit moments."""
    fields = {**base.fields, "r": r}
    return replace(base, name=f"{base.name}, 8-bit moments, r = {r}", fields=fields, optim="adamw_bnb_8bit")


def per_layer(variant: Variant) -> Variant:
    """With per-layer updates: no more than one gradient lies there at a time."""
    return replace(variant, name=f"{variant.name}, per-layer updates", per_layer=True)


def rotated(variant: Variant) -> Variant:
    """With B's first moments rotated into the new subspace, at the learning rate that is best without."""
    fields = {**variant.fields, "optimizer_state": "rotate"}
    return replace(variant, name=f"{variant.name}, moments rotated", fields=fields, rates=(0.02,))


def equal_bytes(size: Size, device_bytes: Callable[[Variant], int]) -> list[Variant]:
    """GaLore beside LoQT with 8-bit moments, at the largest rank whose bytes on the device are no more than GaLore's.

    LoQT's s is GaLore's scale, 0.25, and smaller where the rank is the larger one: a step of B by Adam moves W by s √(r/n).
    """
    galore = named(METHODS, NAMES["galore"])
    wide = eight_bit(widest(eight_bit, size, device_bytes, device_bytes(galore)))
    quarter = (scaled(variant, 0.25) for variant in (LOQT, eight_bit(size.rank)))
    return [galore, LOQT, *quarter, *(scaled(wide, s) for s in (0.125, 0.25))]


def widest_per_layer(size: Size, device_bytes: Callable[[Variant], int], limit: int) -> int:
    """As [`widest`], with 8-bit moments and per-layer updates."""
    return widest(lambda r: per_layer(eight_bit(r)), size, device_bytes, limit)


def better(size: Size, r: int) -> Variant:
    """The better recipe, its moments not rotated, with the rank that its bytes allow."""
    return fitted(per_layer(eight_bit(r)), size)


def recipe(size: Size, device_bytes: Callable[[Variant], int]) -> list[Variant]:
    """What might beat the paper's recipe at no more bytes on the device."""

    def loqt(name: str, candidate: str | None = None, arguments: dict | None = None, **fields) -> Variant:
        description = {"name": candidate, **(arguments or {})} if candidate else None
        return Variant(name, "loqt", fields, search=True, candidate=description)

    constant = {"interval_schedule": "constant"}
    in_turn = replace(RANDOM, name=f"{RANDOM.name}, each direction in turn", candidate={"name": "sweep"})
    muon = replace(RANDOM, name=f"{RANDOM.name}, Muon", candidate={"name": "muon"})
    aligned = loqt("random P in an aligned basis, gap 250", "aligned_basis", update_interval=250, **constant)
    turned = loqt("singular vectors in a random basis", "random_basis")
    oftener, rarer = (loqt(f"gap {gap}", update_interval=gap, **constant) for gap in (50, 250))
    limit = device_bytes(LOQT)
    r = widest(eight_bit, size, device_bytes, limit)
    # with per-layer updates for the paper's recipe too, and for the wider one alone
    limits = (device_bytes(per_layer(LOQT)), limit)
    ranks = sorted({widest_per_layer(size, device_bytes, most) for most in limits})
    freeing = [per_layer(eight_bit(r, base)) for r in ranks for base in (LOQT, RANDOM)]
    # whether directions or their basis matter, and how often they should change
    freeing += [per_layer(eight_bit(ranks[-1], base)) for base in (turned, oftener, rarer)]
    return [
        LOQT,
        loqt("random P", projection="random"),
        RANDOM,
        loqt("random P, gap 500", projection="random", update_interval=500, **constant),
        *(scaled(RANDOM, s) for s in (0.125, 0.25)),
        loqt("half of P random", "mixed", {"share": 0.5}),
        *(scaled(variant, 0.25) for variant in (rarer, turned, aligned, in_turn)),
        loqt("P of a running average", "running_average", {"decay": 0.9}),
        loqt("P by a power iteration from the old P", "warm_start"),
        loqt("moments rotated", optimizer_state="rotate"),
        with_feedback(LOQT),
        loqt("stochastic rounding", "stochastic_rounding"),
        loqt("gap 50, when it pays", "when_it_pays", {"ratio": 1.0}, update_interval=50, **constant),
        loqt("Muon for B", "muon"),
        *(scaled(muon, s) for s in (0.25, 0.5, 1.0)),
        eight_bit(r),
        eight_bit(r, RANDOM),
        *(scaled(eight_bit(r, RANDOM), s) for s in (0.125, 0.25)),
        *(fitted(variant, size) for variant in (eight_bit(r), eight_bit(r, RANDOM), *freeing)),
        rotated(better(size, ranks[-1])),
    ]


def rest(size: Size, device_bytes) -> list[Variant]:
    """Whether what trains at full rank in every method (embeddings, norms, head) wants another learning rate.

    LoQT's best rates are higher than full-rank AdamW's, and one rate is for all: some of the distance may come from there.
    """

    def at(factor: float, variant: Variant, rates: tuple[float, ...] | None = None) -> Variant:
        name = f"{variant.name}, the rest at {factor:g} times the rate"
        return replace(variant, name=name, rates=rates, candidate={"name": "rate_of_the_rest", "factor": factor})

    full, lora = (named(METHODS, NAMES[method]) for method in ("full", "lora"))
    rows = [full, *(at(factor, full, (0.0005, 0.001, 0.002, 0.003)) for factor in (3.0, 5.0))]
    rows.append(at(10.0, full, (0.001, 0.002, 0.003, 0.005)))
    # as the better recipe, without clipping
    rows.append(per_layer(at(10.0, full, (0.002, 0.003))))
    rows += [lora, *(at(factor, lora, (0.001, 0.002, 0.003)) for factor in (3.0, 10.0))]
    for variant in (LOQT, RANDOM):
        rows += [variant, at(0.3, variant), at(3.0, variant, (0.003, 0.005, 0.01))]
    return rows


def long(size: Size, device_bytes: Callable[[Variant], int]) -> list[Variant]:
    """Whether a quantized model stops learning early. Long runs are too dear for grids: rates that did well in short ones."""
    five, ten = (
        named(rest(size, device_bytes), f"full-rank AdamW, the rest at {factor} times the rate") for factor in (5, 10)
    )
    nq = named(METHODS, NAMES["loqt-nq"])
    limit = device_bytes(LOQT)
    wide = eight_bit(widest(eight_bit, size, device_bytes, limit), RANDOM)
    slow = [replace(variant, rates=(0.005,)) for variant in (nq, LOQT, RANDOM, wide)]
    fast = replace(better(size, widest_per_layer(size, device_bytes, limit)), rates=(0.02,))
    return [*(replace(full, rates=(0.001,)) for full in (five, ten)), *slow, fast]


STUDIES = {
    "methods": methods,
    "compensation": compensation,
    "gaps": gaps,
    "quantization": quantization,
    "rank": rank,
    "scale": scale,
    "projection": projection,
    "optimizer_state": optimizer_state,
    "update_mode": update_mode,
    "micro_batches": micro_batches,
    "equal_bytes": equal_bytes,
    "recipe": recipe,
    "rest": rest,
    # ten times as many steps unless told otherwise
    "long": long,
}
LONG = 10
