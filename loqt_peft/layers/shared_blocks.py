"""Blocks that a model runs at several places with the same weights, made one module."""

from __future__ import annotations

from torch import nn


# classes in transformers of which the objects that share their weights differ in nothing else
_SHARED = ("Zamba2AttentionDecoderLayer", "ZambaAttentionDecoderLayer")


def join_shared_blocks(model: nn.Module) -> None:
    """Put the first of the blocks that share all their weights in the place of the others, as ALBERT has it from the start.

    A layer in two modules would be two LoQT layers of one weight; in one module that runs twice it is one.
    """
    first: dict[tuple[int, ...], nn.Module] = {}
    for name, module in list(model.named_modules()):
        if type(module).__name__ in _SHARED:
            weights = tuple(id(parameter) for parameter in module.parameters())
            if first.setdefault(weights, module) is not module:
                model.set_submodule(name, first[weights])
