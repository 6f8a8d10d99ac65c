"""The export to a LoRA adapter, which PEFT loads on the original base model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftConfig
from peft.tuners.lora.conversion import convert_to_lora
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..layers.find import loqt_layers
from ..layers.full_rank import full_rank_parameters
from ..layers.layer import LoQTLayer
from .report import Errors


PEFT_PREFIX = "base_model.model."


def full_rank_owners(model: PreTrainedModel, configs: Iterable[PeftConfig]) -> tuple[list[str], list[str]]:
    """What was trained in place: names of modules, and of biases of LoQT layers.

    Raises:
        ValueError: If LoRA's `modules_to_save` cannot hold such a module.
    """
    trained = {id(p) for config in configs for p in full_rank_parameters(model, config).values()}
    owners, biases = set(), []
    # a tied weight under all of its names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in trained:
            continue
        owner = name.rpartition(".")[0]
        if isinstance(model.get_submodule(owner.removesuffix(".base_layer")), LoQTLayer):
            biases.append(name)
        else:
            owners.add(owner)
    # PEFT takes a name in modules_to_save for every name that ends with it, and wants all of them saved
    owners |= {
        name for name, _ in model.named_modules() if name and any(name.endswith(owner) for owner in owners if owner)
    }
    owners = {name for name in owners if not any(name.startswith(f"{other}.") for other in owners)}
    for name in sorted(owners):
        if any(isinstance(m, (LoQTLayer, AuxiliaryTrainingWrapper)) for m in model.get_submodule(name).modules()):
            raise ValueError(
                f"full_rank_modules: parameters of {name or 'the model itself'!r} were trained in place, and a LoRA "
                "adapter can carry only whole modules without layers of its own in them. Export to 'dense' instead."
            )
    return sorted(owners), biases


def _embeddings_are_tied(model: PreTrainedModel, owners: list[str]) -> bool:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embeddings is None or head.weight is not embeddings.weight:
        return False
    return any(model.get_submodule(name) is embeddings for name in owners)


@torch.no_grad()
def save_lora(
    tuner: BaseTuner,
    adapter_name: str,
    output_dir: Path,
    rank: int | float,
    dtype: torch.dtype,
    owners: list[str],
    biases: list[str],
    progressbar: bool,
) -> tuple[Errors, dict[str, int]]:
    model, config = tuner.model, tuner.peft_config[adapter_name]
    lora_config, converted = convert_to_lora(model, rank, adapter_name=adapter_name, progressbar=progressbar)
    errors, ranks, state = Errors(), {}, {}
    for name, layer in loqt_layers(model):
        if f"{name}.lora_A.weight" not in converted:
            continue
        A, B = (converted[f"{name}.lora_{matrix}.weight"].to(dtype) for matrix in "AB")
        state[f"{PEFT_PREFIX}{name}.lora_A.weight"] = A
        state[f"{PEFT_PREFIX}{name}.lora_B.weight"] = B
        ranks[name] = A.shape[0]
        change = layer.get_delta_weight(adapter_name)
        product = B.float() @ A.float()
        errors.add(
            change - (product.T if layer.fan_in_fan_out else product), layer.effective_weight(adapter_name), change
        )

    # convert_to_lora saves the modules_to_save of all adapters under one name, and no nested ones
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            saved = module.adapter_state_dict(adapter_name, module.state_dict())
            state |= {f"{PEFT_PREFIX}{name}.{key}": tensor for key, tensor in saved.items()}
    for name in owners:
        saved = model.get_submodule(name).state_dict()
        state |= {f"{PEFT_PREFIX}{name}.{key}": tensor for key, tensor in saved.items()}
    state |= {f"{PEFT_PREFIX}{name}": model.get_parameter(name) for name in biases}

    # names rather than the adapter's patterns, which need exclude_modules beside them
    lora_config.target_modules = set(ranks)
    lora_config.exclude_modules = lora_config.layers_to_transform = lora_config.layers_pattern = None
    lora_config.modules_to_save = [*(config.modules_to_save or []), *owners] or None
    lora_config.ensure_weight_tying = _embeddings_are_tied(model, owners)
    lora_config.bias = "lora_only" if biases else "none"
    lora_config.task_type, lora_config.auto_mapping = config.task_type, config.auto_mapping
    lora_config.revision = config.revision
    lora_config.inference_mode = True

    output_dir.mkdir(parents=True, exist_ok=True)
    save_file(_without_sharing(state), output_dir / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    lora_config.save_pretrained(output_dir)
    return errors, ranks


def _without_sharing(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # PEFT wants tied weights under each of their names, and safetensors refuses tensors that share memory
    seen, result = set(), {}
    for name, tensor in state.items():
        pointer = tensor.data_ptr()
        result[name] = tensor.detach().clone() if pointer in seen else tensor.detach().contiguous()
        seen.add(pointer)
    return result
