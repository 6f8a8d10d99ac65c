"""The recording of dL/dW on an update step: from a layer's backward pass to the gradient, or to what is made of it there."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Protocol

import torch

from ..algorithm.linear_map import weight_gradient
from ..algorithm.precision import without_autocast
from ..algorithm.switch import NewProjection
from ..compat import is_in_backward
from .gradient_offload import HostCopy, for_device, for_host
from .stopwatch import Stretch, mark


class _Recorder(torch.autograd.Function):
    """Identity on a layer's output that records dL/dW = (dL/dy)ᵀ x in backward."""

    @staticmethod
    def forward(ctx, y: torch.Tensor, x: torch.Tensor, capture: GradientCapture) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.capture = capture
        # not as a view: models may write to a layer's output, but not to a view that a custom function made
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        ctx.capture.record(grad_output, ctx.saved_tensors[0])
        return grad_output, None, None


# what records in compiled models, by its number: a compiled graph holds no Python object
_recording: weakref.WeakValueDictionary[int, GradientCapture] = weakref.WeakValueDictionary()
_numbers = itertools.count()


@torch.library.custom_op("loqt_peft::record_gradient", mutates_args=("token",))
def _record_gradient(grad_output: torch.Tensor, x: torch.Tensor, token: torch.Tensor, number: int) -> None:
    capture = _recording.get(number)
    if capture is not None:
        capture.record(grad_output, x)


@_record_gradient.register_fake
def _(grad_output, x, token, number) -> None:
    pass


class _CompiledRecorder(torch.autograd.Function):
    """[`_Recorder`] without a Python object, for `torch.compile`.

    The token only says that the recording changes something, and so must not be left out.
    """

    @staticmethod
    def forward(ctx, y: torch.Tensor, x: torch.Tensor, token: torch.Tensor, number: int) -> torch.Tensor:
        ctx.save_for_backward(x, token)
        ctx.number = number
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        x, token = ctx.saved_tensors
        _record_gradient(grad_output, x, token, ctx.number)
        return grad_output, None, None, None


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """0-d bool, on the tensor's device."""
    # a sum is finite only if every term is
    return torch.isfinite(tensor.sum())


class Reduction(Protocol):
    """What sums the gradients of several processes; see [`~loqt_peft.training.reduction.GradientReduction`]."""

    def hand_over(self, capture: GradientCapture, gradient: torch.Tensor) -> None:
        """Take the gradient of a layer of which a backward pass is done; it is used up."""

    def finish(self) -> None:
        """After the last backward pass, [`put`][GradientCapture.put] the sums."""


