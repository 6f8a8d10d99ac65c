"""The update of a whole model: when gradients are captured, and the switch of all layers, over all processes.

Works on any module that holds LoQT layers, a `PeftModel` or a model with injected adapters.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..algorithm.schedule import staggered_offsets
from ..findings import Finding, report
from ..layers.layer import LoQTLayer, Projected, Switch
from ..layers.stopwatch import Stretch, mark
from ..layers.training_watch import lost_update_findings
from ..saving.base_name import report_base_name
from .optimizer_state import optimizer_findings, treat_optimizer_state


logger = logging.getLogger(__name__)

# Of `change_to_error`. Below it less than half of a change was seen to arrive in the weights, and without compensation next to
# nothing; healthy runs, whose learning rate falls to a tenth, end at 1.1 to 2.
SMALLEST_CHANGE_TO_ERROR = 1.0


@dataclass(frozen=True)
class LoQTUpdate:
    """Figures of the update of a step; norms are Frobenius norms over all layers that were updated together.

    Attributes:
        num_updates (`int`): Updates so far, this one included.
        merged_change (`float`): ‖s·PB‖ / ‖W‖ of what was merged.
        quantization_error_before (`float`): ‖W − deq(q(W))‖ / ‖W‖, before compensation.
        quantization_error_after (`float`): ‖W − deq(Q) − s·PB‖ / ‖W‖, after compensation.
        change_to_error (`float`, *optional*):
            `merged_change` / `quantization_error_after`: how what was merged compares with what was lost. `None` where nothing
            was merged, as in the first update, or nothing was lost (`quantize_weight=None`).
        gradient_energy (`float`, *optional*):
            Share of ‖G‖² that lies in the span of the (quantized) P; `None` with `projection="random"`, which needs no G.
        seconds (`float`):
            Time of the update itself: of making P, within the backward pass or after it, and of the switch of all layers. On
            an accelerator it is the device's own time, by events in its stream, without what had been queued before. Layers on
            several devices: that of the device that took longest. With several processes, exchange and waiting for the
            others are part of it.
    """

    num_updates: int
    merged_change: float
    quantization_error_before: float
    quantization_error_after: float
    gradient_energy: float | None
    seconds: float

    @property
    def change_to_error(self) -> float | None:
        if not self.merged_change or not self.quantization_error_after:
            return None
        return self.merged_change / self.quantization_error_after

    def metrics(self) -> dict[str, float]:
        """The figures that there are, under the names by which they are logged."""
        figures = {
            "loqt/updates": self.num_updates,
            "loqt/merged_change": self.merged_change,
            "loqt/quantization_error_before": self.quantization_error_before,
            "loqt/quantization_error_after": self.quantization_error_after,
            "loqt/change_to_error": self.change_to_error,
            "loqt/gradient_energy": self.gradient_energy,
            "loqt/seconds": self.seconds,
        }
        return {name: figure for name, figure in figures.items() if figure is not None}


def loqt_layers(model: nn.Module) -> Iterator[tuple[str, LoQTLayer]]:
    """All LoQT layers of a model, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoQTLayer))


def active_layers(model: nn.Module) -> tuple[str | None, list[tuple[str, LoQTLayer]]]:
    """The adapter that trains, and its layers; `(None, [])` if there is none.

    Raises:
        ValueError: If several LoQT adapters train at once: their changes to W could not be told apart.
    """
    return _active(list(loqt_layers(model)))


def _active(layers: list[tuple[str, LoQTLayer]]) -> tuple[str | None, list[tuple[str, LoQTLayer]]]:
    found: dict[str, list[tuple[str, LoQTLayer]]] = {}
    for name, layer in layers:
        for adapter_name in layer.active_adapters:
            if adapter_name in layer.loqt_B and layer.loqt_B[adapter_name].requires_grad:
                found.setdefault(adapter_name, []).append((name, layer))
    if len(found) > 1:
        raise ValueError(f"Only one LoQT adapter can train at a time, but these are active: {sorted(found)}.")
    return next(iter(found.items()), (None, []))


