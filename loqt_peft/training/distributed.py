"""The part of an update that is done by several processes: who computes which layer's switch, and what DDP leaves alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn

from ..algorithm.switch import NewProjection, Switch
from ..dtensor import local
from ..layers.find import loqt_layers
from ..layers.layer import LoQTLayer
from ..layers.sharded import gathered
from .ownership import rounds
from .switching import compute_switch, draw_projection, empty_switch, project_gradient


def is_finite(layer: LoQTLayer) -> torch.Tensor | None:
    """Whether what an update is made of is finite, the gradient or, where none is needed, B: a 0-d tensor; `None` if there is
    nothing yet."""
    capture = layer.capture
    if capture.adapter_name is not None and not capture.records:
        return torch.isfinite(local(layer.loqt_B[capture.adapter_name].detach()).sum(dtype=torch.float32))
    return capture.is_finite


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def not_finite(layers: list[tuple[str, LoQTLayer]], adapter_name: str) -> int:
    """Number of layers that an update would break, on any process."""
    device = layers[0][1].compute_device
    broken = torch.zeros(len(layers), dtype=torch.float32, device=device)
    for index, (_, layer) in enumerate(layers):
        if (finite := is_finite(layer)) is not None:
            broken[index] = (~finite).to(device, torch.float32)
    if is_distributed():
        dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    return int(broken.sum().item())


def switches(layers: list[LoQTLayer], adapter_name: str) -> Iterator[tuple[LoQTLayer, Switch]]:
    """The layers' new states in turn, the same bits on every process.

    Each layer has one process that owns it, computes the switch and broadcasts it: the work is divided, and processes on
    unlike hardware cannot part. In each round every process has a layer, and nobody waits for another one's work but at
    the end of a round; so much is held at a time. Of several processes the gradients must have been summed at the owners
    (see [`~loqt_peft.training.reduction.GradientReduction`]).
    """
    if not is_distributed():
        for layer in layers:
            captured = _take_capture(layer, adapter_name)
            with gathered(layer, adapter_name):
                switch = _switch(layer, adapter_name, *captured)
            yield layer, switch
        return
    for places in rounds((layer.shape for layer in layers), dist.get_world_size()):
        group = [(layers[place], owner) for place, owner in places]
        yield from zip([layer for layer, _ in group], _switches_of_round(group, adapter_name), strict=True)


def _switches_of_round(group: list[tuple[LoQTLayer, int]], adapter_name: str) -> list[Switch]:
    """The new states of some layers, of which each process owns at most one."""
    # what is sharded is gathered, then the own work, then all broadcasts: who waits in between would work after the others
    own, switches = None, []
    for layer, owner in group:
        gradient, projected = _take_capture(layer, adapter_name)
        whole = gathered(layer, adapter_name)
        if dist.get_rank() != owner:
            switches.append(empty_switch(layer, adapter_name))
            continue
        own = len(switches), layer, gradient, projected, whole
        switches.append(None)
        del gradient, projected, whole
    if own is not None:
        place, layer, gradient, projected, whole = own
        if gradient is not None:
            gradient.div_(dist.get_world_size())
        with whole:
            switch = _switch(layer, adapter_name, gradient, projected)
        switches[place] = Switch(*(None if tensor is None else tensor.contiguous() for tensor in switch))
        del own, gradient, projected, switch, whole
    for (_, owner), switch in zip(group, switches, strict=True):
        for tensor in switch:
            if tensor is not None:
                dist.broadcast(tensor, src=owner)
    return switches


def _take_capture(layer: LoQTLayer, adapter_name: str) -> tuple[torch.Tensor | None, NewProjection | None]:
    """See `GradientCapture.stop`; the gradient is on the device of the adapter."""
    gradient, projected = layer.capture.stop()
    if gradient is not None:
        gradient = gradient.to(layer.compute_device, non_blocking=True)
    return gradient, projected


def _switch(
    layer: LoQTLayer, adapter_name: str, gradient: torch.Tensor | None, projected: NewProjection | None
) -> Switch:
    return compute_switch(layer, adapter_name, _project(layer, adapter_name, gradient, projected))


def _project(
    layer: LoQTLayer, adapter_name: str, gradient: torch.Tensor | None, projected: NewProjection | None
) -> NewProjection:
    """The layer's new projection: drawn, of this gradient, or the one that the backward pass has left."""
    if not layer.needs_gradient(adapter_name):
        return draw_projection(layer, adapter_name)
    return projected if gradient is None else project_gradient(layer, adapter_name, gradient)


# the update keeps them equal on all processes; DDP would broadcast every buffer at every forward pass
_BUFFERS = ("loqt_P", "loqt_weight", "loqt_error", "loqt_state", "loqt_seal")


def ignored_by_ddp(module: nn.Module) -> list[str]:
    """The names of the tensors in a module that DDP must neither broadcast nor ask for their device.

    Beside the buffers of the adapters these are base weights that lie on another device than the layer's computation
    (`retain_base="cpu"`), since DDP takes parameters of one type of device only.

    A `PeftModel` tells DDP by itself. With the Trainer [`LoQTTrainerCallback`] does so for any other module. In a loop of
    your own, where the `PeftModel` is part of another module or the adapter was added by transformers' `add_adapter`:

    ```py
    names = ignored_by_ddp(module)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    module = DistributedDataParallel(module)
    ```

    Args:
        module (`nn.Module`): What DDP will wrap.
    """
    names = []
    for name, layer in loqt_layers(module):
        names += [f"{name}.{buffer}.{adapter}" for buffer in _BUFFERS for adapter in getattr(layer, buffer)]
        if layer.base_is_offloaded:
            names.append(f"{name}.base_layer.weight")
    return names


class _Ignored:
    """Names as they are when DDP asks: from a checkpoint may come a base weight that moves to the host."""

    def __init__(self, module: nn.Module, others: Iterable[str]) -> None:
        self.module, self.others = module, others

    def __iter__(self) -> Iterator[str]:
        yield from self.others
        yield from ignored_by_ddp(self.module)


def tell_ddp(module: nn.Module) -> None:
    """Let a DDP that will wrap `module` leave alone what [`ignored_by_ddp`] lists by then."""
    known = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    # a PeftModel finds the attribute in its tuner
    if not isinstance(known, _Ignored) and not isinstance(module, PeftModel):
        module._ddp_params_and_buffers_to_ignore = _Ignored(module, known)
