"""The storages of all tensors, counted as they are made and freed, on torch's `meta` device or for real.

Tensors on `meta` have shapes and dtypes but no bytes. A dispatch mode sees every operation and logs the birth and the death
of every storage, which gives what a device would hold at every moment. Because a `meta` tensor cannot be copied to the
host, the mode answers such copies by tensors that it counts as host memory.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

# it registers its 4-bit operations with torch
import bitsandbytes  # noqa: F401
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..compat import storage_key


aten = torch.ops.aten

DEVICE, HOST = "device", "host"
# storages that grow with nothing, such as the step counter of AdamW, may be real ones on the CPU
_SMALL = 4096


@dataclass
class Peak:
    """The moment with most memory on the device.

    Attributes:
        held (`Counter`): Bytes on the device by category, at that moment.
        host (`Counter`): The largest numbers of bytes on the host by category, each by itself.
    """

    held: Counter = field(default_factory=Counter)
    host: Counter = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.held.values())


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of all storages that operations create while it is active, `meta` or real.

    Args:
        device_type (`str`): Of the tensors that are counted as the device's, `"meta"` or `"cpu"`.

    Attributes:
        category (`str`): Under which new storages are counted.
        label: Under which peaks are noted; none are if it is `None`.
        peaks (`dict[Any, Peak]`): By label.
    """

    def __init__(self, device_type: str = "meta") -> None:
        super().__init__()
        self.device_type = device_type
        self.category = "activations"
        self.label: Any = None
        self.peaks: dict[Any, Peak] = {}
        self.held: dict[str, Counter] = {DEVICE: Counter(), HOST: Counter()}
        # by address of the C++ object: place, category, bytes, and the weak reference that tells of its death
        self._alive: dict[int, tuple[str, str, int, weakref.ref]] = {}

    def begin(self, category: str, label: Any = None) -> None:
        """From now on, count new storages and note peaks under other names."""
        self.category, self.label = category, label
        self._note()

    def register(self, tensor: torch.Tensor, category: str, place: str | None = None) -> None:
        """Count a storage, or move one that is counted to another category or place."""
        storage = tensor.untyped_storage()
        key, place = storage_key(tensor), place or self.place(tensor)
        if key in self._alive:
            self._bury(key)
        reference = weakref.ref(storage, lambda _, key=key: self._bury(key))
        self._alive[key] = (place, category, storage.nbytes(), reference)
        self.held[place][category] += storage.nbytes()
        self._note()

    def place(self, tensor: torch.Tensor) -> str:
        """Where a tensor lies, or was said to lie."""
        found = self._alive.get(storage_key(tensor))
        return found[0] if found else DEVICE if tensor.device.type == self.device_type else HOST

    def _bury(self, key: int) -> None:
        place, category, nbytes, _ = self._alive.pop(key)
        self.held[place][category] -= nbytes

    def _copied(self, tensor: torch.Tensor) -> int:
        """Bytes that the device needs for a copy of what an operation reads from the host."""
        place, category, nbytes, _ = self._alive.get(storage_key(tensor), (DEVICE, "", 0, None))
        # paged memory is read where it lies
        return nbytes if place == HOST and tensor.is_meta and category != "optimizer state" else 0

    def _note(self, transient: int = 0) -> None:
        if self.label is None:
            return
        peak = self.peaks.setdefault(self.label, Peak())
        peak.host |= self.held[HOST]
        if sum(self.held[DEVICE].values()) + transient > peak.total:
            peak.held = self.held[DEVICE] + Counter({"temporaries": transient})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        inputs = [*_tensors(args), *_tensors(kwargs.values())]
        places = {self.place(tensor) for tensor in inputs if tensor.is_meta}
        if func is aten._local_scalar_dense.default and places:
            # the one thing the update asks a device: how many gradients are not finite
            return 0
        place = HOST if places == {HOST} else None
        to_host = "device" in kwargs and torch.device(kwargs["device"] or "meta").type == "cpu"
        if to_host and self.device_type == "meta":
            if func is aten._to_copy.default and places and inputs[0].numel() <= _SMALL:
                return torch.ones_like(inputs[0], device="cpu")
            if places or _is_large_factory(func, args):
                place = HOST
                if kwargs.get("generator") is not None:
                    # on a real device this generator is the device's
                    place, kwargs["generator"] = DEVICE, None
                kwargs |= {"device": torch.device("meta"), "pin_memory": False}
        outputs = func(*args, **kwargs)
        known = {storage_key(tensor) for tensor in inputs}
        for tensor in _tensors([outputs]):
            key = storage_key(tensor)
            if key not in self._alive and key not in known:
                self.register(tensor, self.category, place)
        transient = _inside(func, args)
        if len(places) == 2 and func is not aten.copy_.default:
            transient += sum(self._copied(tensor) for tensor in inputs)
        if transient:
            self._note(transient)
        return outputs


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    # torch's own pytree takes longer than most operations on `meta`
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _is_large_factory(func, args) -> bool:
    shape = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    return all(isinstance(size, int) for size in shape) and math.prod(shape) > _SMALL


def _inside(func, args) -> int:
    """Bytes that an operation allocates and frees by itself."""
    # for large batches bitsandbytes multiplies with a dequantized copy of the weight
    if func is torch.ops.bitsandbytes.gemm_4bit.default:
        return math.prod(args[2]) * args[0].element_size()
    return 0
