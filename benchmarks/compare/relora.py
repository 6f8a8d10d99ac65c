"""ReLoRA (arXiv 2307.05695) on PEFT's LoRA and the stock Trainer.

Every `restart_every` steps BA is merged into W, A and B start anew, and so do their optimizer states; the learning rate
warms up again. Unlike in the paper, training does not begin with a full-rank phase: GaLore's and LoQT's papers compare
without it, as the other methods have none.
"""

from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, get_scheduler


@torch.no_grad()
def merge_and_restart(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Merge every LoRA layer into its base weight, start A and B anew and forget their optimizer states."""
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for adapter in layer.active_adapters:
            base = layer.get_base_layer().weight
            base.add_(layer.get_delta_weight(adapter).to(base.dtype))
            layer.reset_lora_parameters(adapter, True)
            for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
                optimizer.state.pop(factor.weight, None)


class ReLoRACallback(TrainerCallback):
    """Merges and restarts every `restart_every` steps, but for the end of training.

    Attributes:
        restarts (`list[int]`): The steps after which it did.
    """

    def __init__(self, restart_every: int):
        self.restart_every = restart_every
        self.restarts: list[int] = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step % self.restart_every or state.global_step >= state.max_steps:
            return
        merge_and_restart(model, optimizer)
        self.restarts.append(state.global_step)


def _with_restarts(step: int, curve, restart_every: int, restart_warmup: int) -> float:
    since_restart = step % restart_every
    warm = step < restart_every or since_restart >= restart_warmup
    return curve(step) * (1.0 if warm else since_restart / restart_warmup)


def relora_schedule(
    optimizer: torch.optim.Optimizer, kind: str, warmup: int, steps: int, options: dict, every: int, again: int
) -> LambdaLR:
    """The Trainer's own schedule `kind`, which after each restart rises from 0 to its curve again.

    Args:
        warmup (`int`): Steps of the first warm-up.
        steps (`int`): Of the whole training.
        options (`dict`): As `lr_scheduler_kwargs`.
        every (`int`): Steps from restart to restart.
        again (`int`): Steps of the warm-up after a restart.
    """
    schedule = get_scheduler(kind, optimizer, warmup, steps, scheduler_specific_kwargs=options)
    schedule.lr_lambdas = [
        partial(_with_restarts, curve=curve, restart_every=every, restart_warmup=again)
        for curve in schedule.lr_lambdas
    ]
    return schedule
