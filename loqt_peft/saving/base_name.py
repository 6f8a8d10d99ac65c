"""Whether the base model of an adapter can be found again by those who load the adapter."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from ..findings import Finding, report


if TYPE_CHECKING:
    from ..config import LoQTConfig


def base_name_findings(model: nn.Module) -> list[Finding]:
    """Whether the base models of LoQT adapters can be found again by those who load the adapter.

    Args:
        model (`nn.Module`): A model with LoQT adapters, whatever wraps it.

    Returns:
        `list[Finding]`: A warning for each model of transformers without a name or path, or with the path of nothing.
    """
    findings = []
    for base, configs in _bases(model):
        names = {config.base_model_name_or_path or base.name_or_path or "" for config in configs.values()}
        missing = sorted(name for name in names if not name or (os.path.isabs(name) and not os.path.exists(name)))
        if missing:
            what = f"its path {missing[0]!r} does not exist" if missing[0] else "it has no `name_or_path`"
            lost = (
                ""
                if all(config.full_rank_modules for config in configs.values())
                else " Without the base the adapter is lost."
            )
            findings.append(
                Finding(
                    "warning",
                    "base_without_name",
                    f"The base model, a {type(base).__name__}, cannot be found again: {what}. A LoQT adapter is saved as a "
                    "change of its base, so that neither `AutoPeftModel` nor `python -m loqt_peft export` can load it."
                    + lost,
                    "Before `get_peft_model` save the base and name it: `base.save_pretrained(path)`, "
                    "`base.name_or_path = path`.",
                )
            )
    return findings


def report_base_name(model: nn.Module) -> None:
    """Warn of what [`base_name_findings`] finds, once for each base."""
    bases = [base for base, _ in _bases(model)]
    if not all(vars(base).get("_loqt_name_checked") for base in bases):
        for base in bases:
            base._loqt_name_checked = True
        report(base_name_findings(model))


def _bases(model: nn.Module) -> list[tuple[PreTrainedModel, dict[str, LoQTConfig]]]:
    """The models of transformers that hold LoQT adapters, with their configs."""
    found = []
    for module in model.modules():
        configs = vars(module).get("peft_config") if isinstance(module, PreTrainedModel) else None
        if isinstance(configs, dict):
            configs = {name: config for name, config in configs.items() if config.peft_type == "LOQT"}
            if configs:
                found.append((module, configs))
    return found