class GradientCapture:
    """What one layer records of its gradient on an update step.

    Attributes:
        adapter_name (`str`, *optional*): Of the adapter that an update of this layer is due of; `None` if none is.
        work (`tuple[torch.device, Stretch]`, *optional*): What it took to make P within the backward pass, and where.
        reduction ([`Reduction`], *optional*): In several processes, what takes the gradient of each backward pass away.
    """

    def __init__(self) -> None:
        self.adapter_name: str | None = None
        self._project: Callable[[torch.Tensor], NewProjection] | None = None
        self._offload = False
        self._is_last_backward: Callable[[], bool] | None = None
        self._number = next(_numbers)
        self._token = torch.zeros(1, dtype=torch.float32, device="cpu")
        # forward passes of this step whose backward pass has not come by
        self._calls = 0
        self._gradient: torch.Tensor | HostCopy | None = None
        # of a gradient that is on its way to the host
        self._gradient_is_finite: torch.Tensor | None = None
        self._projected: NewProjection | None = None
        self.work: tuple[torch.device, Stretch] | None = None
        self.reduction: Reduction | None = None

    def start(
        self,
        adapter_name: str,
        project: Callable[[torch.Tensor], NewProjection] | None,
        offload: bool = False,
        is_last_backward: Callable[[], bool] | None = None,
        reduction: Reduction | None = None,
    ) -> None:
        """An update follows this step: record dL/dW from now on, in the backward passes of the layer, if P is made from it.

        Args:
            adapter_name (`str`): The adapter that will be updated.
            project (`Callable`, *optional*):
                From dL/dW, float32 `[out, in]` and used up, to what a switch needs of it. `None`: P is made without a
                gradient, and nothing is recorded.
            offload (`bool`):
                Keep on the CPU what has to be kept of the gradient until the switch: the packed P where it is computed in
                the backward pass, else 4 bytes for each element of W. Up to 2 GiB of a process are page-locked (see
                [`~loqt_peft.layers.gradient_offload.PINNED_BYTES`]), the rest is ordinary memory, which is given back
                afterwards.
            is_last_backward (`Callable`, *optional*):
                Asked within a backward pass whether it is the step's last. In the last one P is computed as soon as the
                gradient is complete, and the gradient is freed. `None`: the gradient is kept.
            reduction ([`Reduction`], *optional*): In several processes. Not beside `is_last_backward`.
        """
        self.stop()
        if _recording.get(self._number, self) is not self:
            # this one is a copy
            self._number = next(_numbers)
        _recording[self._number] = self
        self.adapter_name, self._project = adapter_name, project
        self._offload, self._is_last_backward = offload, is_last_backward
        self.reduction = reduction

    def stop(self) -> tuple[torch.Tensor | None, NewProjection | None]:
        """Stop recording and hand over what there is.

        Returns:
            The gradient, float32 `[out, in]`, or what was made of it; both `None` if nothing was recorded. A tensor on the
            host may still be on its way there, and is for work on the device's current stream only.
        """
        gradient, projected = self._gradient, self._projected
        self.adapter_name = self._project = self._is_last_backward = self._gradient = self._projected = None
        self._gradient_is_finite = self.work = self.reduction = None
        self._calls = 0
        if projected is not None:
            projected = projected._replace(P=for_device(projected.P))
        return None if gradient is None else for_device(gradient), projected

    def take(self) -> torch.Tensor | None:
        """Hand over the gradient and go on recording; as of [`stop`], a tensor on the host may still be on its way there."""
        gradient, self._gradient, self._gradient_is_finite = self._gradient, None, None
        return None if gradient is None else for_device(gradient)

    def put(self, gradient: torch.Tensor | HostCopy, is_finite: torch.Tensor) -> None:
        """Put another gradient, as the sum of several processes, in the place of the recorded one.

        Args:
            gradient (`torch.Tensor` or `HostCopy`): float32 `[out, in]`.
            is_finite (`torch.Tensor`): 0-d bool.
        """
        self._gradient, self._gradient_is_finite = gradient, is_finite

    @property
    def records(self) -> bool:
        """Whether the gradient is recorded."""
        return self._project is not None

    @property
    def awaits_backward(self) -> bool:
        """Whether the layer ran forward, and its backward pass has not come by; a compiled layer does not know."""
        return self._calls > 0

    @property
    def gradient(self) -> torch.Tensor | None:
        """What has been recorded so far, and not yet been made into a projection; waits for a copy on its way to the host."""
        return None if self._gradient is None else for_host(self._gradient)

    @property
    def is_finite(self) -> torch.Tensor | None:
        """Whether what was recorded is finite: a 0-d tensor; `None` if there is nothing."""
        if self._projected is not None:
            return self._projected.finite
        if self._gradient_is_finite is not None:
            return self._gradient_is_finite
        return None if self._gradient is None else _is_finite(self._gradient)

    def count_call(self) -> None:
        """The layer runs forward, and its backward pass will record."""
        # not counted when a checkpointed forward pass runs again, within the backward pass; compiled calls are not counted
        # either, so that their gradient is kept until the end of the step
        if not torch.compiler.is_compiling() and not is_in_backward():
            self._calls += 1

    def watch(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The layer's output y, whose backward pass records the gradient.

        Args:
            y (`torch.Tensor`): `[..., out]`.
            x (`torch.Tensor`): The layer's input, `[..., in]`.
        """
        if torch.compiler.is_compiling():
            return _CompiledRecorder.apply(y, x, self._token, self._number)
        return _Recorder.apply(y, x, self)

    @torch.no_grad()
    @without_autocast
    def record(self, grad_output: torch.Tensor, x: torch.Tensor) -> None:
        """Add `grad_outputᵀ x` to the recorded gradient.

        Args:
            grad_output (`torch.Tensor`): dL/dy, `[..., out]`.
            x (`torch.Tensor`): The layer's input, `[..., in]`.

        Raises:
            RuntimeError: If a backward pass follows the one that was said to be the last.
        """
        rows = grad_output.reshape(-1, grad_output.shape[-1]), x.reshape(-1, x.shape[-1])
        self.add(weight_gradient(*rows).float())

    @torch.no_grad()
    def add(self, gradient: torch.Tensor) -> None:
        """Add dL/dW of one call of the layer to the recorded gradient.

        Args:
            gradient (`torch.Tensor`): float32 `[out, in]`; used up.

        Raises:
            RuntimeError: If a backward pass follows the one that was said to be the last.
        """
        if self._projected is not None:
            raise RuntimeError(
                "A backward pass follows the one that was said to be the step's last. Call `begin_step(step, "
                "is_last_backward)` with a function that is true in the last backward pass before `optimizer.step()` only, "
                "or without one."
            )
        # a module may run several times in a forward pass
        self._calls -= 1
        if self._gradient is not None:
            gradient.add_(for_device(self._gradient).to(gradient.device, non_blocking=True))
        if self._calls == 0 and self._is_last_backward is not None and self._is_last_backward():
            self._gradient = self._gradient_is_finite = None
            start = mark(gradient.device)
            projected = self._project(gradient)
            self.work = gradient.device, Stretch(start, mark(gradient.device))
            self._projected = projected._replace(P=HostCopy(projected.P)) if self._offload else projected
        elif self._calls == 0 and self.reduction is not None:
            self._gradient = self._gradient_is_finite = None
            self.reduction.hand_over(self, gradient)
        elif self._offload and self._calls <= 0:
            # made where the values are: nobody may read them on the host without waiting
            self._gradient_is_finite = _is_finite(gradient)
            previous = self._gradient if isinstance(self._gradient, HostCopy) else None
            self._gradient = HostCopy(gradient, previous)
        else:
            self._gradient, self._gradient_is_finite = gradient, None
