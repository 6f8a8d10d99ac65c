"""How each method prepares model, optimizer and callbacks for the stock Trainer."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate.state import GradientState
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback, TrainingArguments
from transformers.utils.import_utils import is_apollo_torch_available, is_galore_torch_available

from benchmarks.compare.measures import SwitchLosses
from benchmarks.compare.relora import ReLoRACallback, relora_schedule
from loqt_peft import LoQTConfig, PerformanceCallback
from loqt_peft.training.update import begin_step


# what transformers' own messages say to install is the head of a branch
PACKAGES = {
    "galore": (is_galore_torch_available, "galore-torch"),
    "apollo": (is_apollo_torch_available, "apollo-torch"),
}


def missing_packages(methods) -> list[str]:
    """The packages that these methods need and that are not installed."""
    return sorted({name for m, (available, name) in PACKAGES.items() if m in methods and not available()})


@dataclass
class Prepared:
    """What a method gives to the Trainer; `arguments` are those of `TrainingArguments` that it needs to differ."""

    model: nn.Module
    callbacks: list[TrainerCallback]
    arguments: dict = field(default_factory=dict)
    schedule: Callable[[torch.optim.Optimizer, TrainingArguments], LRScheduler] | None = None


class LastMicroBatches(SwitchLosses):
    """Takes P from the last `count` micro-batches of an update step, and not from all."""

    def __init__(self, count: int, validation: torch.Tensor):
        super().__init__(validation)
        self.count = count
        self._done = 0

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._done = 0
        super().on_step_begin(args, state, control, model=model, **kwargs)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self._done += 1
        if args.gradient_accumulation_steps - self._done == self.count:
            # what was captured so far is dropped
            begin_step(model, state.global_step, lambda: GradientState().sync_gradients)


class ProjectionWatch(TrainerCallback):
    """Notes the steps at which GaLore or APOLLO took new projections.

    Attributes:
        steps (`list[int]`): Optimizer steps taken when it did, the one with the new projection included.
    """

    def __init__(self):
        self.steps: list[int] = []
        self._last = None

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        projectors = (values["projector"] for values in optimizer.state.values() if "projector" in values)
        projector = next(projectors, None)
        if projector is not None and projector.ortho_matrix is not self._last:
            self._last = projector.ortho_matrix
            self.steps.append(state.global_step + 1)


def targeted_modules(model: nn.Module) -> list[str]:
    """Names of the linear layers of the blocks: what every low-rank method works on."""
    head = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


def add_lora(model: nn.Module, fields: dict) -> nn.Module:
    """LoRA on the targeted layers; as with LoQT, everything else trains in place."""
    config = LoraConfig(r=fields["r"], lora_alpha=fields["lora_alpha"], target_modules=targeted_modules(model))
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    inside = {id(p) for m in adapted.modules() if isinstance(m, LoraLayer) for p in m.parameters()}
    for parameter in adapted.parameters():
        if id(parameter) not in inside:
            parameter.requires_grad = True
    return adapted


def rest_rate(spec: dict) -> float | None:
    """The factor on the learning rate of embeddings, norms and head, if a run has one."""
    return spec["candidate"] and spec["candidate"]["factor"]


def with_rest_at(
    factor: float, model: nn.Module, kind: type[torch.optim.Optimizer], options: dict
) -> torch.optim.Optimizer:
    """An optimizer of class `kind` with `options`, in which embeddings, norms and head train at `factor` times the rate."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    at_the_ends = {id(p) for module in ends for p in module.parameters()}
    blocks, rest = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (rest if parameter.ndim < 2 or id(parameter) in at_the_ends else blocks).append(parameter)
    groups = {"params": blocks}, {"params": rest, "lr": factor * options["lr"]}
    return kind(groups, **options)


def prepare(spec: dict, model: nn.Module, validation: torch.Tensor) -> Prepared:
    """The model as the method of `spec` trains it, and what the Trainer needs to know.

    Args:
        spec (`dict`): See [`settings.make_spec`].
        model (`nn.Module`): What the method starts from.
        validation (`torch.Tensor`): Token blocks `[blocks, length]`, whose loss is noted around the switches of LoQT.
    """
    method, fields = spec["method"], spec["fields"]
    if method.startswith("loqt"):
        adapted = get_peft_model(model, LoQTConfig(**fields), autocast_adapter_dtype=False)
        count = spec["projection_micro_batches"]
        callback = SwitchLosses(validation) if count is None else LastMicroBatches(count, validation)
        return Prepared(adapted, [callback])
    if method == "full":
        return Prepared(model, [PerformanceCallback()])
    if method == "lora":
        return Prepared(add_lora(model, fields), [PerformanceCallback()])
    if method == "relora":
        every, again = fields["restart_every"], fields["restart_warmup"]

        def schedule(optimizer, args):
            warmup = args.get_warmup_steps(args.max_steps)
            kind, options = args.lr_scheduler_type, args.lr_scheduler_kwargs
            return relora_schedule(optimizer, kind, warmup, args.max_steps, options, every, again)

        callbacks = [ReLoRACallback(every), PerformanceCallback()]
        return Prepared(add_lora(model, fields), callbacks, schedule=schedule)
    # a regex: of a list the Trainer warns that its names match modules that are not linear
    targets = "|".join(re.escape(name) for name in targeted_modules(model))
    options = ",".join(f"{name}={value}" for name, value in fields.items())
    arguments = {"optim_target_modules": targets, "optim_args": options}
    return Prepared(model, [ProjectionWatch(), PerformanceCallback()], arguments)
