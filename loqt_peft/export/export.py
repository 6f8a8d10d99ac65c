"""Leaving LoQT: a dense model, a bitsandbytes 4-bit checkpoint or a LoRA adapter, each loadable without this package."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora.conversion import convert_to_lora
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..algorithm.quantization import undo_cpu_packing
from ..choices import EXPORT_FORMATS, QUANT_TYPES
from ..layers.base_weight import dense_layer, source_class
from ..layers.full_rank import full_rank_parameters
from ..layers.layer import LoQTLayer, loqt_layers


if TYPE_CHECKING:
    from ..config import LoQTConfig
    from ..model import LoQTModel

_PEFT_PREFIX = "base_model.model."
# by these files a folder is taken for a model; left beside a new one, some would be loaded in its place
_MODEL_FILES = (
    "config.json",
    "adapter_config.json",
    "model*.safetensors*",
    "adapter_model*.safetensors*",
    "pytorch_model*.bin*",
    "adapter_model*.bin*",
)


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what it lost. The errors are those of the LoQT layers, all of them together.

    Attributes:
        to (`str`): One of `"dense"`, `"bnb-4bit"` and `"lora"`.
        output_dir (`str`): Where it was written.
        layers (`int`): How many LoQT layers were converted.
        weight_error (`float`):
            ‖W − Ŵ‖ / ‖W‖ of the adapted weights W and the exported weights Ŵ, Frobenius norms.
        change_error (`float`, *optional*):
            The same error relative to the adapter's change of the original base weights: ‖W − Ŵ‖ / ‖ΔW‖. At 1 and above
            nothing of the change can be relied on. `None` if the base weights were dropped.
        ranks (`dict[str, int]`): Of a LoRA adapter, layer name -> rank.
    """

    to: str
    output_dir: str
    layers: int
    weight_error: float
    change_error: float | None
    ranks: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{self.layers} LoQT layers exported as {self.to} to {self.output_dir}"]
        if self.ranks:
            smallest, largest = min(self.ranks.values()), max(self.ranks.values())
            lines.append(f"rank: {smallest}" if smallest == largest else f"rank: {smallest} to {largest}")
        lines.append(f"error relative to the weights: {self.weight_error:.3g}")
        if self.change_error is not None:
            lines.append(f"error relative to the change of the original weights: {self.change_error:.3g}")
        return "\n".join(lines)


class _Errors:
    """Sums of squared norms over the layers."""

    def __init__(self) -> None:
        self.error = self.weight = self.change = 0.0
        self.change_known = True

    def add(self, error: torch.Tensor, weight: torch.Tensor, change: torch.Tensor | None) -> None:
        self.error += _squared_norm(error)
        self.weight += _squared_norm(weight)
        if change is None:
            self.change_known = False
        else:
            self.change += _squared_norm(change)

    def relative_to(self, reference: float) -> float:
        if self.error == 0:
            return 0.0
        return math.sqrt(self.error / reference) if reference else math.inf

    def report(self, to: str, output_dir: Path, layers: int, ranks: dict[str, int]) -> ExportReport:
        change_error = self.relative_to(self.change) if self.change_known else None
        return ExportReport(to, str(output_dir), layers, self.relative_to(self.weight), change_error, ranks)


