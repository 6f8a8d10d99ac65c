"""Times of work on a device, taken without waiting for it."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch


class Mark(NamedTuple):
    """A point in the work of a device, by [`mark`].

    Attributes:
        seconds (`float`): The time on the host.
        event (`torch.Event`, *optional*): Of a device that works on by itself.
    """

    seconds: float
    event: Any = None


class Stretch(NamedTuple):
    """Work between two marks of one device."""

    start: Mark
    end: Mark

    def seconds(self) -> float:
        """How long it took; waits until it is done."""
        if self.start.event is None:
            return self.end.seconds - self.start.seconds
        self.end.event.synchronize()
        return self.start.event.elapsed_time(self.end.event) / 1000


def device_module(device: torch.device) -> Any:
    """torch's module of an accelerator with events; `None` of a device whose work is done when a call returns."""
    if device.type in ("cpu", "meta"):
        return None
    module = torch.get_device_module(device)
    return module if hasattr(module, "Event") and hasattr(module, "current_stream") else None


def mark(device: torch.device) -> Mark:
    """The point that is reached when all that the device has been given so far is done."""
    module, event = device_module(device), None
    if module is not None:
        event = module.Event(enable_timing=True)
        event.record(module.current_stream(device))
    return Mark(time.perf_counter(), event)
