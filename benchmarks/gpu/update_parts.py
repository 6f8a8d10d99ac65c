"""Seconds of an update of LLaMA-7B, and where they go."""

from __future__ import annotations

import time
from contextlib import ExitStack

import torch

from loqt_peft.algorithm.projection import sketch_width
from loqt_peft.layers.find import loqt_layers
from loqt_peft.memory.options import MemoryOptions
from loqt_peft.training import distributed, update

from . import formulas
from .claims import at_least, at_most
from .kernels import products_per_second
from .results import Recorder
from .settings import Settings, build_model, make_optimizer, micro_batch, seconds_of, timed_calls, training_step


# what takes part in an update, by function
PARTS = {"project_gradient": "projection", "compute_switch": "merge and compensation", "write_switch": "write back"}
INTERVAL = 2
# passes over memory, copies and launches come on top of products and decompositions
ON_TOP = 1.0
# of what an update adds to a step, what the parts must account for
ACCOUNTED = 0.8


def decompositions(settings: Settings, smaller: int, r: int) -> float:
    """Seconds of the `qr` and the `eigh` that the projection of one layer needs."""
    width = sketch_width(r, smaller)
    thin = torch.randn(smaller, width, device=settings.device)
    gram = thin.T @ thin
    return seconds_of(lambda: torch.linalg.qr(thin), settings) + seconds_of(lambda: torch.linalg.eigh(gram), settings)


def predict(recorder: Recorder, layers: list, steps: int) -> tuple[float, str]:
    """Seconds of an update, and what they are made of."""
    settings = recorder.settings
    ranks = [(min(layer.shape), layer.r["default"]) for layer in layers]
    each = {kind: decompositions(settings, *kind) for kind in set(ranks)}
    decomposed = sum(each[kind] for kind in ranks)
    operations = formulas.update([layer.shape for layer in layers], layers[0].config["default"].r, steps)
    rate = products_per_second(settings, settings.pick(4096, 256))
    recorder.figure("qr and eigh of all layers, seconds", decomposed)
    recorder.figure("float32 products a second", rate)
    recorder.figure("products of an update, seconds by the formula", operations / rate)
    what = f"qr and eigh of {len(layers)} layers, and {operations:.3g} products (formulas.update), at measured rates"
    return decomposed + operations / rate, what


def update_parts(recorder: Recorder) -> None:
    settings = recorder.settings
    config = settings.config("7b")
    options = MemoryOptions(
        rank=settings.pick(1024, 32), optimizer="adamw_8bit", double_quant=True, dtype=settings.dtype_name
    )
    schedule = {"update_interval": INTERVAL, "interval_schedule": "constant"}
    model = build_model(config, options, settings.device, **schedule)
    optimizer = make_optimizer(model, options)
    tokens = micro_batch(config, 1, settings.pick(256, 32), settings.device)
    layers = [layer for _, layer in loqt_layers(model)]
    steps = layers[0].config["default"].compensation_steps

    def seconds_of_step(step: int) -> float:
        settings.synchronize()
        start = time.perf_counter()
        training_step(model, optimizer, tokens, step)
        settings.synchronize()
        return time.perf_counter() - start

    recorder.figure("first update step, seconds", seconds_of_step(0))
    seconds_of_step(1)
    # updates on even steps
    ordinary = min(seconds_of_step(1) for _ in range(3))
    extra = seconds_of_step(INTERVAL) - ordinary
    recorder.figure("ordinary step, seconds", ordinary)
    recorder.figure("what an update adds to a step, seconds", extra)
    predicted, source = predict(recorder, layers, steps)
    claim = "seconds that an update adds to a step"
    recorder.claim(at_most(claim, predicted, extra, ON_TOP, unit="s", source=source))

    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        for method in PARTS:
            stack.enter_context(timed_calls((update, distributed), method, settings, seconds))
        split = seconds_of_step(INTERVAL) - ordinary
    recorder.figure("the same, with a wait around each part, seconds", split)
    recorder.figure("of it, seconds", {PARTS[method]: seconds[method] for method in PARTS})
    rest = split - sum(seconds.values())
    recorder.figure("of it, dL/dW and copies to and from the host, seconds", rest)
    claim = "projection, compensation and writing back are what an update adds"
    recorder.claim(
        at_least(claim, split, sum(seconds.values()), 1 - ACCOUNTED, unit="s", source="an update, timed whole")
    )
