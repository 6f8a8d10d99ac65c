"""The tuner: which modules become LoQT layers, what is saved with an adapter, and its life cycle."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import bitsandbytes as bnb
import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import nn

from ._moved import moved_names
from .compat import include_all_linear_layers
from .config import LoQTConfig
from .export import ExportReport, export
from .findings import report
from .health import saving_findings
from .layers.find import loqt_layers
from .layers.full_rank import full_rank_parameters, names_outside_layers
from .layers.layer import LoQTLayer
from .layers.linear import Linear
from .layers.read_linear import ReadLinear, is_read_or_called
from .layers.shared_blocks import join_shared_blocks
from .layers.target_checks import TargetChecks
from .layers.target_modules import TARGET_MODULES_MAPPING, without_unfit
from .layers.weight_shares import weight_shares
from .loading import copy_or_await, layer_keys, layers_of, make_room, tie_weights_after_load, verify
from .saving.base_name import report_base_name
from .saving.seal import seal_adapter
from .training.distributed import ignored_by_ddp
from .training.figures import LoQTUpdate
from .training.update import begin_step, cancel_step, end_step, record_updates


__getattr__ = moved_names(__name__)


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
        """Before the first forward pass of optimizer step `step`; see [`loqt_peft.training.update.begin_step`]."""
        return begin_step(self, step, is_last_backward)

    def end_step(self, optimizer: torch.optim.Optimizer | None = None) -> LoQTUpdate | None:
        """Between `optimizer.step()` and `optimizer.zero_grad()`; see [`loqt_peft.training.update.end_step`]."""
        return end_step(self, optimizer)

    def cancel_step(self) -> None:
        """Drop what a step captured that will not be finished."""
        cancel_step(self)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # the names are those in the PeftModel, which is what DDP wraps
        return [f"base_model.{name}" for name in ignored_by_ddp(self)]

    ###############################
    # Injection
    ###############################

    def _prepare_adapter_config(self, peft_config: LoQTConfig, model_config: dict) -> LoQTConfig:
        if peft_config.target_modules is None:
            targets = self.target_module_mapping.get(model_config.get("model_type"), INCLUDE_LINEAR_LAYERS_SHORTHAND)
            peft_config.target_modules = targets if isinstance(targets, str) else set(targets)
        targets = peft_config.target_modules
        if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            peft_config = include_all_linear_layers(peft_config, self.model)
            peft_config.target_modules = without_unfit(self.model, peft_config.target_modules)
        return peft_config

    def _prepare_model(self, peft_config: LoQTConfig, model: nn.Module) -> None:
        # before anything is changed
        super()._prepare_model(peft_config, model)
        checks = TargetChecks(model)
        adapters = tuple(f"{name}." for name, module in checks.modules.items() if isinstance(module, BaseTunerLayer))
        names = [
            name
            for name, _ in model.named_modules()
            if name and not name.startswith(adapters) and self._check_target_module_exists(peft_config, name)
        ]
        self._checked_targets = set(names)
        if peft_config.full_rank_modules:
            names += [name for name in checks.modules if name not in self._checked_targets and checks.offloaded(name)]
        report(checks.findings(names))

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
        if current_key not in self._checked_targets:
            # PEFT goes by the names in a state dict rather than by the config, if it gets one
            report(TargetChecks(self.model).findings([current_key]))
        kind = ReadLinear if is_read_or_called(parent, target_name) else Linear
        new_module = kind(target, adapter_name, r, scaling, loqt_config, seed=zlib.crc32(current_key.encode()))
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            # PEFT's own would give it the weight of what it replaces, which a head of several layers has not
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

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

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Add the adapter of `peft_config[adapter_name]`; see `BaseTuner.inject_adapter`.

        A config that is that of another adapter of this model, the very object, asks for a copy of that adapter, as TRL does
        to keep a reference; one that it is not, but which has been through updates, must be followed by loading.
        """
        config = self.peft_config[adapter_name]
        source = next(
            (name for name, other in self.peft_config.items() if other is config and name != adapter_name), None
        )
        if source is not None or not config.inference_mode:
            # training changes it, and the user may build another model with his
            config = self.peft_config[adapter_name] = copy.copy(config)
        if config.full_rank_modules == "all":
            # all rows of all embeddings are trained; TRL asks for those of new tokens by itself
            config.trainable_token_indices = None
        join_shared_blocks(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if not config.inference_mode:
            report(weight_shares(model, adapter_name).findings())
        if config.full_rank_modules:
            model.register_load_state_dict_post_hook(tie_weights_after_load)
        copy_or_await(model, config, adapter_name, source)

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
        layers = layers_of(model, adapter_name)
        for layer in layers.values():
            layer.verify(adapter_name)
        # the config is saved next, and by it a loader knows what there is to load
        record_updates(model, adapter_name)
        report_base_name(model)
        adapter = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        held = [*layer_keys(model, adapter_name).values(), *full_rank_parameters(model, config)]
        adapter.update({name: state_dict[name] for name in held if name in state_dict})
        rest = {key: state_dict[name] for key, name in names_outside_layers(model, config, adapter_name).items()}
        adapter.update(seal_adapter(layers, rest, adapter_name, adapter))
        report(saving_findings(model, adapter_name), stacklevel=3)
        return adapter

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LoQTConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        verify(model, config, adapter_name, state_dict)
        state_dict = make_room(model, config, adapter_name, state_dict)
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        keys = layer_keys(model, adapter_name)
        return {keys.get(key, key): tensor for key, tensor in state_dict.items()}

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
                layer.base.require("Deleting the adapter")
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
        to: Literal["dense", "bnb-4bit", "qlora", "lora"],
        rank: int | float | None = None,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
        progressbar: bool = False,
        base_name: str | None = None,
    ) -> ExportReport:
        """Write the active adapter in a form that loads without this package.

        `"dense"`, `"bnb-4bit"` and `"qlora"` use this model up: layer by layer it becomes the exported one, so that no second
        copy is needed. The first two load with transformers' `from_pretrained`; `"bnb-4bit"` quantizes the sum of weight and
        change, and loses what is smaller than a step of that. `"qlora"` loses nothing: `output_dir/base` is a model with the
        adapter's very 4-bit codes, and `output_dir` a LoRA adapter of rank r on it that holds s·PB; both load with
        `AutoPeftModel...from_pretrained(output_dir)`. `"lora"` leaves this model as it is, and loads with PEFT on the
        *original* base model; modules trained in place (`full_rank_modules`) travel as `modules_to_save`.

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
            base_name (`str`, *optional*):
                With `"qlora"` only: what the adapter names as its base model, as the Hub name under which you push
                `output_dir/base`. `None`: that folder's path.

        Returns:
            [`~loqt_peft.export.ExportReport`]

        Raises:
            ValueError:
                Before anything is changed: if an argument is not allowed; not exactly one adapter is active, or it is
                merged; the model is not of transformers, or offloaded; its quantization is not bitsandbytes' 4-bit; with
                `"bnb-4bit"` and `"qlora"` a layer is one that transformers keeps in float32; with `"lora"` the base weights
                were dropped, or full-rank parameters lie beside LoQT layers in one module. Before anything is written: if a
                weight is not finite.
        """
        for _, layer in loqt_layers(self.model):
            if layer.base.is_sharded:
                layer.base.require("Exporting the adapter")
        return export(self, output_dir, to, rank, dtype, overwrite, progressbar, base_name)
