"""What a loader brings into a model: its slots are made to fit, and it is verified before anything is computed with it."""

from __future__ import annotations

import contextlib
import warnings

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .config import LoQTConfig
from .dtensor import is_sharded_tensor
from .findings import Finding, LoQTWarning, report
from .layers.find import loqt_layers, state_dict_name
from .layers.full_rank import names_outside_layers
from .layers.layer import LoQTLayer
from .saving.seal import ERROR, TENSORS, canonical
from .saving.verify import verify_adapter


# in the keys of what belongs to a LoQT layer
_LOQT_PART = ".loqt_"


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, LoQTLayer]:
    """The layers of an adapter, by their names in the state dict."""
    return {state_dict_name(name): layer for name, layer in loqt_layers(model) if adapter_name in layer.loqt_B}


def layer_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Key in a checkpoint -> name in the model's state dict, of all that an adapter's layers may hold.

    PEFT finds them by the names of modules, and so none within activation checkpointing's wrappers.
    """
    keys = {}
    for name in layers_of(model, adapter_name):
        for part in (*TENSORS, ERROR, "loqt_seal"):
            keys[f"{name}.{part}"] = f"{name}.{part}.{adapter_name}"
            # where the layers were added without a PeftModel, the model's names lack the prefix of the checkpoint's
            keys.setdefault(f"base_model.model.{name}.{part}", f"{name}.{part}.{adapter_name}")
    return keys


def _embeddings(model: nn.Module) -> dict[str, nn.Module]:
    embeddings = []
    for side in ("input", "output"):
        # models of two towers, of images or of sound have no such module, and say so in this way
        with contextlib.suppress(AttributeError, NotImplementedError):
            embeddings.append(getattr(model, f"get_{side}_embeddings")())
    return {name: module for name, module in model.named_modules() if any(module is e for e in embeddings)}


def _uses_base(model: nn.Module, adapter_name: str, held: set[str]) -> bool:
    """Whether there are parameters that neither the adapter holds nor its own weights replace."""
    replaced = {f"{name}.base_layer.weight" for name in layers_of(model, adapter_name)}
    return any(
        not (name in held or name in replaced or ".loqt_B." in name or ".original_module." in name)
        for name, _ in model.named_parameters()
    )


def verify(model: nn.Module, config: LoQTConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """See `verify_adapter`; what `modules_to_save` brings has its name in the model already."""
    names = names_outside_layers(model, config, adapter_name)
    keys = {canonical(name): key for key, name in names.items()}
    # PEFT adds those of a resized vocabulary by itself, outside the reach of a tuner
    embeddings = tuple(f"{canonical(name)}." for name in _embeddings(model))
    adapter = {}
    for key, tensor in state_dict.items():
        key = canonical(key)
        if key in keys or key in names or _LOQT_PART in key or not key.startswith(embeddings):
            adapter[keys.get(key, key)] = tensor
    own = model.state_dict()
    warning = verify_adapter(
        layers_of(model, adapter_name),
        {key: own[name] for key, name in names.items()},
        adapter_name,
        adapter,
        base_is_needed=_uses_base(model, adapter_name, set(names.values())),
    )
    if warning:
        warnings.warn(warning, LoQTWarning, stacklevel=2)


def make_room(
    model: nn.Module, config: LoQTConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Make the slots of the layers, and `config.num_updates`, fit a checkpoint that has been verified.

    Args:
        model (`nn.Module`): The model that it is loaded into.
        config (`LoQTConfig`): The adapter's.
        adapter_name (`str`): Its name.
        state_dict (`dict[str, torch.Tensor]`): The checkpoint: keys without the adapter's name. It stays as it is.

    Returns:
        `dict[str, torch.Tensor]`: What is to be loaded: the checkpoint with zeros for its seals, which have served.
    """
    layers = layers_of(model, adapter_name)
    report(sharded_findings(layers, state_dict))
    # PEFT maps only keys that the model has a slot for
    state_dict = dict(state_dict)
    updates = [0]
    for verification in {layer.verifications.get(adapter_name) for layer in layers.values()} - {None}:
        verification.end()
    for name, layer in layers.items():
        prefix = name if f"{name}.loqt_P" in state_dict else f"base_model.model.{name}"
        layer.allocate(adapter_name, state_dict[f"{prefix}.loqt_P"], state_dict.get(f"{prefix}.loqt_weight"))
        updates.append(int(state_dict[f"{prefix}.loqt_state"][0]))
        state_dict[f"{prefix}.loqt_seal"] = torch.zeros_like(state_dict[f"{prefix}.loqt_seal"])
    config.num_updates = max(updates)
    return state_dict


