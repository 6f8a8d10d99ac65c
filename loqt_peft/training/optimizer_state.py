"""What optimizers keep of B, and what becomes of it at a switch, when B gets another value in another subspace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

from ..algorithm.precision import without_autocast
from ..dtensor import full, write
from ..findings import Finding
from .zero import has_parts, state_of_parts, turn_moments, zero_findings


if TYPE_CHECKING:
    from ..layers.layer import LoQTLayer

# What there is in the state of a parameter, by key, in the parameter's shape.
# Averages of gradients, which turn with the subspace: torch, transformers, bitsandbytes, torchao, grokadamw, torch-optimi.
FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "state1", "grok_ema", "exp_avg_diff", "prev_grad", "prev")
# Sizes, without a sign: they stay with the coordinates of B.
SECOND_MOMENTS = (
    "exp_avg_sq",
    "max_exp_avg_sq",
    "square_avg",
    "acc_delta",
    "exp_inf",
    "sum",
    "step_size",
    "state2",
)
# Of RMSprop: its square is taken off another moment, so that the two must not part.
CENTRE = "grad_avg"
# Second copies of the parameter: schedule-free's z and x, ASGD's average, the slow weights of Ranger and Lookahead.
COPIES = ("z", "x", "ax", "la_param", "slow_buffer")
# What rounding the parameter has left over: torch-optimi, torchdistx.
ROUNDING = ("kahan_comp", "compensation")
KNOWN = {*FIRST_MOMENTS, *SECOND_MOMENTS, CENTRE, *COPIES, *ROUNDING}
# optimizers of bitsandbytes of which `state1` is a second moment
SQUARES_FIRST = ("rmsprop", "adagrad")
# of bitsandbytes' 8-bit states
MOMENT_BLOCKSIZE = 256


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer in the wrapper of accelerate."""
    return getattr(optimizer, "optimizer", optimizer)


def _states(optimizer: torch.optim.Optimizer, B: torch.Tensor) -> Iterator[dict[torch.Tensor, Any]]:
    """The dictionaries, by parameter, in which an optimizer keeps something of B."""
    # GrokAdamW keeps its state in the groups
    for states in (optimizer.state, *(group.get("state") for group in optimizer.param_groups)):
        if isinstance(states, dict) and B in states:
            yield states


###############################
# Checks
###############################


def optimizer_findings(
    layers: Iterable[tuple[str, LoQTLayer]], adapter_name: str, optimizer: torch.optim.Optimizer | None
) -> list[Finding]:
    """What an update could not treat rightly of an optimizer's state, before or after its first step.

    Args:
        layers: The LoQT layers that train, with their names.
        adapter_name (`str`): The adapter that trains.
        optimizer (`torch.optim.Optimizer`, *optional*): What steps B. `None`: not given to `end_step`.
    """
    layers = [layer for _, layer in layers]
    treatment = layers[0].config[adapter_name].optimizer_state
    if optimizer is None:
        return _not_given_findings(treatment)
    if has_parts(layers[0].loqt_B[adapter_name]):
        return zero_findings(optimizer, treatment, FIRST_MOMENTS, COPIES)
    optimizer = inner_optimizer(optimizer)
    all_B = [layer.loqt_B[adapter_name] for layer in layers]
    groups = [group for group in optimizer.param_groups if any(B is p for p in group["params"] for B in all_B[:1])]
    found = _kind_findings(optimizer, groups, treatment)
    if treatment == "rotate":
        found += _rotation_findings(optimizer, groups, all_B)
    if treatment != "reset":
        found += _unknown_findings(optimizer, all_B)
    return found


def _not_given_findings(treatment: str) -> list[Finding]:
    if treatment == "keep":
        return []
    return [
        Finding(
            "warning",
            "optimizer_not_given",
            f"optimizer_state={treatment!r} has no effect: the update was not given the optimizer.",
            "Call `model.end_step(optimizer)`.",
        )
    ]


def _refusal(code: str, what: str, remedy: str = "Use optimizer_state='keep' or 'reset', or AdamW.") -> list[Finding]:
    return [Finding("error", code, what, remedy)]


def _kind_findings(optimizer: torch.optim.Optimizer, groups: list[dict], treatment: str) -> list[Finding]:
    """Optimizers that do not step B itself at full rank, or keep its state out of reach."""
    name, module = type(optimizer).__name__, type(optimizer).__module__
    found = []
    if module.startswith("torchao.") and name == "CPUOffloadOptimizer":
        found += _refusal(
            "optimizer_with_master_copy",
            f"{name} steps a copy of B on the CPU and writes it over B, so that what an update writes into B is lost.",
            "Use AdamW8bit or AdamW4bit of torchao, or 'paged_adamw_8bit' of bitsandbytes.",
        )
    if any("rank" in group for group in groups):
        found += _refusal(
            "low_rank_optimizer",
            f"{module}.{name} makes a low rank of the gradients of B, in a subspace that it does not leave at an update. B is "
            "of low rank already.",
            "Give it B in a group without 'rank', or use AdamW.",
        )
    if treatment == "reset" and module.startswith("lomo_optim") and hasattr(optimizer, "exp_avg_sq_row"):
        found += _refusal(
            "optimizer_state_elsewhere",
            f"optimizer_state='reset' cannot reset {name}, which keeps its moments apart from the parameters.",
            "Use optimizer_state='keep', or AdamW.",
        )
    return found


