"""What an update does in one layer: it takes a new P, and switches the layer to new W, P and B."""

from __future__ import annotations

import torch

from ..algorithm.switch import NewProjection, Switch, drawn_projection, projection_of_gradient, switch
from ..compat import BufferDict
from ..dtensor import write
from ..layers.layer import LoQTLayer
from .zero import write_parts


def project_gradient(layer: LoQTLayer, adapter_name: str, gradient: torch.Tensor) -> NewProjection:
    """See [`~loqt_peft.algorithm.switch.projection_of_gradient`]; the gradient is used up."""
    return projection_of_gradient(
        gradient,
        layer.r[adapter_name],
        layer.config[adapter_name].projection,
        layer.loqt_P[adapter_name],
        layer.projection_format(adapter_name),
    )


def draw_projection(layer: LoQTLayer, adapter_name: str) -> NewProjection:
    """See [`~loqt_peft.algorithm.switch.drawn_projection`]."""
    return drawn_projection(
        layer.shape,
        layer.r[adapter_name],
        layer.projection_seed(adapter_name),
        layer.compute_device,
        layer.projection_format(adapter_name),
    )


def compute_switch(layer: LoQTLayer, adapter_name: str, new: NewProjection | None) -> Switch:
    """The layer's new state; nothing is written. See [`~loqt_peft.algorithm.switch.switch`].

    Args:
        layer (`LoQTLayer`): The layer.
        adapter_name (`str`): The adapter.
        new ([`NewProjection`], *optional*): The new projection; `None` keeps the old one.
    """
    layer.verify(adapter_name)
    config = layer.config[adapter_name]
    with torch.no_grad():
        weight = layer.frozen_weight(adapter_name)
    return switch(
        weight,
        layer.loqt_B[adapter_name].detach(),
        layer.loqt_P[adapter_name],
        new,
        layer.weight_format(adapter_name),
        layer.projection_format(adapter_name),
        layer.scaling[adapter_name],
        config.compensation_steps,
        layer.kept_error(adapter_name),
        config.error_feedback,
    )


def empty_switch(layer: LoQTLayer, adapter_name: str) -> Switch:
    """A [`Switch`] of the right shapes and dtypes, to be received from another process."""
    device, weight_format, B = layer.compute_device, layer.weight_format(adapter_name), layer.loqt_B[adapter_name]
    return Switch(
        weight_format.empty(device),
        layer.projection_format(adapter_name).empty(device),
        torch.empty(B.shape, dtype=B.dtype, device=device),
        torch.zeros(6, dtype=torch.float64, device=device),
        weight_format.empty(device) if layer.config[adapter_name].error_feedback else None,
    )


@torch.no_grad()
def write_switch(layer: LoQTLayer, adapter_name: str, switch: Switch) -> None:
    """Make the computed state the layer's own. B stays the Parameter that the optimizer holds."""
    _write(layer.loqt_P, adapter_name, switch.P)
    write(layer.loqt_B[adapter_name], switch.B)
    write_parts(layer.loqt_B[adapter_name])
    _write(layer.loqt_weight, adapter_name, switch.weight)
    if switch.error is not None:
        layer.loqt_error[adapter_name] = switch.error.cpu()
    layer.updates.count(adapter_name)
    layer.place()


def _write(buffers: BufferDict, adapter_name: str, value: torch.Tensor) -> None:
    """Into the memory that is there, if it fits: what is replaced at every update comes to lie among what is short-lived."""
    known = buffers[adapter_name] if adapter_name in buffers else None
    if known is not None and (known.shape, known.dtype, known.device) == (value.shape, value.dtype, value.device):
        write(known, value)
    else:
        buffers[adapter_name] = value
