"""Notices training that nobody asks updates for: P then stays empty and B learns nothing, or what B learns is never merged."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.weak import WeakTensorKeyDictionary

from ..findings import Finding, report


HOW_TO_UPDATE = (
    "Pass `callbacks=[LoQTTrainerCallback()]` to the Trainer, or call `model.begin_step(step)` and "
    "`model.end_step(optimizer)` in your own loop."
)

# the B that are watched
_watched = WeakTensorKeyDictionary()


class TrainingWatch:
    """What a LoQT layer has seen of training.

    It goes by the gradients of B, since optimizers leave no mark on a parameter that all of them would leave.

    Attributes:
        expects_updates (`bool`): Whether somebody asks for updates: [`begin_step`] was called, and the training has not ended.
        trained (`set[str]`): Adapters of which B had a gradient.
        without_updates (`set[str]`): Those of which B had one while nobody asked for updates.
    """

    def __init__(self) -> None:
        self.expects_updates = False
        self.trained: set[str] = set()
        self.without_updates: set[str] = set()
        self._told: set[str] = set()
        self._runs_eagerly = False

    def expect_updates(self, expected: bool) -> None:
        self.expects_updates = expected
        if expected:
            self.without_updates.clear()

    def observe(self, layer: BaseTunerLayer, adapter_name: str) -> None:
        """See the gradients of the adapter's B from now on."""
        B = layer.loqt_B[adapter_name]
        if B in _watched or not B.requires_grad:
            return
        reference = weakref.ref(layer)

        def on_gradient(_: torch.Tensor) -> None:
            layer = reference()
            if layer is not None:
                layer.watch.on_gradient(layer, adapter_name)

        B.register_hook(on_gradient)
        _watched[B] = True

    def on_gradient(self, layer: BaseTunerLayer, adapter_name: str) -> None:
        """B has got a gradient."""
        self.trained.add(adapter_name)
        if self.expects_updates:
            return
        if adapter_name in self.without_updates and not self._runs_eagerly:
            # no code of ours runs in the forward pass of a compiled model
            self._report(layer, adapter_name)
        self.without_updates.add(adapter_name)

    def on_forward(self, layer: BaseTunerLayer, adapter_name: str) -> None:
        """In training, with gradients: warn if there was a backward pass already that nobody asked an update after."""
        self._runs_eagerly = True
        if not self.expects_updates:
            self.observe(layer, adapter_name)
            if adapter_name in self.without_updates:
                self._report(layer, adapter_name)

    def _report(self, layer: BaseTunerLayer, adapter_name: str) -> None:
        if adapter_name not in self._told:
            self._told.add(adapter_name)
            report(missing_updates_findings(layer, adapter_name), stacklevel=4)


def missing_updates_findings(layer: BaseTunerLayer, adapter_name: str) -> list[Finding]:
    """Whether one layer is trained while nobody asks for updates."""
    if adapter_name not in layer.watch.without_updates:
        return []
    updates = layer.num_updates(adapter_name)
    if updates:
        return [
            Finding(
                "warning",
                "no_further_updates",
                f"The LoQT adapter {adapter_name!r} has been through {updates} updates and trains on, but nobody asks for "
                "further ones: B learns within its present subspace only, and is not merged.",
                HOW_TO_UPDATE,
            )
        ]
    # a random adapter has a P that nobody made
    if not layer.config[adapter_name].init_weights:
        return []
    return [
        Finding(
            "warning",
            "no_updates",
            f"The projection P of the LoQT adapter {adapter_name!r} is still empty after a backward pass in training, so B "
            "cannot learn.",
            HOW_TO_UPDATE,
        )
    ]


def never_updated_findings(layers: Iterable[BaseTunerLayer], adapter_name: str) -> list[Finding]:
    """Whether an adapter was trained, but has learned nothing, since not one update came by."""
    layers = list(layers)
    learned = any(
        layer.num_updates(adapter_name)
        or layer.update_pending(adapter_name)
        or not layer.config[adapter_name].init_weights
        for layer in layers
    )
    if learned or not any(adapter_name in layer.watch.trained for layer in layers):
        return []
    return [
        Finding(
            "warning",
            "saved_without_updates",
            f"The LoQT adapter {adapter_name!r} was trained, but has learned nothing: its projection P was never filled, so B "
            "is still zero.",
            f"{HOW_TO_UPDATE} Then train again.",
        )
    ]


def lost_update_findings(layers: Iterable[BaseTunerLayer], adapter_name: str, step: int) -> list[Finding]:
    """Whether the first update of layers is missing, though its step has gone by.

    Args:
        layers: Those of which no update is due at `step`, though their first one was due before.
        adapter_name (`str`): The adapter that trains.
        step (`int`): Number of optimizer steps already taken.
    """
    missing = [
        layer for layer in layers if layer.config[adapter_name].init_weights and not layer.num_updates(adapter_name)
    ]
    if not missing:
        return []
    return [
        Finding(
            "warning",
            "first_update_missing",
            f"At step {step} the projection P of {len(missing)} layers of the LoQT adapter {adapter_name!r} is empty, and no "
            "update is due, so B cannot learn: the update of the first step was not carried out.",
            "Begin with step 0, and call `model.end_step(optimizer)` between `optimizer.step()` and `optimizer.zero_grad()`.",
        )
    ]
