"""What the fields of a [`~loqt_peft.LoQTConfig`] may be, each by itself and together."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig

from .choices import (
    INTERVAL_SCHEDULES,
    OPTIMIZER_STATES,
    PROJECTIONS,
    QUANT_TYPES,
    RETAIN_BASE,
    UPDATE_MODES,
)
from .saving.seal import FORMAT_VERSION, newer_version


def check_fields(config: PeftConfig) -> None:
    """Refuse a config with a field that is not allowed.

    Args:
        config ([`~loqt_peft.LoQTConfig`]): Its patterns are dicts, empty if there are none.

    Raises:
        ValueError: It names the first such field, its value and what is allowed.
    """
    _check_ranks_and_scales(config)
    _check_layer_choice(config)
    _check_storage(config)
    _check_updates(config)
    _check_full_rank_modules(config)
    _check_choice(config, "retain_base", RETAIN_BASE)
    _check_saved(config)


def _check(config: PeftConfig, name: str, allowed: bool, what: str) -> None:
    if not allowed:
        raise ValueError(f"{name}={getattr(config, name)!r} is not allowed: {what}.")


def _check_choice(config: PeftConfig, name: str, choices: tuple) -> None:
    _check(config, name, getattr(config, name) in choices, "one of " + ", ".join(map(repr, choices)))


def _check_at_least(config: PeftConfig, name: str, smallest: int) -> None:
    value = getattr(config, name)
    _check(config, name, _is_int(value) and value >= smallest, f"an integer of at least {smallest}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and abs(value) < float("inf")


def _check_ranks_and_scales(config: PeftConfig) -> None:
    _check_at_least(config, "r", 1)
    alpha = config.loqt_alpha
    _check(config, "loqt_alpha", alpha == "auto" or (_is_number(alpha) and alpha > 0), "a positive number, or 'auto'")
    ranks, scales = config.rank_pattern, config.alpha_pattern
    _check(
        config,
        "rank_pattern",
        isinstance(ranks, dict) and all(_is_int(r) and r >= 1 for r in ranks.values()),
        "a dict of names to integers of at least 1",
    )
    _check(
        config,
        "alpha_pattern",
        isinstance(scales, dict) and all(_is_number(s) and s > 0 for s in scales.values()),
        "a dict of names to positive numbers",
    )


def _check_layer_choice(config: PeftConfig) -> None:
    for name in ("layers_to_transform", "layers_pattern"):
        _check(
            config,
            name,
            getattr(config, name) is None or not isinstance(config.target_modules, str),
            "None when target_modules is a string",
        )
    _check(
        config,
        "layers_pattern",
        not config.layers_pattern or config.layers_to_transform is not None,
        "None when layers_to_transform is None",
    )


def _check_storage(config: PeftConfig) -> None:
    _check_choice(config, "quantize_weight", (*QUANT_TYPES, None))
    _check_choice(config, "quantize_projection", (*QUANT_TYPES, None))
    for name in ("double_quant", "error_feedback", "init_weights"):
        _check(config, name, isinstance(getattr(config, name), bool), "True or False")
    _check(
        config,
        "error_feedback",
        not config.error_feedback or config.quantize_weight is not None,
        "False with quantize_weight=None, which leaves no error",
    )


def _check_updates(config: PeftConfig) -> None:
    _check_choice(config, "update_mode", UPDATE_MODES)
    offload = config.offload_gradients
    _check(config, "offload_gradients", offload is None or isinstance(offload, bool), "True, False or None")
    _check_at_least(config, "compensation_steps", 0)
    _check_at_least(config, "update_interval", 1)
    _check_choice(config, "interval_schedule", INTERVAL_SCHEDULES)
    # gaps must not shrink to nothing
    smallest_growth = 0 if config.interval_schedule == "linear" else 1
    _check(
        config,
        "interval_growth",
        _is_number(config.interval_growth) and config.interval_growth >= smallest_growth,
        f"a finite number of at least {smallest_growth} with interval_schedule={config.interval_schedule!r}",
    )
    if config.max_interval is not None:
        _check_at_least(config, "max_interval", 1)
    _check_choice(config, "projection", PROJECTIONS)
    _check_choice(config, "optimizer_state", OPTIMIZER_STATES)


def _check_full_rank_modules(config: PeftConfig) -> None:
    names = config.full_rank_modules
    _check(
        config,
        "full_rank_modules",
        names is None or names == "all" or (not isinstance(names, str) and all(isinstance(n, str) for n in names)),
        "None, 'all' or a list of module names",
    )
    _check(
        config,
        "full_rank_modules",
        not isinstance(names, (list, set, tuple)) or not set(names) & set(config.modules_to_save or []),
        f"no module may be in modules_to_save={config.modules_to_save!r} too",
    )


def _check_saved(config: PeftConfig) -> None:
    _check_at_least(config, "num_updates", 0)
    if config.format_version is not None:
        _check_at_least(config, "format_version", 1)
        if config.format_version > FORMAT_VERSION:
            raise ValueError(
                f"format_version={config.format_version} is not allowed: {newer_version(config.format_version)}."
            )
