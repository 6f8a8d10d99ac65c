"""The update of a whole model: whether one is due at a step, what is captured for it, and the switch of all its layers.

Works on any module that holds LoQT layers, a `PeftModel` or a model with injected adapters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ..algorithm.schedule import staggered_offsets
from ..findings import LoQTWarning, report, report_once
from ..layers.find import active_layers, active_of, loqt_layers
from ..layers.layer import LoQTLayer
from ..layers.stopwatch import Stretch, mark
from ..layers.training_watch import lost_update_findings
from ..patience import patiently
from ..saving.base_name import report_base_name
from .agreement import require_agreement
from .distributed import is_distributed, not_finite, switches
from .figures import LoQTUpdate, figures_of, noise_findings
from .optimizer_state import optimizer_findings, treat_optimizer_state
from .reduction import GradientReduction
from .sharding import reshard, unprepared_findings
from .switching import project_gradient, write_switch


def begin_step(model: nn.Module, step: int, is_last_backward: Callable[[], bool] | None = None) -> bool:
    """Before the first forward pass of an optimizer step: capture gradients if an update is due that needs them.

    With `projection="random"` nothing is captured, and an update step is an ordinary one up to the switch.

    Args:
        model (`nn.Module`): A model with LoQT layers.
        step (`int`): Number of optimizer steps already taken, as the Trainer's `global_step`.
        is_last_backward (`Callable`, *optional*):
            Asked within a backward pass whether it is the step's last, as `lambda: accelerator.sync_gradients` or, without
            gradient accumulation, `lambda: True`. With it the gradient of one layer is held at a time, and only sums over
            micro-batches are kept; without it, or with `update_mode="whole"`, the gradients of all layers whose turn it is
            are kept until [`end_step`]. In a `torch.distributed` run it is not asked: each backward pass sums the gradients
            of all processes, and each process keeps those of the layers that it owns.

    Returns:
        `bool`: Whether the step is an update step, by the schedule or because the last update was postponed.

    Raises:
        ValueError:
            If `step` is not a non-negative integer, or no LoQT adapter trains, or it is merged; if the processes of a
            `torch.distributed` run do not begin from one adapter.
    """
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step={step!r} is not allowed: the number of optimizer steps already taken.")
    layers = list(loqt_layers(model))
    # a step that was never finished left a partial gradient
    for _, layer in layers:
        layer.capture.stop()
    adapter_name, layers = active_of(layers)
    if adapter_name is None:
        raise ValueError("No LoQT adapter of this model is active and trainable.")
    if any(layer.merged for _, layer in layers):
        raise ValueError(
            f"Adapter {adapter_name!r} is merged and does not train. Call `model.unmerge_adapter()` first."
        )
    if step == 0:
        report_base_name(model)
    report(unprepared_findings(layer for _, layer in layers))
    for _, layer in layers:
        layer.verify(adapter_name)
    config = layers[0][1].config[adapter_name]
    if is_distributed():
        require_agreement(model, layers, adapter_name, step)
    # processes must average before anything is made of a gradient
    in_backward = config.update_mode != "whole" and not is_distributed()
    offload = config.update_mode != "whole" if config.offload_gradients is None else config.offload_gradients
    due = _due(layers, adapter_name, step)
    for _, layer in layers:
        layer.watch.expect_updates(True)
    needs_gradient = layers[0][1].needs_gradient(adapter_name)
    reduction = None
    if due and needs_gradient and is_distributed():
        reduction = GradientReduction([layer for _, layer in due], adapter_name, offload)
    for _, layer in due:
        project = partial(project_gradient, layer, adapter_name) if needs_gradient else None
        layer.capture.start(adapter_name, project, offload, is_last_backward if in_backward else None, reduction)
    return bool(due)


def _due(layers: list[tuple[str, LoQTLayer]], adapter_name: str, step: int) -> list[tuple[str, LoQTLayer]]:
    """The layers of which an update is due at `step`, or was postponed."""
    config = layers[0][1].config[adapter_name]
    schedule = config.schedule
    if config.update_mode == "stagger":
        offsets = staggered_offsets([name for name, _ in layers], schedule.smallest_gap)
    else:
        offsets = [0] * len(layers)
    is_due = {offset: step >= offset and schedule.is_update_step(step - offset) for offset in set(offsets)}
    due, passed = [], []
    for offset, (name, layer) in zip(offsets, layers, strict=True):
        if is_due[offset] or layer.update_pending(adapter_name):
            due.append((name, layer))
        elif step > offset:
            passed.append(layer)
    report(lost_update_findings(passed, adapter_name, step), stacklevel=4)
    return due


def cancel_step(model: nn.Module) -> None:
    """Drop whatever was captured."""
    for _, layer in loqt_layers(model):
        layer.capture.stop()
        layer.watch.expect_updates(False)


@torch.no_grad()
def end_step(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> LoQTUpdate | None:
    """After `optimizer.step()` and before `optimizer.zero_grad()`: update, if [`begin_step`] found one due.

    The update is postponed to the next step if the optimizer skipped this one (fp16 overflow) or if a gradient, or with
    `projection="random"` B, is not finite. In a `torch.distributed` run all processes must call this.

    Args:
        model (`nn.Module`): The model given to [`begin_step`].
        optimizer (`torch.optim.Optimizer`, *optional*):
            Holder of B's state: needed with `optimizer_state` `"reset"` and `"rotate"`, and if it keeps a copy of B.

    Returns:
        [`LoQTUpdate`] or `None`: The figures of the update, if there was one.

    Raises:
        ValueError:
            Before anything is changed: if what the optimizer keeps of B cannot be treated as `optimizer_state` says (see
            [`loqt_peft.training.optimizer_state.optimizer_findings`]).
    """
    adapter_name, layers = active_layers(model)
    layers = [(name, layer) for name, layer in layers if layer.capture.adapter_name is not None]
    if not layers:
        return None
    if (reduction := layers[0][1].capture.reduction) is not None:
        reduction.finish()
    if _is_postponed(layers, adapter_name, optimizer):
        for _, layer in layers:
            layer.updates.postpone(adapter_name)
        cancel_step(model)
        return None

    reshard(model)
    report_once(model, optimizer_findings(layers, adapter_name, optimizer))
    config = layers[0][1].config[adapter_name]
    work = [layer.capture.work for _, layer in layers if layer.capture.work is not None]
    starts = {device: mark(device) for device in {layer.compute_device for _, layer in layers}}
    for _, layer in layers:
        # it belongs to the old P, and the switch needs the room
        layer.loqt_B[adapter_name].grad = None
    by_layer = {}
    for layer, switch in patiently(switches([layer for _, layer in layers], adapter_name), "LoQT update", len(layers)):
        P_old = layer.projection(adapter_name) if config.optimizer_state == "rotate" else None
        write_switch(layer, adapter_name, switch)
        by_layer[layer] = switch.statistics
        if optimizer is not None:
            treat_optimizer_state(layer, adapter_name, optimizer, P_old)
    work += [(device, Stretch(start, mark(device))) for device, start in starts.items()]
    record_updates(model, adapter_name)
    # the host waits for the devices once
    device = by_layer[layers[0][1]].device
    statistics = torch.stack([by_layer[layer].to(device, non_blocking=True) for _, layer in layers]).tolist()
    needs_gradient = layers[0][1].needs_gradient(adapter_name)
    if needs_gradient:
        _warn_without_gradient(model, [name for (name, _), row in zip(layers, statistics, strict=True) if not row[5]])
    update = figures_of(statistics, layers[0][1].num_updates(adapter_name), needs_gradient, work)
    report_once(model, noise_findings(update, config.error_feedback))
    return update


def _is_postponed(
    layers: list[tuple[str, LoQTLayer]], adapter_name: str, optimizer: torch.optim.Optimizer | None
) -> bool:
    """Whether the update has to wait, since the optimizer skipped the step or something is not finite, of which it warns."""
    skipped = bool(getattr(optimizer, "step_was_skipped", False))
    broken = not_finite(layers, adapter_name)
    if broken and not skipped and not layers[0][1].update_pending(adapter_name):
        what = "gradient" if layers[0][1].needs_gradient(adapter_name) else "matrix B"
        warnings.warn(
            f"The {what} of {broken} of {len(layers)} LoQT layers is not finite; the update is postponed to the next "
            f"step with a finite {what}. Nothing was changed.",
            LoQTWarning,
            stacklevel=3,
        )
    return skipped or broken > 0


def record_updates(model: nn.Module, adapter_name: str) -> None:
    """Make the adapter's config say how many updates its layers have been through.

    The config is that of the model's `peft_config`, whatever wraps it.
    """
    layers = [layer for _, layer in loqt_layers(model) if adapter_name in layer.config]
    if layers:
        layers[0].config[adapter_name].num_updates = max(layer.num_updates(adapter_name) for layer in layers)


def _warn_without_gradient(model: nn.Module, names: list[str]) -> None:
    warned = model.__dict__.setdefault("_loqt_warned_without_gradient", set())
    names = [name for name in names if name not in warned]
    if names:
        warned.update(names)
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(
            f"The gradient of {shown} is zero on an update step (a module that did not run, or a frozen path). The layer "
            "keeps its projection P; what it had learned was merged.",
            LoQTWarning,
            stacklevel=3,
        )
