"""The numbers of "What fits my GPU": predictions of `loqt_peft.estimate_memory`, made when the site is built.

The page computes nothing of its own: every number in it is one of these, in steps of 10 MB as `loqt estimate` prints them.
"""

from __future__ import annotations

import array
import base64
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from loqt_peft.memory import estimate_memory
from loqt_peft.memory.options import MemoryOptions
from loqt_peft.memory.recommend import command, training_code
from loqt_peft.memory.shape import load_config


DOCS = Path(__file__).parents[1]
CONFIGS = DOCS.parent / "examples" / "pretraining" / "configs"
# name on the page -> the file that is read, and what the command line takes
MODELS = {
    "Llama-3.2-1B": (DOCS / "models" / "llama-3.2-1b.json", "meta-llama/Llama-3.2-1B"),
    "Llama-3.1-8B": (DOCS / "models" / "llama-3.1-8b.json", "meta-llama/Llama-3.1-8B"),
    "Mistral-7B": (DOCS / "models" / "mistral-7b.json", "mistralai/Mistral-7B-v0.1"),
    "Qwen2.5-7B": (DOCS / "models" / "qwen2.5-7b.json", "Qwen/Qwen2.5-7B"),
    **{
        f"LLaMA {size.upper()} (paper)": (
            CONFIGS / f"llama_{size}.json",
            f"examples/pretraining/configs/llama_{size}.json",
        )
        for size in ("130m", "350m", "1b", "7b", "13b")
    },
}
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 141)
METHODS = {"loqt": "LoQT", "qlora": "QLoRA", "galore": "GaLore", "full": "full rank"}
PHASES = ("load", "forward", "backward", "optimizer", "update step")
SEQUENCES = (256, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8)
# one micro-batch a step, or more: how many more makes no difference on the device
ACCUMULATION = (1, 4)
# of the hidden size
RANKS = (2, 4, 8, 16)
LARGEST_TOKENS = 8192
UNIT = 10**7


def axes(method: str) -> dict[str, tuple]:
    """The options that vary, outermost first."""
    found = {"sequence_length": SEQUENCES, "batch_size": BATCHES, "gradient_accumulation_steps": ACCUMULATION}
    if method != "full":
        found["rank"] = RANKS
    found |= {"optimizer": ("adamw", "adamw_8bit"), "gradient_checkpointing": (False, True)}
    if method in ("loqt", "full"):
        found["per_layer"] = (False, True)
    return found


def settings(method: str, hidden: int) -> Iterator[dict[str, Any]]:
    """All settings of a method, in the order in which their numbers lie in the data."""
    names = axes(method)
    for values in itertools.product(*names.values()):
        setting = {"method": method, **dict(zip(names, values, strict=True))}
        if "rank" in setting:
            setting["rank"] = hidden // setting["rank"]
        if method in ("loqt", "qlora"):
            setting["double_quant"] = True
        yield setting


def record(config: Any, setting: dict[str, Any]) -> list[int]:
    """Peaks of the phases and what a device should have, in units of 10 MB; zeros where there are too many tokens."""
    if setting["sequence_length"] * setting["batch_size"] > LARGEST_TOKENS:
        return [0] * (len(PHASES) + 1)
    estimate = estimate_memory(config, levers=False, **setting)
    peaks = [round(sum(estimate.phases.get(phase, {}).values()) / UNIT) for phase in PHASES]
    return [*peaks, math.ceil(estimate.required / UNIT)]


def code_templates() -> dict[str, str]:
    """Code to copy by optimizer, checkpointing and per-layer updates; numbers that the page fills in are @RANK@ and so on."""
    numbers = {"rank": 1111, "batch_size": 2222, "gradient_accumulation_steps": 3333}
    found = {}
    for optimizer, checkpointing, per_layer in itertools.product(
        ("adamw", "adamw_8bit"), (False, True), (False, True)
    ):
        options = MemoryOptions(
            optimizer=optimizer,
            gradient_checkpointing=checkpointing,
            per_layer=per_layer,
            double_quant=True,
            **numbers,
        )
        code = training_code(options)
        line = command("@MODEL@", replace(options, sequence_length=4444), "@CARD@GiB")
        text = f"{line}\n\n{code}".replace("4444", "@SEQUENCE@")
        for name, number in numbers.items():
            text = text.replace(str(number), f"@{name.upper()}@")
        found[f"{optimizer} {int(checkpointing)} {int(per_layer)}"] = text.replace("'@MODEL@'", "@MODEL@")
    return found


def build_data(models: dict[str, tuple[Path, str]] | None = None) -> dict[str, Any]:
    """Everything that the page knows."""
    found = {}
    for name, (path, on_command_line) in (MODELS if models is None else models).items():
        config, _ = load_config(path)
        values = {}
        for method in METHODS:
            numbers = array.array("H")
            for setting in settings(method, config.hidden_size):
                numbers.extend(record(config, setting))
            if sys.byteorder == "big":
                numbers.byteswap()
            values[method] = base64.b64encode(numbers.tobytes()).decode()
        found[name] = {"model": on_command_line, "hidden": config.hidden_size, "values": values}
    return {
        "models": found,
        "cards": CARDS,
        "methods": METHODS,
        "phases": PHASES,
        "axes": {method: axes(method) for method in METHODS},
        "largestTokens": LARGEST_TOKENS,
        "code": code_templates(),
    }


def lookup(data: dict[str, Any], model: str, setting: dict[str, Any]) -> dict[str, float]:
    """What the page shows of a setting, in GB: its phases, and `required`. `rank` is the divisor of the hidden size.

    Args:
        data: Of [`build_data`].
        model (`str`): Its name on the page.
        setting: `method`, and the options of its axes.
    """
    index = 0
    for name, values in data["axes"][setting["method"]].items():
        index = index * len(values) + values.index(setting[name])
    numbers = array.array("H", base64.b64decode(data["models"][model]["values"][setting["method"]]))
    if sys.byteorder == "big":
        numbers.byteswap()
    size = len(data["phases"]) + 1
    found = numbers[index * size : (index + 1) * size]
    return {name: value / 100 for name, value in zip([*data["phases"], "required"], found, strict=True)}
