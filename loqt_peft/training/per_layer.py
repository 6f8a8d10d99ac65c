"""Per-layer updates: the stock Trainer's optimizers, with each gradient applied and freed inside backward."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, is_initialized
from accelerate.utils import DistributedType
from bitsandbytes.utils import sync_gpu
from torch.nn.utils import get_total_norm
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import Trainer, TrainingArguments


# what `PerLayerOptimizer` is mixed into
if TYPE_CHECKING:
    from torch.optim import Optimizer as _Base
else:
    _Base = object

Optimizer8bit = bnb.optim.optimizer.Optimizer8bit

SCALER = "the gradient scaler looks for overflow when backward has ended, and scaled gradients are applied by then. Use bf16"
DISTRIBUTED = (
    "each process would apply its own gradients before they are averaged. Start one process without a launcher"
)

# the hook of each parameter: one optimizer steps it, the one that was created last
_hooks = WeakTensorKeyDictionary()


def remove_hooks(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Take the hooks of any per-layer optimizer off `parameters`, so that backward leaves their gradients alone."""
    for p in parameters:
        handle = _hooks.pop(p, None)
        if handle is not None:
            handle.remove()


def _check_surroundings() -> None:
    # the Trainer's accelerator comes before its optimizer
    distributed_type = AcceleratorState().distributed_type if is_initialized() else DistributedType.NO
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if distributed_type != DistributedType.NO or world_size > 1:
        raise ValueError(
            f"Per-layer updates are not allowed with distributed training ({distributed_type.value}, {world_size} "
            f"processes): {DISTRIBUTED}, or use the ordinary optimizer."
        )
    if is_initialized() and AcceleratorState().mixed_precision == "fp16":
        raise ValueError(f"mixed_precision='fp16' is not allowed with per-layer updates: {SCALER}.")


