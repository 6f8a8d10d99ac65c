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
    return [finding for base, configs in _bases(model) for finding in _findings_of(base, configs)]


def _findings_of(base: PreTrainedModel, configs: dict[str, LoQTConfig]) -> list[Finding]:
    names = {config.base_model_name_or_path or base.name_or_path or "" for config in configs.values()}
    missing = sorted(name for name in names if not name or (os.path.isabs(name) and not os.path.exists(name)))
    if not missing:
        return []
    what = f"its path {missing[0]!r} does not exist" if missing[0] else "it has no `name_or_path`"
    is_whole = all(config.full_rank_modules for config in configs.values())
    return [
        Finding(
            "warning",
            "base_without_name",
            f"The base model, a {type(base).__name__}, cannot be found again: {what}. A LoQT adapter is saved as a "
            "change of its base, so that neither `AutoPeftModel` nor `python -m loqt_peft export` can load it."
            + ("" if is_whole else " Without the base the adapter is lost."),
            "Before `get_peft_model` save the base and name it: `base.save_pretrained(path)`, "
            "`base.name_or_path = path`.",
        )
    ]


def report_base_name(model: nn.Module) -> None:
    """Warn of what [`base_name_findings`] finds, once for each base."""
    new = [(base, configs) for base, configs in _bases(model) if not vars(base).get("_loqt_name_checked")]
    for base, _ in new:
        base._loqt_name_checked = True
    report(finding for base, configs in new for finding in _findings_of(base, configs))


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