def _squared_norm(tensor: torch.Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item() ** 2


###############################
# Checks
###############################


def check_output_dir(output_dir: str | Path, overwrite: bool = False, sources: tuple[str | None, ...] = ()) -> Path:
    """The output directory as a path.

    Args:
        output_dir (`str` or `Path`): Where a model is to be written.
        overwrite (`bool`): Whether a model may be there already.
        sources (`tuple` of `str`): Names or paths of what is read; none may be the output directory.

    Raises:
        ValueError: If it is a file, one of the sources, or holds a model that may not be overwritten.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir={str(output_dir)!r} is not allowed: it is a file.")
    if any(source and output_dir.exists() and output_dir.resolve() == Path(source).resolve() for source in sources):
        raise ValueError(
            f"output_dir={str(output_dir)!r} is not allowed: the base model or the adapter is read from it."
        )
    if not overwrite and next(_model_files(output_dir), None):
        raise ValueError(f"output_dir={str(output_dir)!r} holds a model already. Ask for overwrite to replace it.")
    return output_dir


def _model_files(folder: Path) -> Iterator[Path]:
    return (file for pattern in _MODEL_FILES for file in folder.glob(pattern))


def check_rank(to: str, rank: int | float | None) -> None:
    """
    Raises:
        ValueError: If `to` is no format, or `rank` not a rank or energy threshold where there must be one.
    """
    if to not in EXPORT_FORMATS:
        raise ValueError(f"to={to!r} is not allowed: one of {', '.join(map(repr, EXPORT_FORMATS))}.")
    if to != "lora":
        if rank is not None:
            raise ValueError(f"rank={rank!r} is not allowed with to={to!r}: only a LoRA adapter has a rank.")
        return
    is_rank = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not is_rank and not (isinstance(rank, float) and 0 < rank <= 1):
        raise ValueError(
            f"rank={rank!r} is not allowed with to='lora': an integer of at least 1, or a float above 0 and up to 1, the "
            "share of each layer's squared change that its rank must keep."
        )


def _active_adapter(tuner: LoQTModel) -> str:
    if not isinstance(tuner.model, PreTrainedModel):
        raise ValueError(f"Only transformers models can be exported, and this is a {type(tuner.model).__name__}.")
    adapters = tuner.active_adapters
    if len(adapters) != 1:
        raise ValueError(f"One adapter must be active for an export, and these are: {adapters}. Use `set_adapter`.")
    layers = [layer for _, layer in loqt_layers(tuner.model)]
    for layer in layers:
        layer.verify(adapters[0])
    if any(layer.merged for layer in layers):
        raise ValueError("The adapter is merged into the base weights. Call `unmerge_adapter` before an export.")
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("The adapters are disabled. Enable them before an export.")
    if not any(adapters[0] in layer.loqt_B for layer in layers):
        raise ValueError(f"The active adapter {adapters[0]!r} has no LoQT layers, or was exported already.")
    if any(parameter.is_meta for parameter in tuner.model.parameters()):
        raise ValueError("Some weights of the model are offloaded (on the meta device). Load it without offloading.")
    return adapters[0]


def _check_base_quantizer(model: PreTrainedModel) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, Bnb4BitHfQuantizer):
        raise ValueError(
            f"The base model is quantized by {type(quantizer).__name__}, which only the export to LoRA supports."
        )


def _check_loadable_in_4bit(model: PreTrainedModel) -> None:
    # transformers leaves these out of the quantization when it loads a model, whatever the checkpoint says
    kept = model._keep_in_fp32_modules
    for name, _ in loqt_layers(model):
        if kept and not should_convert_module(name, list(kept)):
            raise ValueError(
                f"{name!r} cannot be exported in 4 bits: transformers keeps it in float32 in a {type(model).__name__}."
            )


def _check_ranks(model: PreTrainedModel, adapter_name: str, rank: int | float) -> None:
    for name, layer in loqt_layers(model):
        if adapter_name not in layer.loqt_B:
            continue
        layer.base.require("The export to LoRA")
        if isinstance(rank, int) and rank > min(layer.shape):
            raise ValueError(
                f"rank={rank} is not allowed: the weight of {name!r} has at most rank {min(layer.shape)}. A float gives "
                "each layer a rank of its own."
            )


###############################
# Dense and 4-bit
###############################


def _4bit_layer(
    base_layer: nn.Module,
    weight: torch.Tensor,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    quant_type: str,
    double_quant: bool,
) -> bnb.nn.Linear4bit:
    """A `Linear4bit` with the bias of the base layer and a float32 weight `[out, in]`, to be dequantized to `dtype`."""
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=base_layer.bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=double_quant,
            quant_type=quant_type,
        )
    layer.source_cls = source_class(base_layer)
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=double_quant, quant_type=quant_type, module=layer
    ).to(weight.device)
    layer.weight.quant_state.dtype = dtype
    layer.bias = base_layer.bias
    layer.train(base_layer.training)
    return layer


def _exported_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a converted layer as it computes with it, float32 `[out, in]`."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).float()


@torch.no_grad()
def _convert_layers(
    tuner: LoQTModel,
    adapter_name: str,
    convert: Callable[[nn.Module, torch.Tensor, torch.dtype], nn.Module],
    progressbar: bool,
) -> _Errors:
    """Replace each LoQT layer by `convert(base_layer, weight, dtype)`, then unwrap what else PEFT has wrapped.

    `weight` is float32 `[out, in]`, and `dtype` is what the base weight has or dequantizes to.
    """
    model, errors = tuner.model, _Errors()
    # names only: a layer is freed once it is replaced
    for name in tqdm([n for n, _ in loqt_layers(model)], desc="Converting layers", disable=not progressbar):
        layer = model.get_submodule(name)
        base_layer = layer.get_base_layer()
        if adapter_name not in layer.loqt_B:
            layer.base.restore(layer.compute_device)
            model.set_submodule(name, base_layer)
            continue
        weight = layer.effective_weight(adapter_name)
        if not torch.isfinite(weight).all():
            raise ValueError(f"The weight of {name!r} is not finite: the adapter is broken. Nothing was written.")
        # before the base weight is replaced
        change = None if layer.base.dropped else layer.get_delta_weight(adapter_name)
        dtype = layer.weight_dtype
        converted = convert(base_layer, weight, dtype)
        errors.add(weight - _exported_weight(converted), weight, change)
        model.set_submodule(name, converted)
        if converted is not base_layer:
            # a Params4bit and its Linear4bit hold each other
            base_layer.weight = None
    # of the tuner layers none is left: what it merges are the modules_to_save
    BaseTuner.merge_and_unload(tuner)
    # of a model on one device; transformers would take it for offloaded
    model.__dict__.pop("hf_device_map", None)
    return errors


@torch.no_grad()
def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def to_dense(
    tuner: LoQTModel, adapter_name: str, dtype: torch.dtype | None = None, progressbar: bool = False
) -> _Errors:
    """Turn `tuner.model` into a dense transformers model, in place and layer by layer.

    Args:
        tuner (`LoQTModel`): A model with LoQT layers; they are used up.
        adapter_name (`str`): The adapter to merge.
        dtype (`torch.dtype`, *optional*): Of all parameters. `None`: each as in the base model.
        progressbar (`bool`): Show one.
    """
    model = tuner.model
    errors = _convert_layers(
        tuner,
        adapter_name,
        lambda base, weight, base_dtype: dense_layer(base, weight, dtype or base_dtype),
        progressbar,
    )
    for name in [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]:
        layer = model.get_submodule(name)
        undo_cpu_packing(layer.weight)
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        model.set_submodule(name, dense_layer(layer, weight, dtype or weight.dtype))
        layer.weight = None
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    if dtype is not None:
        _cast(model, dtype)
    return errors


def to_4bit(
    tuner: LoQTModel, adapter_name: str, dtype: torch.dtype | None = None, progressbar: bool = False
) -> _Errors:
    """Turn `tuner.model` into a transformers model quantized by bitsandbytes, in place and layer by layer.

    The LoQT layers are quantized as the adapter's config says (`quantize_weight`, NF4 if that is `None`, and
    `double_quant`); all other layers stay as they are.

    Args:
        tuner (`LoQTModel`): A model with LoQT layers; they are used up.
        adapter_name (`str`): The adapter to merge.
        dtype (`torch.dtype`, *optional*):
            What the weights dequantize to, and of all other parameters. `None`: each as in the base model.
        progressbar (`bool`): Show one.
    """
    model, config = tuner.model, tuner.peft_config[adapter_name]
    quant_type = config.quantize_weight or QUANT_TYPES[0]
    names = {name for name, layer in loqt_layers(model) if adapter_name in layer.loqt_B}
    compute_dtype = dtype or model.get_submodule(min(names)).weight_dtype

    def convert(base_layer: nn.Module, weight: torch.Tensor, base_dtype: torch.dtype) -> nn.Module:
        return _4bit_layer(base_layer, weight, dtype or base_dtype, compute_dtype, quant_type, config.double_quant)

    errors = _convert_layers(tuner, adapter_name, convert, progressbar)
    if dtype is not None:
        _cast(model, dtype)
    quantized, skipped = set(), []
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            undo_cpu_packing(module.weight)
            quantized.add(name)
        elif type(module) in (nn.Linear, Conv1D):
            skipped.append(name)
    quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[_skip_pattern(name, quantized) for name in skipped],
    )
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization_config)
    model.is_quantized = True
    model.quantization_method = quantization_config.quant_method
    model.hf_quantizer.postprocess_model(model)
    return errors


def _skip_pattern(name: str, quantized: set[str]) -> str:
    # a plain name also stands for every name that ends with it
    if all(should_convert_module(other, [name]) for other in quantized):
        return name
    return f"^{re.escape(name)}$"


###############################
# LoRA
###############################


def _full_rank_owners(model: PreTrainedModel, configs: Iterable[LoQTConfig]) -> tuple[list[str], list[str]]:
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
def _save_lora(
    tuner: LoQTModel,
    adapter_name: str,
    output_dir: Path,
    rank: int | float,
    dtype: torch.dtype,
    owners: list[str],
    biases: list[str],
    progressbar: bool,
) -> tuple[_Errors, dict[str, int]]:
    model, config = tuner.model, tuner.peft_config[adapter_name]
    lora_config, converted = convert_to_lora(model, rank, adapter_name=adapter_name, progressbar=progressbar)
    errors, ranks, state = _Errors(), {}, {}
    for name, layer in loqt_layers(model):
        if f"{name}.lora_A.weight" not in converted:
            continue
        A, B = (converted[f"{name}.lora_{matrix}.weight"].to(dtype) for matrix in "AB")
        state[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = A
        state[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = B
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
            state |= {f"{_PEFT_PREFIX}{name}.{key}": tensor for key, tensor in saved.items()}
    for name in owners:
        saved = model.get_submodule(name).state_dict()
        state |= {f"{_PEFT_PREFIX}{name}.{key}": tensor for key, tensor in saved.items()}
    state |= {f"{_PEFT_PREFIX}{name}": model.get_parameter(name) for name in biases}

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


###############################
# Export
###############################


def export(
    tuner: LoQTModel,
    output_dir: str | Path,
    to: str,
    rank: int | float | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progressbar: bool = False,
) -> ExportReport:
    """See [`LoQTModel.export`]."""
    check_rank(to, rank)
    adapter_name = _active_adapter(tuner)
    model, config = tuner.model, tuner.peft_config[adapter_name]
    output_dir = check_output_dir(output_dir, overwrite, (config.base_model_name_or_path, model.config.name_or_path))
    if to == "lora":
        _check_ranks(model, adapter_name, rank)
        owners, biases = _full_rank_owners(model, tuner.peft_config.values())
    else:
        _check_base_quantizer(model)
    if to == "bnb-4bit":
        _check_loadable_in_4bit(model)

    ranks = {}
    layers = sum(adapter_name in layer.loqt_B for _, layer in loqt_layers(model))
    if to == "lora":
        _clear(output_dir)
        errors, ranks = _save_lora(
            tuner, adapter_name, output_dir, rank, dtype or torch.float32, owners, biases, progressbar
        )
    else:
        convert = to_dense if to == "dense" else to_4bit
        errors = convert(tuner, adapter_name, dtype, progressbar)
        _clear(output_dir)
        model.save_pretrained(output_dir)
    return errors.report(to, output_dir, layers, ranks)


def _clear(output_dir: Path) -> None:
    for file in list(_model_files(output_dir)):
        file.unlink()