def sharded_findings(layers: dict[str, LoQTLayer], state_dict: dict[str, torch.Tensor]) -> list[Finding]:
    """Whether whole tensors are to be loaded into layers of which each process holds a part."""
    sharded = any(is_sharded_tensor(layer.loqt_B[name]) for layer in layers.values() for name in layer.loqt_B)
    if not sharded or any(map(is_sharded_tensor, state_dict.values())):
        return []
    return [
        Finding(
            "error",
            "whole_into_sharded",
            "An adapter cannot be loaded into a model that FSDP2 has sharded, as when the Trainer resumes from a checkpoint "
            "that was saved without FSDP.",
            "Load it before the Trainer is made (`PeftModel.from_pretrained(..., is_trainable=True)`), or resume from a "
            "checkpoint of FSDP2.",
        )
    ]


def copy_or_await(model: nn.Module, config: LoQTConfig, adapter_name: str, source: str | None) -> None:
    """Fill a new adapter from another one of the model; or, if it is to be loaded, verify it on its first use.

    Args:
        model (`nn.Module`): The model that holds both.
        config (`LoQTConfig`): The new adapter's.
        adapter_name (`str`): The new adapter.
        source (`str`, *optional*): The adapter that it is a copy of.
    """
    layers = layers_of(model, adapter_name).values()
    if source is not None and config.num_updates and not any(layer.loqt_B[adapter_name].is_meta for layer in layers):
        for layer in layers:
            layer.verify(source)
            layer.copy_adapter(source, adapter_name)
    elif config.format_version is not None or config.num_updates:
        VerifyOnFirstUse(model, adapter_name)


def tie_weights_after_load(model: nn.Module, _incompatible_keys=None) -> None:
    # a loader that assigns, as with `low_cpu_mem_usage` or that of transformers, replaces one of two tied weights; a module of
    # which PEFT trains a copy is no longer tied
    copied = any(isinstance(module, AuxiliaryTrainingWrapper) for module in _embeddings(model).values())
    if hasattr(model, "tie_weights") and not copied:
        model.tie_weights()


class VerifyOnFirstUse:
    """Verifies an adapter before anything is computed with it, or made from it.

    Loaders other than PEFT's write into the model by themselves, and a config may say that something was to be loaded where
    nothing was. It is a forward pre-hook of every module, so that it does not matter which one is called, and each layer
    knows it (`LoQTLayer.verify`). Once there is nothing left to verify, nothing of it is left in the model.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.model = model
        self.adapter_name = adapter_name
        self.layers = list(layers_of(model, adapter_name).values())
        for layer in self.layers:
            layer.verifications[adapter_name] = self
        self.hooks = [module.register_forward_pre_hook(self) for module in model.modules()]

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple) -> None:
        if any(self.adapter_name in layer.active_adapters for layer in self.layers[:1]):
            self.verify()

    def verify(self) -> None:
        layers = layers_of(self.model, self.adapter_name)
        seals = [layer.loqt_seal[self.adapter_name] for layer in layers.values()]
        # zeros: PEFT loaded the adapter, or nobody did
        if any(seal.any() for seal in seals):
            self._verify_loaded(layers)
        elif layers:
            report(loading_findings(self.model.peft_config[self.adapter_name], self.adapter_name, layers))
        self.end()

    def _verify_loaded(self, layers: dict[str, LoQTLayer]) -> None:
        tie_weights_after_load(self.model)
        config, own = self.model.peft_config[self.adapter_name], self.model.state_dict()
        saved = {
            f"{name}.{part}": getattr(layer, part)[self.adapter_name]
            for name, layer in layers.items()
            for part in (*TENSORS, ERROR, "loqt_seal")
            if self.adapter_name in getattr(layer, part)
        }
        saved |= {key: own[name] for key, name in names_outside_layers(self.model, config, self.adapter_name).items()}
        verify(self.model, config, self.adapter_name, saved)
        for layer in layers.values():
            layer.leave_inference_mode()
            layer.loqt_seal[self.adapter_name].zero_()

    def end(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for layer in self.layers:
            layer.verifications.pop(self.adapter_name, None)


def loading_findings(config: LoQTConfig, adapter_name: str, layers: dict[str, LoQTLayer]) -> list[Finding]:
    """Whether an adapter whose config speaks of updates has been through any; without, it is the untrained base model."""
    if not config.num_updates or not layers or any(layer.num_updates(adapter_name) for layer in layers.values()):
        return []
    return [
        Finding(
            "error",
            "nothing_loaded",
            f"The LoQT adapter {adapter_name!r} was made with a config of num_updates={config.num_updates}, that of a trained "
            "adapter, but nothing was loaded into it.",
            "Load it with `PeftModel.from_pretrained` or `load_adapter`; to copy an adapter of this model, pass the very "
            "config, `model.peft_config[name]`; to train a new one with these settings, set `config.num_updates = 0` first.",
        )
    ]
