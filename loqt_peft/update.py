"""The update of a whole model: when gradients are captured, and the switch of all layers, over all processes.

Works on any module that holds LoQT layers, a `PeftModel` or a model with injected adapters.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise
from torch import nn

from .layer import LoQTLayer, Projected, Switch
from .schedule import staggered_offsets


logger = logging.getLogger(__name__)

# keys of the first moment in the states of torch's, transformers' and bitsandbytes' optimizers
FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "state1")
# of bitsandbytes' 8-bit states
MOMENT_BLOCKSIZE = 256


@dataclass(frozen=True)
class LoQTUpdate:
    """Figures of the update of a step; norms are Frobenius norms over all layers that were updated together.

    Attributes:
        num_updates (`int`): Updates so far, this one included.
        merged_change (`float`): ‖s·PB‖ / ‖W‖ of what was merged.
        quantization_error_before (`float`): ‖W − deq(q(W))‖ / ‖W‖, before compensation.
        quantization_error_after (`float`): ‖W − deq(Q) − s·PB‖ / ‖W‖, after compensation.
        gradient_energy (`float`, *optional*):
            Share of ‖G‖² that lies in the span of the (quantized) P; `None` with `projection="random"`, which needs no G.
        seconds (`float`): Wall time of the switch; P may have been computed before, within the backward pass.
    """

    num_updates: int
    merged_change: float
    quantization_error_before: float
    quantization_error_after: float
    gradient_energy: float | None
    seconds: float

    def metrics(self) -> dict[str, float]:
        """The figures that there are, under the names by which they are logged."""
        figures = {
            "loqt/updates": self.num_updates,
            "loqt/merged_change": self.merged_change,
            "loqt/quantization_error_before": self.quantization_error_before,
            "loqt/quantization_error_after": self.quantization_error_after,
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
        layer.stop_capture()
    adapter_name, layers = _active(layers)
    if adapter_name is None:
        raise ValueError("No LoQT adapter of this model is active and trainable.")
    if any(layer.merged for _, layer in layers):
        raise ValueError(
            f"Adapter {adapter_name!r} is merged and does not train. Call `model.unmerge_adapter()` first."
        )
    config = layers[0][1].config[adapter_name]
    # processes must average before anything is made of a gradient
    in_backward = config.update_mode != "whole" and not _is_distributed()
    offload = config.update_mode != "whole" if config.offload_gradients is None else config.offload_gradients
    due = _due(layers, adapter_name, step)
    for _, layer in layers:
        layer.attend()
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
    return [
        (name, layer)
        for offset, (name, layer) in zip(offsets, layers, strict=True)
        if is_due[offset] or layer.update_pending(adapter_name)
    ]


def cancel_step(model: nn.Module) -> None:
    """Drop whatever was captured."""
    for _, layer in loqt_layers(model):
        layer.stop_capture()


@torch.no_grad()
def end_step(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> LoQTUpdate | None:
    """After `optimizer.step()` and before `optimizer.zero_grad()`: update, if [`begin_step`] found one due.

    The update is postponed to the next step if the optimizer skipped this one (fp16 overflow) or if a gradient, or with
    `projection="random"` B, is not finite. In a `torch.distributed` run all processes must call this.

    Args:
        model (`nn.Module`): The model given to [`begin_step`].
        optimizer (`torch.optim.Optimizer`, *optional*):
            Holder of B's state, for `optimizer_state` `"reset"` and `"rotate"`.

    Returns:
        [`LoQTUpdate`] or `None`: The figures of the update, if there was one.
    """
    adapter_name, layers = active_layers(model)
    layers = [(name, layer) for name, layer in layers if layer.update_due]
    if not layers:
        return None
    start = time.perf_counter()

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

    for _, layer in layers:
        # it belongs to the old P, and the switch needs the room
        layer.loqt_B[adapter_name].grad = None
    statistics = []
    for index, (_, layer) in enumerate(layers):
        switch = _switch(layer, adapter_name, index)
        P_old = layer.projection(adapter_name) if config.optimizer_state == "rotate" else None
        layer.write_switch(adapter_name, switch)
        statistics.append(switch.statistics)
        if config.optimizer_state != "keep" and optimizer is not None:
            _treat_optimizer_state(layer, adapter_name, optimizer, P_old)
    # the host waits for the devices once
    device = statistics[0].device
    by_layer = torch.stack([value.to(device, non_blocking=True) for value in statistics]).tolist()
    if needs_gradient:
        _warn_without_gradient(model, [name for (name, _), row in zip(layers, by_layer, strict=True) if not row[5]])

    num_updates = layers[0][1].num_updates(adapter_name)
    _record_updates(model, adapter_name, num_updates)
    change, weight, before, after, captured, gradient = (sum(column) for column in zip(*by_layer, strict=True))
    energy = captured / gradient if gradient else 0.0
    return LoQTUpdate(
        num_updates=num_updates,
        merged_change=(change / weight) ** 0.5 if weight else 0.0,
        quantization_error_before=(before / weight) ** 0.5 if weight else 0.0,
        quantization_error_after=(after / weight) ** 0.5 if weight else 0.0,
        gradient_energy=energy if needs_gradient else None,
        seconds=time.perf_counter() - start,
    )


def _record_updates(model: nn.Module, adapter_name: str, num_updates: int) -> None:
    # in a copy, since PEFT keeps the very config that the user passed, and he may build another model with it
    layers = [layer for _, layer in loqt_layers(model) if adapter_name in layer.config]
    config = copy.copy(layers[0].config[adapter_name])
    config.num_updates = num_updates
    for layer in layers:
        layer.config[adapter_name] = config
    if hasattr(model, "peft_config"):
        model.peft_config[adapter_name] = config


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _not_finite(layers: list[tuple[str, LoQTLayer]], adapter_name: str) -> int:
    """Number of layers that an update would break, on any process."""
    device = layers[0][1].loqt_P[adapter_name].device
    broken = torch.zeros(len(layers), device=device)
    for index, (_, layer) in enumerate(layers):
        if (finite := layer.is_finite) is not None:
            broken[index] = (~finite).to(device, torch.float32)
    if _is_distributed():
        dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    return int(broken.sum().item())


def _switch(layer: LoQTLayer, adapter_name: str, index: int) -> Switch:
    """The layer's new state, the same bits on every process.

    Each layer has one process that averages its gradient, computes the switch and broadcasts it: the work is shared, and
    processes on unlike hardware cannot drift apart.
    """
    device = layer.loqt_P[adapter_name].device
    gradient, projected = layer.stop_capture()
    if gradient is not None:
        gradient = gradient.to(device, non_blocking=True)
    if not _is_distributed():
        return layer.compute_switch(adapter_name, _project(layer, adapter_name, gradient, projected))

    owner = index % dist.get_world_size()
    if layer.needs_gradient(adapter_name):
        if gradient is None:
            gradient = torch.zeros(layer.shape, device=device)
        dist.reduce(gradient, dst=owner, op=dist.ReduceOp.SUM)
        gradient.div_(dist.get_world_size())
    if dist.get_rank() == owner:
        switch = layer.compute_switch(adapter_name, _project(layer, adapter_name, gradient, projected))
    else:
        switch = layer.empty_switch(adapter_name)
    switch = Switch(*(None if tensor is None else tensor.contiguous() for tensor in switch))
    for tensor in switch:
        if tensor is not None:
            dist.broadcast(tensor, src=owner)
    return switch


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


def _treat_optimizer_state(
    layer: LoQTLayer, adapter_name: str, optimizer: torch.optim.Optimizer, P_old: torch.Tensor | None
) -> None:
    B = layer.loqt_B[adapter_name]
    if P_old is None:
        optimizer.state.pop(B, None)
        return
    P_new = layer.projection(adapter_name)
    state = optimizer.state.get(B, {})
    for key in FIRST_MOMENTS:
        moment = state.get(key)
        if not isinstance(moment, torch.Tensor) or moment.shape != B.shape:
            continue
        # a paged state is a tensor of the host
        values = moment.to(B.device)
        in_8_bits = moment.dtype == torch.uint8
        if in_8_bits:
            values = dequantize_blockwise(
                values, absmax=state["absmax1"], code=state["qmap1"], blocksize=MOMENT_BLOCKSIZE
            )
        # old coordinates -> weight space -> new coordinates
        values = values.float() @ (P_old @ P_new.T) if layer.right else (P_new.T @ P_old) @ values.float()
        if in_8_bits:
            values, quantized = quantize_blockwise(values, code=state["qmap1"], blocksize=MOMENT_BLOCKSIZE)
            state["absmax1"].copy_(quantized.absmax)
        moment.copy_(values)


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
