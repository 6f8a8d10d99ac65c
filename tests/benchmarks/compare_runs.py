"""Tiny runs of the comparison, made up or trained, that its tests share."""

import math
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from benchmarks.common import llama
from benchmarks.compare import measures, training
from benchmarks.compare.plan import Plan
from benchmarks.compare.settings import SIZES, key_of, make_spec
from benchmarks.compare.variants import LOQT, METHODS


TINY = SIZES["tiny"]
BY_METHOD = {variant.method: variant for variant in METHODS}


def tiny_spec(variant=LOQT, lr=0.003, seed=0, steps=3):
    return make_spec(variant, "tiny", lr, seed, steps, "text", "float32", "cpu")


def tokens(blocks, seed=0):
    return torch.randint(TINY.vocabulary, (blocks, TINY.length), generator=torch.Generator().manual_seed(seed))


def tiny_model():
    return llama(TINY.hidden, TINY.layers, TINY.intermediate, TINY.vocabulary, heads=TINY.heads, positions=TINY.length)


def run_tiny(spec, blocks=40):
    return training.run(spec, tokens(blocks), tokens(16, seed=1))


def trained_model(spec):
    """The model of a run, and its result."""
    trained = {}

    class Keep(measures.ByteCounter):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            super().on_train_end(args, state, control, model=model, **kwargs)
            trained["model"] = model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "ByteCounter", Keep)
        found = run_tiny(spec)
    return trained["model"], found


def made_up(spec, loss=None, diverged=False):
    """A result, without training: the loss is a function of the spec."""
    loss = len(key_of(spec)) + int(key_of(spec), 16) % 1000 / 1000 if loss is None else loss
    return {
        "spec": spec,
        "loss": None if diverged else loss,
        "perplexity": None if diverged else math.exp(loss),
        "diverged": diverged,
        "steps": spec["steps"],
        "curve": [[1, loss + 1], [spec["steps"], loss]],
        "updates": [
            {
                "step": step,
                **dict.fromkeys(training.UPDATE_FIGURES, 0.1),
                "loss_before": 5.0,
                "loss_after": 5.0 + step / 8 * (1 + spec["seed"]),
            }
            for step in (1, 2, 6)
        ],
        "bytes": {"weights": 1000, "gradients": 200, "optimizer": 30, "host": 4},
        "tokens_per_second": 100.0 + spec["seed"],
        "seconds": 1.0,
        "epochs": 0.5,
        "batches": str(spec["seed"]),
        "versions": {"python": "3"},
        "machine": {"processor": "p", "cores": 2, "threads": 1, "device": "cpu"},
    }


class Inline:
    """Workers that run in this process, at once, and note what they ran."""

    def __init__(self, answer=made_up):
        self.answer = answer
        self.specs = []

    def submit(self, spec):
        self.specs.append(spec)
        future = Future()
        try:
            future.set_result(self.answer(spec))
        except Exception as error:
            future.set_exception(error)
        return future

    def log(self, spec):
        return Path("no such log")

    def close(self, now=False):
        pass


def plan_of(variants, seeds=(0, 1, 2), rates=(0.001, 0.002, 0.004), steps=10):
    def spec(variant, rate, seed):
        return tiny_spec(variant, rate, seed, steps)

    return Plan("methods", list(variants), spec, list(seeds), rates, "tiny", steps)
