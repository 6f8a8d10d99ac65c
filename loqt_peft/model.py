"""The tuner: which modules become LoQT layers, what is saved with an adapter, and its life cycle."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import bitsandbytes as bnb
import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, resolve_quantization_backend
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from .checkpoint import ERROR, TENSORS, canonical, seal_adapter, verify_adapter
from .config import LoQTConfig
from .layer import Linear, LoQTLayer
from .target_modules import TARGET_MODULES_MAPPING
from .update import LoQTUpdate, begin_step, cancel_step, end_step, loqt_layers


if TYPE_CHECKING:
    from .export import ExportReport

# in the names of modules, but not in those of the state dict
_FSDP_PREFIX = "_fsdp_wrapped_module."

SUPPORTED = "nn.Linear, bitsandbytes' Linear4bit and transformers' Conv1D"


def full_rank_parameters(model: nn.Module, config: LoQTConfig) -> dict[str, nn.Parameter]:
    """The parameters that `config.full_rank_modules` names, by their names in `model`; tied ones once.

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
                selected[name] = parameter
        return selected

    selected = {}
    for module_name in wanted:
        keys = [n for n, _ in model.named_modules() if n == module_name or n.endswith(f".{module_name}")]
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
                selected[name] = parameter
    # tied weights have several names
    names = {id(parameter): name for name, parameter in reversed(selected.items())}
    return {name: parameter for name, parameter in selected.items() if names[id(parameter)] == name}


def _layers_of(model: nn.Module, adapter_name: str) -> dict[str, LoQTLayer]:
    """The layers of an adapter, by their names in the state dict."""
    return {
        name.removeprefix(_FSDP_PREFIX): layer for name, layer in loqt_layers(model) if adapter_name in layer.loqt_B
    }


def _rest_names(model: nn.Module, config: LoQTConfig, adapter_name: str) -> dict[str, str]:
    """Key in a checkpoint, without PEFT's prefix -> name in the model, of what an adapter holds outside LoQT layers."""
    names = {name: name for name in full_rank_parameters(model, config)}
    for module_name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module_name = module_name.removeprefix(_FSDP_PREFIX)
            for saved, name in module.adapter_state_dict_load_map(adapter_name).items():
                names[f"{module_name}.{saved}"] = f"{module_name}.{name}"
    return {canonical(key): name for key, name in names.items()}


def _embedding_names(model: nn.Module) -> set[str]:
    embeddings = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    return {name for name, module in model.named_modules() if any(module is e for e in embeddings)}


def _uses_base(model: nn.Module, adapter_name: str, held: set[str]) -> bool:
    """Whether there are parameters that neither the adapter holds nor its drifted weights replace."""
    replaced = {f"{name}.base_layer.weight" for name in _layers_of(model, adapter_name)}
    return any(
        not (name in held or name in replaced or ".loqt_B." in name or ".original_module." in name)
        for name, _ in model.named_parameters()
    )


def _verify(model: nn.Module, config: LoQTConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """See `verify_adapter`; what `modules_to_save` brings has its name in the model already."""
    names = _rest_names(model, config, adapter_name)
    keys = {canonical(name): key for key, name in names.items()}
    # PEFT adds those of a resized vocabulary by itself, outside the reach of a tuner
    embeddings = {canonical(name) for name in _embedding_names(model)}
    adapter = {}
    for key, tensor in state_dict.items():
        key = canonical(key)
        if key in keys or key.rpartition(".")[0] not in embeddings:
            adapter[keys.get(key, key)] = tensor
    own = model.state_dict()
    warning = verify_adapter(
        _layers_of(model, adapter_name),
        {key: own[name] for key, name in names.items()},
        adapter_name,
        adapter,
        base_is_needed=_uses_base(model, adapter_name, set(names.values())),
    )
    if warning:
        warnings.warn(warning, stacklevel=2)


def _tie_weights_after_load(model: nn.Module, _incompatible_keys=None) -> None:
    # a loader that assigns, as with `low_cpu_mem_usage` or that of transformers, replaces one of two tied weights
    if hasattr(model, "tie_weights"):
        model.tie_weights()


class _VerifyOnFirstForward:
    """Forward pre-hook for loaders that write into the model by themselves, as transformers' `load_adapter` does."""

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.adapter_name = adapter_name
        self.id = model.register_forward_pre_hook(self).id

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple) -> None:
        layers = _layers_of(model, self.adapter_name)
        seals = [layer.loqt_seal[self.adapter_name] for layer in layers.values()]
        # zeros: PEFT loaded the adapter, or nobody did
        if any(seal.any() for seal in seals):
            _tie_weights_after_load(model)
            config, own = model.peft_config[self.adapter_name], model.state_dict()
            saved = {
                f"{name}.{part}": getattr(layer, part)[self.adapter_name]
                for name, layer in layers.items()
                for part in (*TENSORS, ERROR, "loqt_seal")
                if self.adapter_name in getattr(layer, part)
            }
            saved |= {key: own[name] for key, name in _rest_names(model, config, self.adapter_name).items()}
            _verify(model, config, self.adapter_name, saved)
            for seal in seals:
                seal.zero_()
        model._forward_pre_hooks.pop(self.id, None)