class PerLayerOptimizer(_Base):
    """What [`per_layer`] adds to an optimizer class.

    Groups, state, `state_dict` and what schedulers see are those of the class it is added to, so that checkpoints of the
    one load into the other. In backward, where accelerate says that gradients are synchronized (the last micro-batch of a
    step; always, outside of accelerate), each parameter is stepped as soon as its gradient is complete, and its `.grad`
    becomes `None`. `step()` steps the parameters that still have a gradient, and ends the step. What a loop of your own does
    to gradients in between, such as clipping, finds none; and it accumulates micro-batches with `Accelerator.accumulate`.
    A compiled model hands over the gradients of a whole graph at once.

    Attributes:
        grad_norm (`torch.Tensor`, *optional*):
            Norm of all gradients of the last step together: no dimensions, in the dtype of the gradients. `None` before
            the first step, and if nothing had a gradient.

    Raises:
        ValueError: In several processes, with accelerate's fp16, or when a `torch.amp.GradScaler` steps it.
        RuntimeError:
            In backward or `step()`, if a parameter gets a second gradient before the step has ended: an exception
            interrupted backward and it was called again, several losses are sent backward in one step, reentrant
            checkpointing of a parameter that several segments share, or a loop that calls `step()` of another optimizer.
    """

    # so that a GradScaler shows itself to `step()`
    _step_supports_amp_scaling = True
    # the step of the class it is added to; set by `per_layer`
    _ordinary_step: Callable[[torch.optim.Optimizer], Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _check_surroundings()
        self.grad_norm: torch.Tensor | None = None
        # of the parameters stepped since the last `step()`
        self._norms: dict[torch.Tensor, torch.Tensor] = {}
        # parameter -> its group and its place in it
        self._places: dict[torch.Tensor, tuple[int, int]] = {}
        super().__init__(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        self._places.update((p, (index, place)) for place, p in enumerate(self.param_groups[index]["params"]))
        self._hook(self.param_groups[index]["params"])

    def register_hooks(self) -> None:
        """Step all parameters inside backward again, after [`remove_hooks`] or another per-layer optimizer.

        A parameter that did not require a gradient when its hook was due is stepped by `step()` until this is called.
        """
        self._hook(self._places)

    def _hook(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        # parameters outlive optimizers
        method = weakref.WeakMethod(self._on_gradient)

        def hook(p: torch.Tensor) -> None:
            on_gradient = method()
            if on_gradient is not None:
                on_gradient(p)

        parameters = [p for p in parameters if p.requires_grad]
        remove_hooks(parameters)
        for p in parameters:
            _hooks[p] = p.register_post_accumulate_grad_hook(hook)

    @torch.no_grad()
    def _on_gradient(self, p: torch.Tensor) -> None:
        if not GradientState().sync_gradients:
            return
        if not self._norms:
            _check_surroundings()
        self._record(p)
        self._step_parameter(p)
        p.grad = None

    def _record(self, p: torch.Tensor) -> None:
        if p in self._norms:
            raise RuntimeError(
                f"Per-layer updates: a parameter of shape {tuple(p.shape)} got a second gradient before `step()` of its "
                "optimizer. If backward was interrupted, the model is between two steps: load the last checkpoint, "
                "optimizer included, or accept the half step with `optimizer.zero_grad(); optimizer.step()`. Otherwise "
                "send the sum of the losses backward once, accumulate micro-batches with `Accelerator.accumulate`, set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or, if another optimizer is in use, call "
                "`loqt_peft.training.per_layer.remove_hooks(model.parameters())`."
            )
        self._norms[p] = torch.linalg.vector_norm(p.grad)

    def _step_parameter(self, p: torch.Tensor) -> None:
        group_index, place = self._places[p]
        group = self.param_groups[group_index]
        if not isinstance(self, Optimizer8bit):
            # torch's step, on a view of this optimizer that holds nothing else
            view = object.__new__(type(self))
            view.__dict__ = {**self.__dict__, "param_groups": [{**group, "params": [p]}]}
            self._ordinary_step(view)
            return
        # The overrides of bitsandbytes go by group and place. Its step, for one parameter:
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        if not self.state[p]:
            self.init_state(group, p, group_index, place)
        self.prefetch_state(p)
        self.update_step(group, p, group_index, place)
        if self.is_paged:
            # pages move on a stream of their own
            sync_gpu(p)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if hasattr(self, "found_inf"):
            raise ValueError(f"GradScaler is not allowed with per-layer updates: {SCALER}.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p in self._places:
            if p.grad is not None:
                self._record(p)
        self._ordinary_step(self)
        self.grad_norm = (
            get_total_norm([self._norms[p] for p in self._places if p in self._norms]) if self._norms else None
        )
        self._norms.clear()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().load_state_dict(state_dict, *args, **kwargs)
        self._norms.clear()


@functools.cache
def per_layer(optimizer_class: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The per-layer variant of an optimizer class: gradients are applied and freed inside backward.

    It takes the arguments of `optimizer_class` and moves the parameters to the same bits. See [`PerLayerOptimizer`]; with
    the Trainer's arguments at hand, [`per_layer_optimizer`] says the same in fewer words.

    ```py
    Trainer(..., optimizer_cls_and_kwargs=(per_layer(torch.optim.AdamW), {"lr": 0.01}))
    ```

    Args:
        optimizer_class (`type`): `torch.optim.Adam`, `torch.optim.AdamW`, or an optimizer of bitsandbytes.

    Raises:
        ValueError: For any other class: what it keeps for several parameters together would be wrong.
    """
    # AdamW is an Adam of torch's from 2.7 on
    known = (torch.optim.Adam, torch.optim.AdamW, Optimizer8bit)
    supported = isinstance(optimizer_class, type) and issubclass(optimizer_class, known)
    if not supported or issubclass(optimizer_class, PerLayerOptimizer):
        raise ValueError(
            f"optimizer_class={getattr(optimizer_class, '__name__', optimizer_class)} is not allowed: per-layer updates are "
            "made for torch.optim.Adam, torch.optim.AdamW and the optimizers of bitsandbytes. Use one of these."
        )
    # torch wraps the step of a class in the user's hooks when it is first instantiated; those are called by our own step
    step = inspect.unwrap(optimizer_class.step, stop=lambda function: not getattr(function, "hooked", False))
    name = f"per_layer({optimizer_class.__module__}.{optimizer_class.__qualname__})"
    # The Trainer keeps the state of embeddings in 32 bits if it reads "bitsandbytes" in the name of the class.
    return type(
        name, (PerLayerOptimizer, optimizer_class), {"__module__": __name__, "_ordinary_step": staticmethod(step)}
    )


def per_layer_optimizer(args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer that `args.optim` names, with per-layer updates, as the Trainer's `optimizer_cls_and_kwargs`.

    ```py
    args = TrainingArguments(optim="adamw_bnb_8bit", learning_rate=0.02, max_grad_norm=0, ...)
    trainer = Trainer(model, args, optimizer_cls_and_kwargs=per_layer_optimizer(args), ...)
    ```

    Args:
        args (`TrainingArguments`):
            With an `optim` of AdamW (`adamw_torch`, `adamw_torch_fused`) or bitsandbytes (e.g. `adamw_bnb_8bit`,
            `paged_adamw_8bit`). Learning rate, betas, epsilon and weight decay are respected as always.

    Raises:
        ValueError:
            If `args.optim` is another one, or for what [`check_training_arguments`] does not allow.
    """
    check_training_arguments(args)
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    try:
        return per_layer(optimizer_class), kwargs
    except ValueError as error:
        raise ValueError(
            f"optim={args.optim.value!r} is not allowed with per-layer updates. Use 'adamw_torch', 'adamw_torch_fused', or "
            "one of bitsandbytes, e.g. 'adamw_bnb_8bit' or 'paged_adamw_8bit'."
        ) from error


def check_training_arguments(args: TrainingArguments) -> None:
    """Refuse what the Trainer does between backward and the optimizer's step: with per-layer updates it comes too late.

    Raises:
        ValueError: For `max_grad_norm` above 0, `fp16`, several processes or `auto_find_batch_size`.
    """
    if args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm={args.max_grad_norm} is not allowed with per-layer updates: clipping needs the norm of all "
            "gradients before the first of them is applied. Set max_grad_norm=0, or use the ordinary optimizer."
        )
    if args.fp16:
        raise ValueError(f"fp16=True is not allowed with per-layer updates: {SCALER}=True.")
    if args.world_size > 1:
        raise ValueError(
            f"Per-layer updates are not allowed with {args.world_size} processes: {DISTRIBUTED}, or use the ordinary "
            "optimizer."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True is not allowed with per-layer updates: a batch that runs out of memory has changed "
            "a part of the model. Set per_device_train_batch_size instead."
        )
