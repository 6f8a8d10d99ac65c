"""Memory of training LLaMA-7B and -13B, against `loqt_peft.estimate_memory`."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import Any

import torch

from loqt_peft import estimate_memory
from loqt_peft.memory import CONTEXT_BYTES, FRAGMENTATION, MemoryEstimate, required_bytes
from loqt_peft.memory.counter import StorageCounter

from .claims import at_most, equal, within
from .results import Recorder
from .settings import Settings, build_model, make_optimizer, micro_batch, training_step


ORDINARY = ("forward", "backward", "optimizer")
# the closed form is within 1.1% of the simulation; workspaces of cuBLAS and what kernels take for themselves come on top
TOLERANCE = 0.05
INTERVAL = 3


class DeviceMeter:
    """Peaks by the counters of CUDA's allocator."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @contextmanager
    def counting(self):
        yield

    def reset(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> dict[str, int]:
        """Bytes at the peak since [`reset`]: allocated, and reserved with what the context takes."""
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()
        reserved = torch.cuda.max_memory_reserved()
        return {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": reserved,
            "context_bytes": context,
        }


class HostMeter:
    """Peaks by the storages that operations create on the CPU; for the tiny form."""

    def __init__(self, settings: Settings) -> None:
        self._counter = StorageCounter("cpu")
        self._steps = 0

    def counting(self):
        return self._counter

    def reset(self) -> None:
        gc.collect()
        self._steps += 1
        self._counter.begin("tensors", self._steps)

    def peaks(self) -> dict[str, int]:
        peak = self._counter.peaks[self._steps].total
        return {"allocated_bytes": peak, "reserved_bytes": peak, "context_bytes": 0}


def predict(recorder: Recorder, config, budget: str, options: dict[str, Any]) -> tuple[MemoryEstimate, dict[str, int]]:
    """The estimate, and bytes of an ordinary and of an update step that follow from it."""
    estimate = estimate_memory(config, budget=budget, **options)
    sizes = {name: sum(held.values()) for name, held in estimate.phases.items()}
    predicted = {"ordinary": max(sizes[name] for name in ORDINARY), "update": sizes["update step"]}
    if recorder.settings.tiny:
        # there host and device are one
        predicted = {name: size + sum(estimate.host.values()) for name, size in predicted.items()}
    recorder.figure("predicted by the closed form", {f"{name}_bytes": size for name, size in predicted.items()})
    return estimate, predicted


def take_steps(recorder: Recorder, config, options) -> dict[str, dict[str, int]]:
    """Peaks of the first update, of an ordinary step after it, of a later update and of the steps after that."""
    settings = recorder.settings
    meter = (HostMeter if settings.tiny else DeviceMeter)(settings)
    kinds = {0: "first update", 2: "ordinary", INTERVAL: "later update", INTERVAL + 2: "ordinary after it"}
    found = {}
    with meter.counting():
        schedule = {"update_interval": INTERVAL, "interval_schedule": "constant"}
        model = build_model(config, options, settings.device, **schedule)
        optimizer = make_optimizer(model, options)
        tokens = micro_batch(config, options.batch_size, options.sequence_length, settings.device)
        settings.empty_cache()
        for step in range(INTERVAL + 3):
            meter.reset()
            training_step(model, optimizer, tokens, step)
            if step in kinds:
                found[kinds[step]] = meter.peaks()
                recorder.figure(kinds[step], found[kinds[step]])
    return found


def memory(recorder: Recorder, size: str, budget: str, **changes: Any) -> None:
    """Measure the setting that the estimate is asked about, and judge the estimate."""
    settings = recorder.settings
    options = {
        "rank": settings.pick(1024, 32),
        "optimizer": settings.pick("adamw_8bit", "adamw"),
        "double_quant": True,
        "dtype": settings.dtype_name,
        "sequence_length": 256,
        **changes,
    }
    if settings.tiny:
        options["sequence_length"] = options["sequence_length"] // 4
    config = settings.config(size)
    estimate, predicted = predict(recorder, config, budget, options)
    found = take_steps(recorder, config, estimate.options)

    source = "estimate_memory, closed form"
    for name, kind in (("ordinary", "ordinary"), ("update", "later update")):
        measured = found[kind]["allocated_bytes"]
        claim = f"allocated in an {name} step"
        recorder.claim(within(claim, predicted[name], measured, TOLERANCE, unit="bytes", source=source))
    first, claim = found["first update"]["allocated_bytes"], "allocated in the first update"
    recorder.claim(at_most(claim, predicted["update"], first, TOLERANCE, unit="bytes", source=source))
    worst = max(peak["reserved_bytes"] + peak["context_bytes"] for peak in found.values())
    required = required_bytes(max(predicted.values()))
    source = f"required_bytes: the peak, {FRAGMENTATION:.0%} of it, {CONTEXT_BYTES >> 20} MiB"
    recorder.claim(at_most("reserved, with the CUDA context", required, worst, unit="bytes", source=source))
    fits = worst <= estimate.budget
    recorder.claim(equal(f"fits {budget}", estimate.fits, fits, source="estimate_memory(...).fits"))


def memory_7b(recorder: Recorder) -> None:
    memory(recorder, "7b", "24GiB")


def memory_7b_long(recorder: Recorder) -> None:
    memory(recorder, "7b", "24GiB", sequence_length=1280)


def memory_13b(recorder: Recorder) -> None:
    memory(recorder, "13b", "24GiB", per_layer=True)


def memory_7b_per_layer(recorder: Recorder) -> None:
    memory(recorder, "7b", "16GiB", per_layer=True)
