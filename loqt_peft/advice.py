"""Which settings for which case: the one source of what README, documentation, help texts, examples and presets advise.

Nothing is imported here, so that the command line can name it at once. `python docs/tables.py` writes it into the pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Advice:
    """What to begin with in one case.

    Attributes:
        title (`str`): The case, in words.
        rank (`str`): The rank, in words.
        learning_rate (`float`): For AdamW and its 8-bit forms.
        reason (`str`): What was measured, in Markdown; links are relative to `docs/`.
        fields (`Mapping[str, Any]`): Of [`LoQTConfig`], where they differ from its defaults.
        arguments (`Mapping[str, Any]`): Of `TrainingArguments`.
        rates (`str`): The learning rate in words, where it is not one number.
        per_layer (`bool`): Whether `per_layer_optimizer` is part of what was measured.
    """

    title: str
    rank: str
    learning_rate: float
    reason: str
    fields: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    rates: str = ""
    per_layer: bool = False

    @property
    def scale(self) -> float | str:
        """`loqt_alpha`."""
        return self.fields.get("loqt_alpha", DEFAULT_SCALE)


# s of the paper for most of its models, and this package's default
DEFAULT_SCALE = 0.5
# of `loqt_alpha="auto"`: s = AUTO_CONSTANT / √(r·min(in, out))
AUTO_CONSTANT = 16

# rank, scale and compensation steps of the paper's pretraining, by model size
PAPER = {
    "60m": {"r": 128, "loqt_alpha": 0.4, "compensation_steps": 5},
    "130m": {"r": 256, "loqt_alpha": 0.5, "compensation_steps": 5},
    "350m": {"r": 256, "loqt_alpha": 0.5, "compensation_steps": 5},
    "1b": {"r": 512, "loqt_alpha": 0.25, "compensation_steps": 10},
}
# of the paper's fine-tuning of DeBERTaV3-base on GLUE; learning rates and epochs
PAPER_GLUE = {
    "cola": (8e-5, 20),
    "mnli": (1e-4, 5),
    "mrpc": (1e-4, 60),
    "qnli": (5e-5, 10),
    "qqp": (5e-5, 10),
    "rte": (5e-5, 20),
    "sst2": (5e-5, 10),
    "stsb": (1e-4, 60),
}

_GLUE = {"loqt_alpha": 2.0, "update_interval": 2400, "interval_schedule": "constant"}

CASES = {
    "pretrain": Advice(
        title="pretrain from scratch",
        rank="the largest that fits; 13/16 of the hidden size was measured",
        learning_rate=0.02,
        fields={"loqt_alpha": "auto", "optimizer_state": "rotate", "full_rank_modules": "all"},
        arguments={"optim": "adamw_bnb_8bit", "max_grad_norm": 0},
        per_layer=True,
        reason="IMDB, 1M parameters: perplexity 41.67 ± 0.41; full-rank AdamW 42.06 ± 0.28 "
        "([figures](lab-notes.md#a-better-recipe)). Measured up to 3M parameters",
    ),
    "paper": Advice(
        title="repeat the paper's pretraining",
        rank="128 (60M), 256 (130M, 350M), 512 (1B)",
        learning_rate=0.01,
        fields={"loqt_alpha": DEFAULT_SCALE, "projection": "svd", "full_rank_modules": "all"},
        reason="the paper's settings: s 0.4 (60M), 0.5 (130M, 350M) or 0.25 (1B). Here at 1M, s 0.5: 48.19 ± 0.53 "
        "([figures](lab-notes.md#figures))",
    ),
    "continue": Advice(
        title="continue or fine-tune a language model from a 4-bit base",
        rank="a quarter of the hidden size",
        learning_rate=0.01,
        fields={"loqt_alpha": "auto", "error_feedback": True},
        reason="0.9M parameters in 4 bits, another text: loss 4.561 before, 4.093 at 0.01 (0.005: 4.167, 0.02: 4.065; "
        "[table](../benchmarks/results/rates.md)). 0.3M, the same text: perplexity 47.26 (0.005: 47.42), and "
        "`error_feedback` 0.006 nats better ([figures](lab-notes.md#ablations)). Models that are trained well may want less",
    ),
    "large_encoder": Advice(
        title="fine-tune a large encoder (from 100M parameters)",
        rank="32",
        learning_rate=1e-4,
        rates="5e-5 to 1e-4, by task",
        fields={**_GLUE, "projection": "svd"},
        reason="the paper's settings for DeBERTaV3-base on GLUE, K = 5 ([by task](../examples/glue/README.md)). "
        "Not repeated here",
    ),
    "small_encoder": Advice(
        title="fine-tune a small encoder",
        rank="32",
        learning_rate=2e-4,
        fields={**_GLUE, "projection": "random"},
        reason="MiniLM on CoLA: training loss 0.517; with singular vectors 0.536 to 0.570, LoRA 0.522 "
        "([figures](../examples/glue/README.md#minilm))",
    ),
    "align": Advice(
        title="align (DPO, KTO, GRPO)",
        rank="a quarter of the hidden size",
        learning_rate=0.001,
        fields={"loqt_alpha": "auto"},
        reason="DPO, 0.9M parameters in 4 bits, 64 steps: right on 98% of held-out pairs at each rate from 0.0002 to 0.005, "
        "an easy task; so a low one, that stays near the reference ([table](../benchmarks/results/rates.md))",
    ),
}


def allowed_pairs() -> set[tuple[float | str, float]]:
    """Every pair of scale and learning rate that some case advises."""
    pairs = {(advice.scale, advice.learning_rate) for advice in CASES.values()}
    pairs |= {(recipe["loqt_alpha"], CASES["paper"].learning_rate) for recipe in PAPER.values()}
    return pairs | {(CASES["large_encoder"].scale, rate) for rate, _ in PAPER_GLUE.values()}


def table() -> str:
    """All cases as a Markdown table."""
    lines = [
        "| you want to | rank `r` | scale `loqt_alpha`, learning rate | interval, projection | optimizer | why |",
        "|---|---|---|---|---|---|",
    ]
    elsewhere = ("loqt_alpha", "update_interval", "interval_schedule", "projection")
    usual = {"update_interval": 100, "interval_schedule": "exponential", "projection": "randomized"}
    for advice in CASES.values():
        fields = {**usual, **advice.fields}
        others = [f"`{name}={value!r}`" for name, value in advice.fields.items() if name not in elsewhere]
        optimizer = f"`{advice.arguments.get('optim', 'adamw_torch')}`"
        optimizer += ", [per layer](memory.md#per-layer-updates)" if advice.per_layer else ""
        cells = (
            f"**{advice.title}**" + (f"; {', '.join(others)}" if others else ""),
            advice.rank,
            f"`{advice.scale!r}`, **{advice.rates or format(advice.learning_rate, 'g')}**",
            f"{fields['update_interval']}, {fields['interval_schedule']}; `{fields['projection']}`",
            optimizer,
            advice.reason,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
