"""What a LoQT layer holds under FSDP2: W, P and B in parts on the device, and its base weight in parts on the host.

`fully_shard` shards parameters only, and asks each module for its own ones by `named_parameters(recurse=False)`.
[`ShardableBuffers`] answers with its buffers. Nobody else asks a module in that way: to `model.named_parameters()`,
optimizers, state dicts and PEFT they are the buffers that they always were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from ..compat import BufferDict
from ..dtensor import full, is_sharded_tensor, write
from .base_weight import BaseWeight


if TYPE_CHECKING:
    from .layer import LoQTLayer


class ShardableBuffers(BufferDict):
    """Buffers that `fully_shard` takes for frozen parameters."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        if not recurse:
            for key, buffer in self._buffers.items():
                yield f"{prefix}.{key}" if prefix else key, buffer

    def __setattr__(self, name: str, value) -> None:
        # `fully_shard` puts the part, or what it has gathered, where it found the parameter
        if name in self.__dict__.get("_buffers", ()) and isinstance(value, torch.Tensor):
            self._buffers[name] = value
        else:
            super().__setattr__(name, value)

    def __setitem__(self, key: str, value: torch.Tensor) -> None:
        # `fully_shard` knows its part by identity
        if key in self._buffers and is_sharded_tensor(self._buffers[key]):
            write(self._buffers[key], value)
        else:
            super().__setitem__(key, value)


class ShardedBase(BaseWeight):
    """The original weight of a layer in equal parts, one on the host of each process; see [`BaseWeight`].

    It is no parameter any more, so that nobody gathers it in a forward pass. Only the first switch reads it.

    Args:
        base ([`BaseWeight`]): What is to be divided; the layer's own tensor is freed.
        device (`torch.device`): Where the weight is dequantized.
        trained_dtypes (`set[torch.dtype]`): Of the layer's B.
    """

    is_sharded = True

    def __init__(self, base: BaseWeight, device: torch.device, trained_dtypes: set[torch.dtype]) -> None:
        vars(self).update(vars(base))
        self.trained_dtypes = trained_dtypes
        self._sample = base.sample(device)
        self._quantized_dtype = dtype = base.dtype
        whole = base.value(device).to(dtype)
        self._shape = tuple(whole.shape)
        self._part = _part(whole.reshape(-1))
        self._whole: torch.Tensor | None = None
        self.dropped = True
        weight = self.layer.weight
        del self.layer.weight
        # what asks a layer for dtype and device goes on finding them
        empty = torch.empty(0, dtype=dtype, device=weight.device)
        self.layer.register_buffer("weight", empty, persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def require(self, action: str) -> None:
        """
        Raises:
            ValueError: Always: nobody has the weight whole.
        """
        raise ValueError(
            f"{action} needs the original base weights, and each process has a part of them only (FSDP2). Save the "
            "adapter, and load it in one process."
        )

    def gather(self, device: torch.device) -> torch.Tensor:
        """The original weight, `[out, in]` in its own dtype on `device`; all processes must ask."""
        if self._part is None:
            raise ValueError(
                "The original base weights are needed, and they were dropped at the first switch (retain_base='drop'). "
                "Reload the base model, or train with retain_base='cpu'."
            )
        parts = self._part.to(device)
        if _world_size() > 1:
            own, parts = parts, parts.new_empty(_world_size() * len(parts))
            dist.all_gather(list(parts.chunk(_world_size())), own)
        return parts[: self._shape[0] * self._shape[1]].view(self._shape)

    def value(self, device: torch.device) -> torch.Tensor:
        """As in [`BaseWeight`]; all processes must ask, but within [`Gathered`]."""
        whole = self.gather(device) if self._whole is None else self._whole
        return whole.to(torch.float32)

    def put_whole(self, whole: torch.Tensor | None) -> None:
        """Let `value` return this for a while; `None` ends it."""
        self._whole = whole

    def replace(self, tuner_layer: nn.Module, weight: torch.Tensor, device: torch.device) -> None:
        """Raises the error of `require`."""
        self.require("Merging the adapter")

    def move(self, device: torch.device) -> None:
        """It stays on the host."""

    def drop(self, device: torch.device) -> None:
        """Free this process's part for good."""
        self._part = None


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _part(flat: torch.Tensor) -> torch.Tensor:
    """This process's part of a vector, on the host: as long as those of the others, the last ones filled with zeros."""
    size = _world_size()
    length = -(-len(flat) // size)
    start = length * (dist.get_rank() if size > 1 else 0)
    part = torch.zeros(length, dtype=flat.dtype, device="cpu")
    own = flat[start : start + length]
    part[: len(own)] = own
    return part


def mixed_precision_dtype(layer: LoQTLayer) -> torch.dtype | None:
    """In which dtype FSDP2 has gathered B for a forward pass; `None` without its mixed precision."""
    if not layer.base.is_sharded:
        return None
    dtypes = {layer.loqt_B[name].dtype for name in layer.active_adapters if name in layer.loqt_B}
    return next(iter(dtypes - layer.base.trained_dtypes), None)


@torch.no_grad()
def make_shardable(layer: LoQTLayer, device: torch.device | None = None) -> None:
    """Before `fully_shard`: fill all slots that it will shard, and divide the base weight.

    Args:
        layer (`LoQTLayer`): The layer; its adapters must be verified.
        device (`torch.device`, *optional*): Where W is quantized; where the base weight lies if `None`.
    """
    home = layer.compute_device
    device = home if device is None else device
    for adapter_name in layer.loqt_B:
        if adapter_name not in layer.loqt_weight:
            packed = layer.weight_format(adapter_name).pack(layer.base.value(device))
            layer.loqt_weight[adapter_name] = packed.to(home)
    for container in ("loqt_P", "loqt_weight"):
        setattr(layer, container, ShardableBuffers(dict(getattr(layer, container).items()), persistent=True))
    layer.base = ShardedBase(layer.base, device, {B.dtype for B in layer.loqt_B.values()})


class Gathered:
    """The tensors of one sharded layer whole, to be read by who computes its switch.

    All processes make one at the same time. Within it, `with Gathered(...):`, the layer holds them in place of the parts.

    Args:
        layer (`LoQTLayer`): Its parts must be in place, not what a forward pass has gathered.
        adapter_name (`str`): The adapter.
    """

    def __init__(self, layer: LoQTLayer, adapter_name: str) -> None:
        self._layer = layer
        slots = layer.loqt_P._buffers, layer.loqt_weight._buffers, layer.loqt_B._parameters
        self._slots = [(slot, adapter_name, slot[adapter_name]) for slot in slots]
        self._whole = [full(part) for _, _, part in self._slots]
        first = not layer.num_updates(adapter_name)
        self._base = layer.base.gather(layer.compute_device) if first else None

    def __enter__(self) -> None:
        for (slot, name, _), whole in zip(self._slots, self._whole, strict=True):
            slot[name] = nn.Parameter(whole, requires_grad=False) if slot is self._layer.loqt_B._parameters else whole
        self._layer.base.put_whole(self._base)

    def __exit__(self, *_) -> None:
        for slot, name, part in self._slots:
            slot[name] = part
        self._layer.base.put_whole(None)


def gathered(layer: LoQTLayer, adapter_name: str) -> contextlib.AbstractContextManager:
    """[`Gathered`] for a sharded layer; nothing for any other."""
    return Gathered(layer, adapter_name) if layer.base.is_sharded else contextlib.nullcontext()
