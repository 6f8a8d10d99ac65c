"""How many updates each adapter of a layer has been through, and whether one is pending: the one owner of these numbers."""

from __future__ import annotations

import torch
from torch import nn


# of the int64 buffer of an adapter
NUM_UPDATES, UPDATE_PENDING = 0, 1
STATE_SIZE = 2


class UpdateState:
    """Reads and writes the buffers, which go with the adapter into its state dict.

    Args:
        buffers (`BufferDict`): Of each adapter an int64 `[2]`.
    """

    def __init__(self, buffers: nn.Module) -> None:
        self._buffers = buffers
        # reading a buffer waits for the device: the buffer, its version and the values last read from it
        self._cache: dict[str, tuple[torch.Tensor, int, list[int]]] = {}

    def number(self, adapter_name: str) -> int:
        """How many updates the adapter has been through."""
        return self._read(adapter_name)[NUM_UPDATES]

    def pending(self, adapter_name: str) -> bool:
        """Whether an update was postponed and waits for the next step."""
        return bool(self._read(adapter_name)[UPDATE_PENDING])

    def postpone(self, adapter_name: str) -> None:
        """The update that was due waits for the next step."""
        self._write(adapter_name, self.number(adapter_name), True)

    def count(self, adapter_name: str) -> None:
        """The adapter has been through one more update."""
        self._write(adapter_name, self.number(adapter_name) + 1, False)

    def _read(self, adapter_name: str) -> list[int]:
        buffer = self._buffers[adapter_name]
        if buffer.is_meta:
            return [0, 0]
        if buffer.is_inference():
            # it has no version
            return buffer.tolist()
        cached = self._cache.get(adapter_name)
        if cached is None or cached[0] is not buffer or cached[1] != buffer._version:
            cached = self._cache[adapter_name] = (buffer, buffer._version, buffer.tolist())
        return cached[2]

    def _write(self, adapter_name: str, number: int, pending: bool) -> None:
        values = [number, int(pending)]
        buffer = self._buffers[adapter_name]
        # values of the host go along with the call; a copy of a tensor of the host would be waited for
        for element, value in zip(buffer, values, strict=True):
            element.fill_(value)
        self._cache[adapter_name] = (buffer, buffer._version, values)