class LoQTModel(BaseTuner):
    """A model with LoQT adapters on its linear layers (arXiv 2405.16528).

    Created by `get_peft_model(model, LoQTConfig(...))`. With the Trainer, pass `callbacks=[LoQTTrainerCallback()]`. In a
    loop of your own:

    ```py
    for step, batch in enumerate(dataloader):
        model.begin_step(step, lambda: True)  # no gradient accumulation: every backward pass is a step's last
        model(**batch).loss.backward()
        optimizer.step()
        model.end_step(optimizer)
        optimizer.zero_grad()
    ```
    """

    prefix: str = "loqt_"
    tuner_layer_cls = LoQTLayer
    target_module_mapping: dict[str, list[str]] = TARGET_MODULES_MAPPING

    ###############################
    # Training
    ###############################

    def begin_step(self, step: int, is_last_backward: Callable[[], bool] | None = None) -> bool:
        """Before the first forward pass of optimizer step `step`; see [`loqt_peft.update.begin_step`]."""
        return begin_step(self, step, is_last_backward)

    def end_step(self, optimizer: torch.optim.Optimizer | None = None) -> LoQTUpdate | None:
        """Between `optimizer.step()` and `optimizer.zero_grad()`; see [`loqt_peft.update.end_step`]."""
        return end_step(self, optimizer)

    def cancel_step(self) -> None:
        """Drop what a step captured that will not be finished."""
        cancel_step(self)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DDP would broadcast every buffer at every forward pass; the update keeps W and P equal on all processes. The
        # names are those in the PeftModel, which is what DDP wraps.
        containers = ("loqt_P", "loqt_weight", "loqt_error", "loqt_state", "loqt_seal")
        return [
            f"base_model.{name}.{container}.{adapter_name}"
            for name, layer in loqt_layers(self)
            for container in containers
            for adapter_name in getattr(layer, container)
        ]

    ###############################
    # Injection
    ###############################

    def _prepare_adapter_config(self, peft_config: LoQTConfig, model_config: dict) -> LoQTConfig:
        if peft_config.target_modules is None:
            targets = self.target_module_mapping.get(model_config.get("model_type"), INCLUDE_LINEAR_LAYERS_SHORTHAND)
            # PEFT keeps names as a set
            peft_config.target_modules = targets if isinstance(targets, str) else set(targets)  # type: ignore[assignment]
        return peft_config

    def _check_new_adapter_config(self, config: LoQTConfig) -> None:
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1:
            for name, other in self.peft_config.items():
                if other.retain_base == "drop":
                    raise ValueError(
                        f"retain_base='drop' of adapter {name!r} is not allowed with several adapters: each is a change of "
                        "the original base weights."
                    )
            if sum(bool(other.full_rank_modules) for other in self.peft_config.values()) > 1:
                raise ValueError(
                    "full_rank_modules is allowed for one adapter only: it trains the base model in place."
                )

    def _create_and_replace(
        self,
        loqt_config: LoQTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        r_key = get_pattern_key(loqt_config.rank_pattern.keys(), current_key)
        alpha_key = get_pattern_key(loqt_config.alpha_pattern.keys(), current_key)
        r = loqt_config.rank_pattern.get(r_key, loqt_config.r)
        scaling = loqt_config.alpha_pattern.get(alpha_key, loqt_config.loqt_alpha)

        if isinstance(target, LoQTLayer):
            target.update_layer(adapter_name, r, scaling, loqt_config)
            return
        self._check_target(target, parent, current_key)
        new_module = Linear(target, adapter_name, r, scaling, loqt_config, seed=zlib.crc32(current_key.encode()))
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _check_target(self, target: nn.Module, parent: nn.Module, key: str) -> None:
        backend = resolve_quantization_backend(target)
        supported = isinstance(target, (nn.Linear, Conv1D)) and (
            backend is None or isinstance(target, bnb.nn.Linear4bit)
        )
        if not supported:
            raise ValueError(
                f"Target module {key!r} is a {type(target).__name__}, which LoQT does not support: only {SUPPORTED}."
            )
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"Target module {key!r} lies inside nn.MultiheadAttention, which uses its weight without calling it. Add it "
                "to exclude_modules."
            )
        for name, module in self.model.named_modules():
            if module is not target and getattr(module, "weight", None) is target.weight:
                raise ValueError(
                    f"Target module {key!r} shares its weight with {name!r}. LoQT would change the one and not the other. "
                    "Untie them (`tie_word_embeddings=False`), or leave it out of target_modules."
                )

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        self._set_full_rank_requires_grad()

    def _set_full_rank_requires_grad(self) -> None:
        for adapter_name, config in self.peft_config.items():
            trains = adapter_name in self.active_adapters and not config.inference_mode
            for parameter in full_rank_parameters(self.model, config).values():
                parameter.requires_grad = trains

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._set_full_rank_requires_grad()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # B only, and in place: it must stay the Parameter that an optimizer may hold, and a dense W or P in 16 bits is
        # meant to be that small
        for _, layer in loqt_layers(self.model):
            if adapter_name in layer.loqt_B:
                B = layer.loqt_B[adapter_name]
                if not autocast_adapter_dtype:
                    B.data = B.data.to(layer.weight_dtype)
                elif B.dtype in (torch.float16, torch.bfloat16):
                    B.data = B.data.float()

    def _post_injection_hook(self, model: nn.Module, config: LoQTConfig, adapter_name: str) -> None:
        if config.full_rank_modules:
            model.register_load_state_dict_post_hook(_tie_weights_after_load)
        if config.format_version is not None:
            _VerifyOnFirstForward(model, adapter_name)

    ###############################
    # State dict
    ###############################

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LoQTConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        adapter = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        adapter.update({name: state_dict[name] for name in full_rank_parameters(model, config) if name in state_dict})
        rest = {key: state_dict[name] for key, name in _rest_names(model, config, adapter_name).items()}
        adapter.update(seal_adapter(_layers_of(model, adapter_name), rest, adapter_name, adapter))
        return adapter

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LoQTConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        layers = _layers_of(model, adapter_name)
        _verify(model, config, adapter_name, state_dict)
        # PEFT maps only keys that the model has a slot for
        state_dict = dict(state_dict)
        num_updates = 0
        for name, layer in layers.items():
            prefix = name if f"{name}.loqt_P" in state_dict else f"base_model.model.{name}"
            layer.allocate(adapter_name, state_dict[f"{prefix}.loqt_P"], state_dict.get(f"{prefix}.loqt_weight"))
            num_updates = max(num_updates, int(state_dict[f"{prefix}.loqt_state"][0]))
            state_dict[f"{prefix}.loqt_seal"] = torch.zeros_like(state_dict[f"{prefix}.loqt_seal"])
        config.num_updates = num_updates
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    ###############################
    # Life cycle
    ###############################

    def _refuse_after_full_rank(self, action: str, adapter_names: list[str]) -> None:
        for name in adapter_names:
            if name in self.peft_config and self.peft_config[name].full_rank_modules:
                raise ValueError(
                    f"{action} is impossible: adapter {name!r} trains full_rank_modules in place, so the original base "
                    "model is gone. Reload it."
                )

    def disable_adapter_layers(self) -> None:
        self._refuse_after_full_rank("Disabling the adapter", self.active_adapters)
        super().disable_adapter_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        self._refuse_after_full_rank("Deleting the adapter", [adapter_name])
        # before PEFT takes the first piece out
        for _, layer in loqt_layers(self.model):
            if adapter_name in layer.loqt_B:
                layer.require_base("Deleting the adapter")
        super().delete_adapter(adapter_name)

    def unload(self) -> nn.Module:
        """The base model as it was, without adapters.

        Raises:
            ValueError: If its weights were dropped (`retain_base="drop"`) or trained in place (`full_rank_modules`).
        """
        self._refuse_after_full_rank("Unloading the adapter", list(self.peft_config))
        return super().unload()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """A dense model with the adapters merged, for plain transformers; also if the base was loaded in 4 bits.

        Args and errors: see `BaseTuner.merge_and_unload`.
        """
        model = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None:
            if any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()):
                model = model.dequantize()
            else:
                quantizer.remove_quantization_config(model)
        return model

    def export(
        self,
        output_dir: str | Path,
        to: Literal["dense", "bnb-4bit", "lora"],
        rank: int | float | None = None,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
        progressbar: bool = False,
    ) -> ExportReport:
        """Write the active adapter in a form that loads without this package.

        `"dense"` and `"bnb-4bit"` use this model up: layer by layer it becomes the exported one, so that no second copy is
        needed. They load with transformers' `from_pretrained`. `"lora"` leaves this model as it is, and loads with PEFT on
        the *original* base model; modules trained in place (`full_rank_modules`) travel as `modules_to_save`.

        Args:
            output_dir (`str` or `Path`): A new or empty folder.
            to (`str`): The format.
            rank (`int` or `float`, *optional*):
                With `"lora"` only: the rank of all layers, or the share (up to 1.0) of each layer's squared change that
                its rank must keep.
            dtype (`torch.dtype`, *optional*):
                Of the dense weights; of what is not quantized; of LoRA's A and B. `None`: as in the base model, float32
                for A and B.
            overwrite (`bool`): Replace a model that `output_dir` holds.
            progressbar (`bool`): Show one.

        Returns:
            [`~loqt_peft.export.ExportReport`]

        Raises:
            ValueError:
                Before anything is changed: if an argument is not allowed; not exactly one adapter is active, or it is
                merged; the model is not of transformers, or offloaded; its quantization is not bitsandbytes' 4-bit; with
                `"bnb-4bit"` a layer is one that transformers keeps in float32; with `"lora"` the base weights were
                dropped, or full-rank parameters lie beside LoQT layers in one module. Before anything is written: if a
                weight is not finite.
        """
        # it is built on this module
        from .export import export

        return export(self, output_dir, to, rank, dtype, overwrite, progressbar)