def begin_step(model: nn.Module, step: int, is_last_backward: Callable[[], bool] | None = None) -> bool:
    """Before the first forward pass of an optimizer step: capture gradients if an update is due that needs them.

    With `projection="random"` nothing is captured, and an update step is an ordinary one up to the switch.

    Args:
        model (`nn.Module`): A model with LoQT layers.
        step (`int`): Number of optimizer steps already taken, as the Trainer's `global_step`.
        is_last_backward (`Callable`, *optional*):
            Asked within a backward pass whether it is the step's last, as `lambda: accelerator.sync_gradients` or, without
            gradient accumulation, `lambda: True`. With it the gradient of one layer is held at a time, and only sums over
            micro-batches are kept; without it, in a `torch.distributed` run, or with `update_mode="whole"`, the gradients
            of all layers whose turn it is are kept until [`end_step`].

    Returns:
        `bool`: Whether the step is an update step, by the schedule or because the last update was postponed.

    Raises:
        ValueError: If `step` is not a non-negative integer, or no LoQT adapter trains, or it is merged.
    """
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step={step!r} is not allowed: the number of optimizer steps already taken.")
    layers = list(loqt_layers(model))
    # a step that was never finished left a partial gradient
    for _, layer in layers:
        layer.verify()
        layer.stop_capture()
    adapter_name, layers = _active(layers)
    if adapter_name is None:
        raise ValueError("No LoQT adapter of this model is active and trainable.")
    if any(layer.merged for _, layer in layers):
        raise ValueError(
            f"Adapter {adapter_name!r} is merged and does not train. Call `model.unmerge_adapter()` first."
        )
    if step == 0:
        report_base_name(model)
    config = layers[0][1].config[adapter_name]
    # processes must average before anything is made of a gradient
    in_backward = config.update_mode != "whole" and not _is_distributed()
    offload = config.update_mode != "whole" if config.offload_gradients is None else config.offload_gradients
    due = _due(layers, adapter_name, step)
    for _, layer in layers:
        layer.watch.attend(True)
    for _, layer in due:
        layer.start_capture(adapter_name, offload, is_last_backward if in_backward else None)
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
        layer.stop_capture()
        layer.watch.attend(False)


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
    layers = [(name, layer) for name, layer in layers if layer.update_due]
    if not layers:
        return None
    config = layers[0][1].config[adapter_name]
    needs_gradient = layers[0][1].needs_gradient(adapter_name)
    skipped = bool(getattr(optimizer, "step_was_skipped", False))
    broken = _not_finite(layers, adapter_name)
    if skipped or broken:
        if broken and not skipped and not layers[0][1].update_pending(adapter_name):
            what = "gradient" if needs_gradient else "matrix B"
            warnings.warn(
                f"The {what} of {broken} of {len(layers)} LoQT layers is not finite; the update is postponed to the next "
                f"step with a finite {what}. Nothing was changed.",
                stacklevel=2,
            )
        for _, layer in layers:
            layer.set_update_pending(adapter_name)
        cancel_step(model)
        return None

    _report_once(model, optimizer_findings(layers, adapter_name, optimizer))
    projected = [layer.projected for _, layer in layers]
    devices = {layer.loqt_P[adapter_name].device for _, layer in layers}
    starts = {device: mark(device) for device in devices}
    for _, layer in layers:
        # it belongs to the old P, and the switch needs the room
        layer.loqt_B[adapter_name].grad = None
    statistics = []
    for layer, switch in _switches([layer for _, layer in layers], adapter_name):
        P_old = layer.projection(adapter_name) if config.optimizer_state == "rotate" else None
        layer.write_switch(adapter_name, switch)
        statistics.append(switch.statistics)
        if optimizer is not None:
            treat_optimizer_state(layer, adapter_name, optimizer, P_old)
    work = [(device, Stretch(start, mark(device))) for device, start in starts.items()]
    work += [(made.energies.device, made.work) for made in projected if made is not None and made.work is not None]
    # the host waits for the devices once
    device = statistics[0].device
    by_layer = torch.stack([value.to(device, non_blocking=True) for value in statistics]).tolist()
    if needs_gradient:
        _warn_without_gradient(model, [name for (name, _), row in zip(layers, by_layer, strict=True) if not row[5]])

    num_updates = layers[0][1].num_updates(adapter_name)
    record_updates(model, adapter_name)
    change, weight, before, after, captured, gradient = (sum(column) for column in zip(*by_layer, strict=True))
    energy = captured / gradient if gradient else 0.0
    update = LoQTUpdate(
        num_updates=num_updates,
        merged_change=(change / weight) ** 0.5 if weight else 0.0,
        quantization_error_before=(before / weight) ** 0.5 if weight else 0.0,
        quantization_error_after=(after / weight) ** 0.5 if weight else 0.0,
        gradient_energy=energy if needs_gradient else None,
        seconds=_seconds(work),
    )
    _report_once(model, noise_findings(update, config.error_feedback))
    return update


def _seconds(work: list[tuple[torch.device, Stretch]]) -> float:
    by_device: dict[torch.device, float] = {}
    for device, stretch in work:
        by_device[device] = by_device.get(device, 0.0) + stretch.seconds()
    return max(by_device.values())


def noise_findings(update: LoQTUpdate, error_feedback: bool) -> list[Finding]:
    """Whether what an update has merged is lost in what quantization makes of it.

    Args:
        update ([`LoQTUpdate`]): What it did.
        error_feedback (`bool`): Whether what was lost is kept, and merged later.
    """
    ratio = update.change_to_error
    if ratio is None or ratio >= SMALLEST_CHANGE_TO_ERROR or error_feedback:
        return []
    return [
        Finding(
            "warning",
            "change_lost_in_quantization",
            f"Update {update.num_updates} merged a change of {update.merged_change:.3g} of the weights' norm, and quantizing "
            f"them lost {update.quantization_error_after:.3g}, which is more (change_to_error={ratio:.2f}): little of what "
            "was learned arrives in the weights.",
            "A higher learning rate or loqt_alpha, a longer update_interval, or error_feedback=True helps.",
        )
    ]


