"""The gradients of an update step in several processes: each is summed at its layer's owner, within the backward pass."""

from __future__ import annotations

import time
import weakref
from collections import deque
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..compat import group_timeout
from ..layers.capture import GradientCapture
from ..layers.gradient_offload import HostCopy, for_device
from ..layers.layer import LoQTLayer
from .ownership import owners


# Sums under way at a time, each of which holds one layer's gradient. With fewer, backward waits for each of them.
WINDOW = 2
# Seconds that backward waits for a sum. Another process may be unable to join in before the end of its own backward pass.
PATIENCE = 30.0


# by the default group, which may come to an end before the process does
_groups: weakref.WeakKeyDictionary[Any, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def _own_group(device: torch.device) -> dist.ProcessGroup:
    """A group of all processes beside that of DDP: its operations come in an order that DDP does not know.

    All processes must ask for it at the same point of the training.
    """
    default = dist.group.WORLD
    if default not in _groups:
        _groups[default] = dist.new_group(timeout=group_timeout(default, device))
    return _groups[default]


class _Flight(NamedTuple):
    """A sum under way."""

    work: dist.Work
    place: int
    gradient: torch.Tensor


class GradientReduction:
    """Sums the gradients of all processes, each at the process that owns the layer.

    As soon as a backward pass is done with a layer its gradient is sent, and nobody but the owner keeps anything of it.
    With several micro-batches that happens in each of their backward passes: a process that kept its sum until the last
    of them would hold as many bytes as the model has, four for each weight.

    All processes send in one order, from the last layer to the first, round by round. Who did not run a layer sends zeros
    when its turn comes. Processes whose rounds differ, as by modules that ran in one of them only, are brought together
    by [`finish`], and so nobody waits without end before that.

    Args:
        layers (`list[LoQTLayer]`): All that an update is due of, in the order of the model; equal on all processes.
        adapter_name (`str`): The adapter that trains.
        offload (`bool`): Keep on the CPU what waits for the update.
    """

    def __init__(self, layers: list[LoQTLayer], adapter_name: str, offload: bool) -> None:
        self._layers = layers[::-1]
        self._owners = owners((layer.shape for layer in layers), dist.get_world_size())[::-1]
        self._devices = [layer.compute_device for layer in self._layers]
        self._places = {id(layer.capture): place for place, layer in enumerate(self._layers)}
        self._offload = offload
        self._group = _own_group(self._devices[0])
        self._sent = 0
        self._patience = PATIENCE
        # of this process: complete gradients whose turn has not come
        self._waiting: dict[int, torch.Tensor | HostCopy] = {}
        self._flights: deque[_Flight] = deque()
        # of all processes: of own layers, and whether they are finite
        self._sums: dict[int, tuple[torch.Tensor | HostCopy, torch.Tensor]] = {}

    def __deepcopy__(self, memo: dict) -> GradientReduction:
        # a group of processes has no copy
        return self

    def hand_over(self, capture: GradientCapture, gradient: torch.Tensor) -> None:
        """Take the gradient of a layer of which a backward pass is done.

        Args:
            capture (`GradientCapture`): Of the layer.
            gradient (`torch.Tensor`): float32 `[out, in]`; used up.
        """
        place = self._places[id(capture)]
        self._queue(place, gradient)
        self._advance()
        waiting = self._waiting.get(place)
        if isinstance(waiting, torch.Tensor):
            self._waiting[place] = self._kept(waiting)

    def finish(self) -> None:
        """After the last backward pass: send what is left, and give each capture of an own layer the sum of all processes.

        The other captures are empty then. All processes must call this.

        Raises:
            RuntimeError: If another process is gone, or does not answer within the timeout of the process group.
        """
        for place, layer in enumerate(self._layers):
            gradient = layer.capture.take()
            if gradient is not None:
                self._queue(place, gradient.to(self._devices[place], non_blocking=True))
        done, begun = divmod(self._sent, len(self._layers))
        missed = any(not begun or place < begun for place in self._waiting)
        rounds = torch.tensor(done + bool(begun) + missed, device=self._devices[0])
        dist.all_reduce(rounds, op=dist.ReduceOp.MAX)
        # all processes are here, and wait for nothing else
        self._patience = float("inf")
        for _ in range(int(rounds) * len(self._layers) - self._sent):
            self._send()
        self._land(0)
        for place, (gradient, is_finite) in self._sums.items():
            self._layers[place].capture.put(gradient, is_finite)
        self._sums.clear()

    def _queue(self, place: int, gradient: torch.Tensor) -> None:
        waiting = self._waiting.get(place)
        if waiting is not None:
            gradient.add_(for_device(waiting).to(gradient.device, non_blocking=True))
        self._waiting[place] = gradient

    def _kept(
        self, gradient: torch.Tensor, previous: torch.Tensor | HostCopy | None = None
    ) -> torch.Tensor | HostCopy:
        if not self._offload or gradient.device.type == "cpu":
            return gradient
        return HostCopy(gradient, previous if isinstance(previous, HostCopy) else None)

    def _advance(self) -> None:
        """Send all whose turn has come, but at most to the end of a round."""
        while True:
            place = self._sent % len(self._layers)
            if place not in self._waiting and self._layers[place].capture.awaits_backward:
                return
            self._send()
            if self._sent % len(self._layers) == 0:
                return

    def _send(self) -> None:
        place = self._sent % len(self._layers)
        self._sent += 1
        device, waiting = self._devices[place], self._waiting.pop(place, None)
        if waiting is None:
            gradient = torch.zeros(self._layers[place].shape, dtype=torch.float32, device=device)
        else:
            gradient = for_device(waiting).to(device, non_blocking=True).contiguous()
        del waiting
        work = dist.reduce(gradient, dst=self._owners[place], group=self._group, async_op=True)
        self._flights.append(_Flight(work, place, gradient))
        del gradient, work
        self._land(WINDOW)

    def _land(self, window: int) -> None:
        """Take in the sums that have arrived, and wait for those beyond the window."""
        while self._flights:
            flight = self._flights[0]
            if not flight.work.is_completed() and (len(self._flights) <= window or not self._await(flight.work)):
                return
            flight.work.wait()
            self._flights.popleft()
            if self._owners[flight.place] == dist.get_rank():
                self._add_sum(flight.place, flight.gradient)

    def _await(self, work: dist.Work) -> bool:
        """Whether the work was over before the patience was."""
        start = time.monotonic()
        while not work.is_completed():
            if time.monotonic() - start > self._patience:
                # not once more in this step
                self._patience = 0.0
                return False
            time.sleep(0.0002)
        return True

    def _add_sum(self, place: int, gradient: torch.Tensor) -> None:
        previous = self._sums[place][0] if place in self._sums else None
        if previous is not None:
            gradient.add_(for_device(previous).to(gradient.device, non_blocking=True))
        # a sum is finite only if every term is; made where the values are
        self._sums[place] = self._kept(gradient, previous), torch.isfinite(gradient.sum())
