"""Hooks that others have registered on a layer, when another module takes its place."""

from __future__ import annotations

from torch import nn


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


def swap_hooks(one: nn.Module, other: nn.Module) -> None:
    """Exchange all hooks on forward and backward passes; their handles go on working."""
    for name in _HOOKS:
        # the very dicts, which the handles refer to
        one.__dict__[name], other.__dict__[name] = other.__dict__[name], one.__dict__[name]