def _report_once(model: nn.Module, findings: list[Finding]) -> None:
    """Errors always, of each kind of warning the first."""
    told = model.__dict__.setdefault("_loqt_told", set())
    report([finding for finding in findings if finding.severity == "error" or finding.code not in told], stacklevel=3)
    told.update(finding.code for finding in findings)


def record_updates(model: nn.Module, adapter_name: str) -> None:
    """Make the adapter's config say how many updates its layers have been through.

    The config is that of the model's `peft_config`, whatever wraps it.
    """
    layers = [layer for _, layer in loqt_layers(model) if adapter_name in layer.config]
    if layers:
        layers[0].config[adapter_name].num_updates = max(layer.num_updates(adapter_name) for layer in layers)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _not_finite(layers: list[tuple[str, LoQTLayer]], adapter_name: str) -> int:
    """Number of layers that an update would break, on any process."""
    device = layers[0][1].loqt_P[adapter_name].device
    broken = torch.zeros(len(layers), dtype=torch.float32, device=device)
    for index, (_, layer) in enumerate(layers):
        if (finite := layer.is_finite) is not None:
            broken[index] = (~finite).to(device, torch.float32)
    if _is_distributed():
        dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    return int(broken.sum().item())


def _switches(layers: list[LoQTLayer], adapter_name: str) -> Iterator[tuple[LoQTLayer, Switch]]:
    """The layers' new states in turn, the same bits on every process.

    Each layer has one process that averages its gradient, computes the switch and broadcasts it: the work is divided, and
    processes on unlike hardware cannot drift apart. Each process has a layer of every group, and nobody waits for another
    one's work but at the end of a group; so much is held at a time.
    """
    if not _is_distributed():
        for layer in layers:
            yield layer, _switch(layer, adapter_name, *_take_capture(layer, adapter_name))
        return
    size = dist.get_world_size()
    for start in range(0, len(layers), size):
        group = layers[start : start + size]
        yield from zip(group, _switches_of_group(group, adapter_name), strict=True)


def _switches_of_group(group: list[LoQTLayer], adapter_name: str) -> list[Switch]:
    """The new states of as many layers as there are processes, or fewer; the first one is the work of process 0."""
    # all sums, then the own work, then all broadcasts: a process that waits in between would work after the others
    own = None
    for owner, layer in enumerate(group):
        gradient, projected = _take_capture(layer, adapter_name)
        if layer.needs_gradient(adapter_name):
            if gradient is None:
                device = layer.loqt_P[adapter_name].device
                gradient = torch.zeros(layer.shape, dtype=torch.float32, device=device)
            dist.reduce(gradient, dst=owner, op=dist.ReduceOp.SUM)
            gradient.div_(dist.get_world_size())
        if dist.get_rank() == owner:
            own = layer, gradient, projected
        del gradient, projected
    switches: list[Any] = [
        None if dist.get_rank() == owner else layer.empty_switch(adapter_name) for owner, layer in enumerate(group)
    ]
    if own is not None:
        layer, gradient, projected = own
        switch = _switch(layer, adapter_name, gradient, projected)
        del own, gradient, projected
        switches[dist.get_rank()] = Switch(*(None if tensor is None else tensor.contiguous() for tensor in switch))
    for owner, switch in enumerate(switches):
        for tensor in switch:
            if tensor is not None:
                dist.broadcast(tensor, src=owner)
    return switches


def _take_capture(layer: LoQTLayer, adapter_name: str) -> tuple[torch.Tensor | None, Projected | None]:
    """See `LoQTLayer.stop_capture`; the gradient is on the device of the adapter."""
    gradient, projected = layer.stop_capture()
    if gradient is not None:
        gradient = gradient.to(layer.loqt_P[adapter_name].device, non_blocking=True)
    return gradient, projected


def _switch(layer: LoQTLayer, adapter_name: str, gradient: torch.Tensor | None, projected: Projected | None) -> Switch:
    return layer.compute_switch(adapter_name, _project(layer, adapter_name, gradient, projected))


def _project(
    layer: LoQTLayer, adapter_name: str, gradient: torch.Tensor | None, projected: Projected | None
) -> Projected:
    """The layer's new projection: drawn, of this gradient, or the one that the backward pass has left."""
    if not layer.needs_gradient(adapter_name):
        return layer.draw_projection(adapter_name)
    if gradient is not None:
        return layer.project_gradient(adapter_name, gradient)
    assert projected is not None
    return projected


def _warn_without_gradient(model: nn.Module, names: list[str]) -> None:
    warned = model.__dict__.setdefault("_loqt_warned_without_gradient", set())
    names = [name for name in names if name not in warned]
    if names:
        warned.update(names)
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(
            f"The gradient of {shown} is zero on an update step (a module that did not run, or a frozen path). The layer "
            "keeps its projection P; what it had learned was merged.",
            stacklevel=3,
        )
