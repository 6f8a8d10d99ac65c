"""What an adapter trains in place at full rank, and what it holds outside of LoQT layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..saving.seal import canonical
from .find import state_dict_name
from .layer import LoQTLayer


if TYPE_CHECKING:
    from ..config import LoQTConfig


def full_rank_parameters(model: nn.Module, config: LoQTConfig) -> dict[str, nn.Parameter]:
    """The parameters that `config.full_rank_modules` names, by their names in its state dict; tied ones once.

    Raises:
        ValueError: If a name matches no module, or one that is targeted or in `modules_to_save`.
    """
    wanted = config.full_rank_modules
    if not wanted:
        return {}
    # names of modules in which parameters belong to PEFT
    managed = {n: m for n, m in model.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))}

    def owner(parameter_name: str) -> str | None:
        parts = parameter_name.split(".")
        return next((key for i in range(len(parts)) if (key := ".".join(parts[:i])) in managed), None)

    if wanted == "all":
        selected = {}
        for name, parameter in model.named_parameters():
            managed_by = owner(name)
            is_bias = isinstance(managed.get(managed_by), LoQTLayer) and name == f"{managed_by}.base_layer.bias"
            if parameter.is_floating_point() and (managed_by is None or is_bias):
                selected[state_dict_name(name)] = parameter
        return selected

    selected = {}
    for module_name in wanted:
        keys = [n for n, _ in model.named_modules() if f".{state_dict_name(n)}".endswith(f".{module_name}")]
        if not keys:
            raise ValueError(
                f"full_rank_modules={module_name!r} is not allowed: the model has no module of that name."
            )
        for key in keys:
            for name, parameter in model.get_submodule(key).named_parameters(prefix=key):
                if owner(name) is not None:
                    raise ValueError(
                        f"full_rank_modules={module_name!r} is not allowed: {key!r} is or holds a module in target_modules "
                        "or modules_to_save."
                    )
                selected[state_dict_name(name)] = parameter
    # tied weights have several names
    names = {id(parameter): name for name, parameter in reversed(selected.items())}
    return {name: parameter for name, parameter in selected.items() if names[id(parameter)] == name}


def names_outside_layers(model: nn.Module, config: LoQTConfig, adapter_name: str) -> dict[str, str]:
    """Key in a checkpoint, without PEFT's prefix -> name in the model, of what an adapter holds outside LoQT layers."""
    names = {name: name for name in full_rank_parameters(model, config)}
    for module_name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module_name = state_dict_name(module_name)
            for saved, name in module.adapter_state_dict_load_map(adapter_name).items():
                names[f"{module_name}.{saved}"] = f"{module_name}.{name}"
    return {canonical(key): name for key, name in names.items()}
