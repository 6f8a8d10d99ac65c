"""What a run depends on: model sizes, methods with their settings and learning rates, and the rows of a study.

A run is a *spec*: a dictionary of everything that its result depends on. Two runs with the same spec are the same run,
whichever study asks for it.
"""

import hashlib
import json
from dataclasses import dataclass, field

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
        rest_rate (`float`, *optional*):
            Embeddings, norms and head, which train at full rank in every method, do so at so many times the learning rate.
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
    rest_rate: float | None = None


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
        # its place and its name in the finished runs
        "candidate": {"name": "rate_of_the_rest", "factor": variant.rest_rate} if variant.rest_rate else None,
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
