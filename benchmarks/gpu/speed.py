"""Tokens a second of LLaMA-1B by method, and how often a step lets the host wait for the device."""

from __future__ import annotations

import gc

import torch

from loqt_peft.config import PAPER
from loqt_peft.memory.options import MemoryOptions
from loqt_peft.memory.shape import ModelShape

from . import formulas
from .claims import at_least, at_most
from .results import Recorder
from .settings import Settings, build_model, make_optimizer, micro_batch, seconds_of, training_step


STEPS = 8
# 4-bit weights must be unpacked, which no count of products knows
UNPACKING = 0.25
# what the profiler calls a wait
WAITS = {
    "cuda": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
    "cpu": ("aten::_local_scalar_dense",),
}


def count_waits(take_step, settings: Settings) -> int:
    """Waits of the host within a step, those of the profiler included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if settings.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        take_step()
    return sum(event.name in WAITS[settings.device.type] for event in profile.events())


def predicted_ratio(config, rank: int) -> tuple[float, str]:
    """LoQT's tokens a second by full-rank AdamW's, if products were all."""
    shape = ModelShape.from_config(config, "1b")
    linears = shape.linears * shape.layers
    head = 6 * shape.vocabulary * shape.hidden
    full = formulas.training_token(linears, None, trains_weights=True) + head
    loqt = formulas.training_token(linears, rank, trains_weights=False) + head
    return full / loqt, f"products of a token, {full:.3g} by {loqt:.3g} (formulas.training_token)"


class Method:
    """A model that is trained by one method.

    Args:
        recorder ([`Recorder`]): Where figures go.
        label (`str`): Of the method.
        loqt (`bool`): Whether LoQT's calls surround a step.
        **options: Fields of `MemoryOptions`.
    """

    def __init__(self, recorder: Recorder, label: str, loqt: bool = False, **options) -> None:
        self.recorder, self.settings, self.label, self.loqt = recorder, recorder.settings, label, loqt
        config = self.settings.config("1b")
        chosen = MemoryOptions(dtype=self.settings.dtype_name, **options)
        self.model = build_model(config, chosen, self.settings.device)
        self.optimizer = make_optimizer(self.model, chosen)
        batch, length = self.settings.pick((16, 256), (2, 32))
        self.tokens = micro_batch(config, batch, length, self.settings.device)

    def step(self, number: int = 1) -> None:
        training_step(self.model, self.optimizer, self.tokens, number if self.loqt else None)

    def measure(self, moment: str = "") -> tuple[float, int]:
        """Tokens a second of ordinary steps, and waits in one."""
        seconds = seconds_of(self.step, self.settings, self.settings.pick(STEPS, 2), warm_up=2)
        speed, waits = self.tokens.numel() / seconds, count_waits(self.step, self.settings)
        self.recorder.figure(f"{self.label}{moment}", {"tokens a second": speed, "waits in a step": waits})
        return speed, waits


def speed_1b(recorder: Recorder) -> None:
    settings = recorder.settings
    rank = settings.pick(PAPER["1b"]["r"], 32)
    others = {
        "full AdamW": {"method": "full", "optimizer": "adamw"},
        "full, 8-bit AdamW, per-layer": {"method": "full", "optimizer": "adamw_8bit", "per_layer": True},
        "QLoRA": {"method": "qlora", "rank": 16, "optimizer": "adamw_8bit"},
    }
    found = {}
    for label, options in others.items():
        method = Method(recorder, label, **options)
        found[label] = method.measure()
        del method
        gc.collect()
        settings.empty_cache()

    loqt = Method(recorder, "LoQT", loqt=True, rank=rank, base="dense")
    loqt.measure(" before its first update")
    loqt.step(0)
    speed, waits = loqt.measure(" after it")

    predicted, source = predicted_ratio(settings.config("1b"), rank)
    full_speed, full_waits = found["full AdamW"]
    claim = "tokens a second of LoQT by those of full AdamW"
    recorder.claim(at_least(claim, predicted, speed / full_speed, UNPACKING, source=source))
    claim, source = "waits of the host in an ordinary step", "full AdamW, counted beside it"
    recorder.claim(at_most(claim, full_waits, waits, unit="waits", source=source))
