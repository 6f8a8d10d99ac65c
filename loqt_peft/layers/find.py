"""The LoQT layers of a model, and those that train."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .layer import LoQTLayer


# in the names of modules, but not in those of a state dict: FSDP1, activation checkpointing
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def state_dict_name(name: str) -> str:
    """The name of a module or a parameter as a state dict has it, without what its wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def loqt_layers(model: nn.Module) -> Iterator[tuple[str, LoQTLayer]]:
    """All LoQT layers of a model, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoQTLayer))


def active_layers(model: nn.Module) -> tuple[str | None, list[tuple[str, LoQTLayer]]]:
    """The adapter that trains, and its layers; `(None, [])` if there is none.

    Raises:
        ValueError: If several LoQT adapters train at once: their changes to W could not be told apart.
    """
    return active_of(list(loqt_layers(model)))


def active_of(layers: list[tuple[str, LoQTLayer]]) -> tuple[str | None, list[tuple[str, LoQTLayer]]]:
    """[`active_layers`] of a model whose layers are known."""
    found: dict[str, list[tuple[str, LoQTLayer]]] = {}
    for name, layer in layers:
        for adapter_name in layer.active_adapters:
            if adapter_name in layer.loqt_B and layer.loqt_B[adapter_name].requires_grad:
                found.setdefault(adapter_name, []).append((name, layer))
    if len(found) > 1:
        raise ValueError(f"Only one LoQT adapter can train at a time, but these are active: {sorted(found)}.")
    return next(iter(found.items()), (None, []))
