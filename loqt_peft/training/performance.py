"""`PerformanceCallback`: measured memory and speed in the Trainer's logs."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..compat import calling_objects
from .figures import Worded
from .per_layer import PerLayerOptimizer, check_training_arguments, remove_hooks


if sys.platform == "linux":
    import resource

# device types with torch's memory counters
COUNTED = ("cuda", "xpu")


def callback_handler() -> CallbackHandler | None:
    """The handler that is calling the callback that calls this; `None` outside of a Trainer."""
    # Callbacks get no reference to the Trainer, and its reporters (TensorBoard, W&B, ...) come before them in line; what a
    # callback adds to `logs` in `on_log` reaches none of them. The handler that is calling can address them all.
    return next((handler for handler, _, _ in calling_objects(CallbackHandler)), None)


def count_tokens(inputs: Any) -> int:
    """Tokens in what a forward pass got; 0 where there are none, as of images and audio.

    Args:
        inputs:
            A mapping is counted by its `input_ids` (integers, any shape) or `inputs_embeds` (`[..., hidden]`), or, without
            them, by the mappings in it. So is each mapping in a list or tuple; one without mappings by its first tensor, if
            that holds integers, and a tensor likewise.
    """
    if isinstance(inputs, torch.Tensor):
        is_ids = not (inputs.is_floating_point() or inputs.is_complex() or inputs.dtype == torch.bool)
        return inputs.numel() if is_ids else 0
    if isinstance(inputs, Mapping):
        if (ids := inputs.get("input_ids")) is not None:
            return count_tokens(ids)
        if (embeddings := inputs.get("inputs_embeds")) is not None:
            return embeddings.shape[:-1].numel()
        return sum(count_tokens(value) for value in inputs.values() if not isinstance(value, torch.Tensor))
    if isinstance(inputs, (list, tuple)) and inputs:
        if isinstance(inputs[0], torch.Tensor):
            return count_tokens(inputs[0])
        return sum(count_tokens(value) for value in inputs)
    return 0


class PerformanceCallback(TrainerCallback):
    """Adds measured memory and speed to what the Trainer logs of training, and the true `grad_norm` of per-layer updates.

    [`LoQTTrainerCallback`] is one already; this is for training without LoQT, to compare with. To the entries that hold
    `loss` come, all since the last such entry:

    - `loqt/tokens_per_second`: input tokens of the training forward passes, padding included, over all processes. The time
      is that of the steps, LoQT's updates and loading data included, evaluating and saving excluded. Only for models that
      get `input_ids` or `inputs_embeds`, by name, as the first argument, or within a dict, list or tuple.
    - `loqt/peak_memory_allocated`, `loqt/peak_memory_reserved`: bytes on the device by torch's counters, of the process
      that has most. Evaluating counts. The counters are reset at each entry, for anybody else who reads them too.
    - `loqt/peak_resident_memory`: in place of these where torch has no such counters, as on the CPU, and on Linux only: bytes
      of main memory at the peak *since the process began*, of the process that has most.

    Raises:
        ValueError:
            When training begins: two of these callbacks, or a per-layer optimizer with arguments that it does not allow
            (see [`loqt_peft.training.per_layer.check_training_arguments`]).
    """

    def __init__(self) -> None:
        # on the device, since reading it needs no synchronization of ours, and a compiled model no recompilation
        self._tokens: torch.Tensor | None = None
        self._handle = None
        self._seconds = 0.0
        self._mark = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        **kwargs,
    ):
        self._prepare_optimizer(args, model, optimizer)
        handler = callback_handler()
        if handler is not None:
            if sum(isinstance(callback, PerformanceCallback) for callback in handler.callbacks) > 1:
                raise ValueError(
                    f"{type(self).__name__}: the Trainer holds two of them (a LoQTTrainerCallback is a PerformanceCallback "
                    "as well). Pass one only."
                )
            # first in line, so that the reporters get what is added; a new list, since the handler goes through the old one
            handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
        self._count_tokens(model, args.device)
        self._take_peak_memory(args.device)
        self._seconds, self._mark = 0.0, time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self._count_seconds()

    def on_evaluate(self, args, state, control, **kwargs):
        self._mark = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self._mark = time.perf_counter()

    def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs):
        if "loss" not in logs:
            return
        self._count_seconds()
        figures = self._figures(args.device)
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if isinstance(optimizer, PerLayerOptimizer) and optimizer.grad_norm is not None:
            # the Trainer saw the norm of no gradients
            figures["grad_norm"] = optimizer.grad_norm.item()
        logs.update(figures)
        state.log_history[-1].update(figures)

    def on_train_end(self, args, state, control, **kwargs):
        self._handle.remove()

    @staticmethod
    def _prepare_optimizer(args: TrainingArguments, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if isinstance(optimizer, PerLayerOptimizer):
            check_training_arguments(args)
            optimizer.register_hooks()
        else:
            # of the optimizer of an earlier Trainer
            remove_hooks(model.parameters())

    def _count_tokens(self, model: nn.Module, device: torch.device) -> None:
        if self._handle is not None:
            self._handle.remove()
        # the same tensor for life: a compiled model may still add to it
        if self._tokens is None or self._tokens.device != device:
            self._tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._tokens.zero_()
        self._handle = model.register_forward_pre_hook(self._on_forward, with_kwargs=True)

    def _on_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if not model.training:
            return
        self._tokens.add_(count_tokens(kwargs) or count_tokens(args))

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._mark = now

    def _figures(self, device: torch.device) -> dict[str, float]:
        """Of all processes since the last call."""
        memory = self._take_peak_memory(device)
        own = torch.stack([self._tokens, *(torch.tensor(value, device=device) for value in memory.values())])
        tokens, *peaks = gather(own.unsqueeze(0)).unbind(1)
        figures: dict[str, float] = {}
        for name, peak in zip(memory, peaks, strict=True):
            size = int(peak.max())
            figures[name] = Worded(size, f"{size / 2**20:,.0f} MiB")
        tokens = int(tokens.sum())
        if tokens:
            figures["loqt/tokens_per_second"] = tokens / self._seconds
        self._tokens.zero_()
        self._seconds = 0.0
        return figures

    @staticmethod
    def _take_peak_memory(device: torch.device) -> dict[str, int]:
        """Bytes of this process since the last call, where the device counts them."""
        if device.type not in COUNTED:
            if sys.platform != "linux":
                return {}
            return {"loqt/peak_resident_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        # those of `torch.accelerator` came with torch 2.9
        counters = torch.get_device_module(device)
        peaks = {
            "loqt/peak_memory_allocated": counters.max_memory_allocated(device),
            "loqt/peak_memory_reserved": counters.max_memory_reserved(device),
        }
        counters.reset_peak_memory_stats(device)
        return peaks