def _rotation_findings(
    optimizer: torch.optim.Optimizer, groups: list[dict], all_B: list[torch.Tensor]
) -> list[Finding]:
    """First moments that cannot be turned into the new subspace."""
    name, module = type(optimizer).__name__, type(optimizer).__module__
    found = []
    if isinstance(optimizer, (bnb.optim.AdEMAMix, bnb.optim.AdEMAMix32bit)):
        found += _refusal(
            "two_first_moments", f"optimizer_state='rotate' cannot rotate the two first moments of {name}."
        )
    if module.startswith("schedulefree") or any(_holds(optimizer, B, ("z",)) for B in all_B):
        found += _refusal(
            "moment_between_copies",
            f"optimizer_state='rotate' cannot rotate what {name} has of a first moment: it lies between two copies of B.",
        )
    if any(group.get("centered") for group in groups):
        found += _refusal(
            "centered_moment",
            f"optimizer_state='rotate' cannot rotate the mean of a centered {name}: it would no longer fit its variance.",
            "Set centered=False, or use optimizer_state='keep' or 'reset'.",
        )
    return found


def _unknown_findings(optimizer: torch.optim.Optimizer, all_B: list[torch.Tensor]) -> list[Finding]:
    """State of a kind that LoQT does not know."""
    unknown = sorted({key for B in all_B for key in _unknown(optimizer, B)})
    if not unknown:
        return []
    name, module = type(optimizer).__name__, type(optimizer).__module__
    return [
        Finding(
            "warning",
            "unknown_optimizer_state",
            f"{module}.{name} keeps {', '.join(map(repr, unknown))} of B, in the shape of B, and LoQT does not know what "
            "that is. It is left as it is at updates, which is wrong of a copy of B.",
            "Use optimizer_state='reset' if in doubt.",
        )
    ]


def _tensors(optimizer: torch.optim.Optimizer, B: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for states in _states(optimizer, B):
        for key, value in states[B].items():
            if isinstance(value, torch.Tensor) and B.numel() > 1 and value.numel() == B.numel():
                yield key, value


def _holds(optimizer: torch.optim.Optimizer, B: torch.Tensor, keys: tuple[str, ...]) -> bool:
    return any(key in keys for key, _ in _tensors(optimizer, B))


def _unknown(optimizer: torch.optim.Optimizer, B: torch.Tensor) -> set[str]:
    return {key for key, _ in _tensors(optimizer, B)} - KNOWN


###############################
# Treatment
###############################


@torch.no_grad()
@without_autocast
def treat_optimizer_state(
    layer: LoQTLayer, adapter_name: str, optimizer: torch.optim.Optimizer, P_old: torch.Tensor | None = None
) -> None:
    """Make what an optimizer keeps of B fit the B and P that a switch has written.

    With every `optimizer_state`, copies of B become B, and what rounding B had left over becomes zero: a step at rate 0
    then leaves B as it is. First moments are forgotten with "reset", and with "rotate" turned into the new subspace.

    Args:
        layer ([`~loqt_peft.layers.layer.LoQTLayer`]): After its switch.
        adapter_name (`str`): The adapter.
        optimizer (`torch.optim.Optimizer`): What steps B; one in which [`optimizer_findings`] finds no error.
        P_old (`torch.Tensor`, *optional*): With "rotate", the projection of before: float32 `[r, in]` or `[out, r]`.
    """
    B, treatment = layer.loqt_B[adapter_name], layer.config[adapter_name].optimizer_state
    if has_parts(B):
        if treatment == "rotate":
            keys = [key for key in state_of_parts(optimizer) if key in FIRST_MOMENTS]
            P_new = layer.projection(adapter_name)
            turn_moments(B, keys, lambda moment: _turned(moment, P_old, P_new, layer.right))
        return
    optimizer = inner_optimizer(optimizer)
    if treatment == "reset":
        for states in list(_states(optimizer, B)):
            if isinstance(optimizer, torch.optim.Adagrad):
                # which of some versions of torch makes its state with itself only
                states[B]["sum"].fill_(optimizer.defaults["initial_accumulator_value"])
                states[B]["step"].zero_()
            else:
                del states[B]
        return
    for key, value in list(_tensors(optimizer, B)):
        if key in COPIES:
            value.copy_(B.view_as(value))
        elif key in ROUNDING:
            value.zero_()
    if treatment == "rotate" and getattr(optimizer, "optimizer_name", None) not in SQUARES_FIRST:
        P_new = layer.projection(adapter_name)
        for states in _states(optimizer, B):
            for key in FIRST_MOMENTS:
                _rotate(states[B], key, B, P_old, P_new, layer.right)


def _rotate(state: dict[str, Any], key: str, B: torch.Tensor, P_old: torch.Tensor, P_new: torch.Tensor, right: bool):
    moment = state.get(key)
    if not isinstance(moment, torch.Tensor) or moment.shape != B.shape:
        return
    # a paged state is a tensor of the host
    values = full(moment).to(P_new.device)
    in_8_bits = moment.dtype == torch.uint8
    if in_8_bits:
        values = dequantize_blockwise(values, absmax=state["absmax1"], code=state["qmap1"], blocksize=MOMENT_BLOCKSIZE)
    elif type(values) is not torch.Tensor:
        # of torchao
        values = values.dequantize()
    values = _turned(values.float(), P_old, P_new, right)
    if in_8_bits:
        values, quantized = quantize_blockwise(values, code=state["qmap1"], blocksize=MOMENT_BLOCKSIZE)
        state["absmax1"].copy_(quantized.absmax)
    write(moment, values)


def _turned(moment: torch.Tensor, P_old: torch.Tensor, P_new: torch.Tensor, right: bool) -> torch.Tensor:
    # old coordinates -> weight space -> new coordinates
    return moment @ (P_old @ P_new.T) if right else (P_new.T @ P_old) @ moment
