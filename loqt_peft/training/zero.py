"""B under DeepSpeed's ZeRO 1 and 2: what an optimizer steps is a copy of B in float32, of which each process has a part.

An update writes B into the model as always. Without the same values in the copy, the next step would bring the old B back.
Everything here goes through DeepSpeed's own functions (0.19).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from torch import nn

from ..findings import Finding


def has_parts(B: nn.Parameter) -> bool:
    """Whether an optimizer of DeepSpeed keeps a copy of B, of which processes have parts."""
    # None on a process without a part
    return hasattr(B, "_hp_mapping")


def write_parts(B: nn.Parameter) -> None:
    """Make the copy of B, if there is one, what B is. Without word to the other processes."""
    if has_parts(B):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(B, B.detach().float())


def turn_moments(B: nn.Parameter, keys: list[str], turn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the moments of B; all processes must call this.

    Args:
        B (`nn.Parameter`): One that [`has_parts`].
        keys (`list[str]`): The moments' names.
        turn (`Callable`): From a moment, float32 in the shape of B, to what it shall be.
    """
    from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

    for key in keys:
        moment = turn(safe_get_full_optimizer_state(B, key))
        safe_set_full_optimizer_state(B, moment.contiguous(), key)


def state_of_parts(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the optimizer keeps of one of the flat parts that it steps; empty before its first step."""
    # wrapped by accelerate, and by DeepSpeed
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return next((state for state in optimizer.state.values() if state), {})


def zero_findings(
    optimizer: torch.optim.Optimizer, treatment: str, known: tuple[str, ...], copies: tuple[str, ...]
) -> list[Finding]:
    """What an update could not treat rightly of the state of an optimizer under ZeRO.

    Args:
        optimizer (`torch.optim.Optimizer`): What steps the parts.
        treatment (`str`): `optimizer_state` of the config.
        known (`tuple[str, ...]`): Names of first moments.
        copies (`tuple[str, ...]`): Names of second copies of the parameter.
    """
    if treatment == "reset":
        return [
            Finding(
                "error",
                "zero_reset",
                "optimizer_state='reset' is not allowed with DeepSpeed's ZeRO: the optimizer counts the steps of all "
                "parameters together, and corrects the bias of moments by that count, so that those of B cannot begin anew.",
                "Use optimizer_state='keep' or 'rotate'.",
            )
        ]
    state = state_of_parts(optimizer)
    if any(key in state for key in copies):
        return [
            Finding(
                "error",
                "zero_copies",
                "The optimizer keeps a second copy of B in flat parts of DeepSpeed's ZeRO, into which an update cannot write.",
                "Use optim='adamw_torch'.",
            )
        ]
    in_32_bits = [key for key, value in state.items() if key in known and value.is_floating_point()]
    if treatment == "rotate" and state and not in_32_bits:
        return [
            Finding(
                "error",
                "zero_rotate",
                "optimizer_state='rotate' finds no first moment in float32 that it could rotate under DeepSpeed's ZeRO.",
                "Use optim='adamw_torch', or optimizer_state='keep'.",
            )
        ]
    return []


def zero_stage_findings(plugin: DeepSpeedPlugin | None) -> list[Finding]:
    """Whether an update can write what DeepSpeed keeps at its stage; nothing without DeepSpeed.

    Args:
        plugin (`DeepSpeedPlugin`, *optional*): Of accelerate's state.
    """
    if plugin is None or plugin.zero_stage in (1, 2):
        return []
    reasons = {
        0: "without ZeRO DeepSpeed keeps copies of B that its functions do not reach",
        3: "between the passes of a layer ZeRO-3 takes B and the base weights away, and an update reads them there",
    }
    return [
        Finding(
            "error",
            "zero_stage",
            f"Stage {plugin.zero_stage} of DeepSpeed's ZeRO is not supported: {reasons.get(plugin.zero_stage, 'unknown')}.",
            "Set zero_stage to 1 or 2, or use FSDP2 (`fsdp_version: 2`), which shards weights too.",
        )
    ]
