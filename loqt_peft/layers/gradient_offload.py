"""Tensors of a device that wait on the host: copies that nobody waits for until somebody reads them."""

from __future__ import annotations

import weakref

import torch


# Bytes of page-locked memory that a process uses at a time for such copies, blocks rounded up to powers of two, as torch
# does, and kept by torch for the next ones of their size. What goes beyond it is copied to ordinary memory, which takes
# longer, and which the host waits for.
PINNED_BYTES = 2 * 2**30

_pinned: weakref.WeakSet[HostCopy] = weakref.WeakSet()


def _rounded(nbytes: int) -> int:
    return 1 << max(nbytes - 1, 0).bit_length()


def _may_pin(nbytes: int) -> bool:
    return sum(copy.pinned_bytes for copy in _pinned) + _rounded(nbytes) <= PINNED_BYTES


class _Arrival:
    """Of a copy that is queued to the current stream of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.current_stream(device).record_event()

    def queue(self) -> None:
        """What is queued from now on to the device's current stream comes after it."""
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def wait(self) -> None:
        """The host waits for it."""
        self._event.synchronize()


def _start_copy(host: torch.Tensor, tensor: torch.Tensor, pinned: bool) -> _Arrival | None:
    """Copy a device's tensor to the host; `None` if it has arrived."""
    host.copy_(tensor, non_blocking=pinned)
    return _Arrival(tensor.device) if pinned else None


class HostCopy:
    """A copy of a tensor on the CPU that may still be on its way.

    Every reader asks for it by what he is: `for_host` waits until the values have arrived, `for_device` lets the device's
    current stream wait, and not the host.

    Args:
        tensor (`torch.Tensor`): On any device.
        previous ([`HostCopy`], *optional*): A copy that nobody needs any more; its memory is used again.
    """

    def __init__(self, tensor: torch.Tensor, previous: HostCopy | None = None) -> None:
        self.pinned_bytes = 0
        if previous is None or previous._tensor.device.type != "cpu":
            pins = tensor.is_cuda and _may_pin(tensor.nbytes)
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=pins)
            if pins:
                self.pinned_bytes = _rounded(tensor.nbytes)
        else:
            # who reads or writes it on another stream must have come to an end
            self._tensor, self.pinned_bytes = previous.for_device(), previous.pinned_bytes
            previous.pinned_bytes = 0
        if self.pinned_bytes:
            _pinned.add(self)
        self._arrival = _start_copy(self._tensor, tensor, bool(self.pinned_bytes))

    def __deepcopy__(self, memo: dict) -> HostCopy:
        return HostCopy(self.for_host())

    def for_device(self) -> torch.Tensor:
        """The copy, to be read by what is queued from now on to the current stream of the device that it came from."""
        if self._arrival is not None:
            self._arrival.queue()
        return self._tensor

    def for_host(self) -> torch.Tensor:
        """The copy with its values."""
        if self._arrival is not None:
            self._arrival.wait()
        return self._tensor


def for_device(tensor: torch.Tensor | HostCopy) -> torch.Tensor:
    """See `HostCopy.for_device`; any other tensor as it is."""
    return tensor.for_device() if isinstance(tensor, HostCopy) else tensor


def for_host(tensor: torch.Tensor | HostCopy) -> torch.Tensor:
    """See `HostCopy.for_host`; any other tensor as it is."""
    return tensor.for_host() if isinstance(tensor, HostCopy) else tensor
