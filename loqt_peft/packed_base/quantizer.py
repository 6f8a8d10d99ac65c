"""transformers' door: `from_pretrained(..., quantization_config=LoQTQuantizationConfig())` packs each tensor as it is read."""

from __future__ import annotations

import os
import weakref
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from ..layers.four_bit import declare_four_bit, empty_four_bit_layer, pack_weight
from .checkpoint import Source, sources
from .config import LoQTQuantizationConfig
from .targets import packed_layers


# with it transformers reads one tensor after the other, and not ahead of what packs them (5.0; 5.23 does so by itself where
# it quantizes)
_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"

# of a checkpoint, as safetensors names them
_DTYPES = ("F64", "F32", "F16", "BF16")


class LoQTQuantizer(Bnb4BitHfQuantizer):
    """Packs a checkpoint that is not quantized while transformers loads it; the model is one of bitsandbytes then.

    At no time is there more on the device than what is packed already and one tensor as it was read.
    """

    quantization_config: LoQTQuantizationConfig

    def __init__(self, quantization_config: LoQTQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # of the layers to pack
        self.names: set[str] = set()
        self.packed: set[str] = set()
        self.sources: dict[str, Source] = {}
        self.problems: list[str] = []
        self._restore = lambda: None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """
        Raises:
            ValueError: If modules are to be offloaded: LoQT needs their weights at every update.
        """
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"device_map={device_map!r} is not allowed: LoQT needs every weight on a device that computes. Leave out the "
                "CPU and the disk, for instance device_map={'': 0}."
            )

    def preprocess_model(self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        """See `HfQuantizer.preprocess_model`.

        Raises:
            ValueError: If a file of the checkpoint is damaged, the dtype is float64, or the model has no layer to pack.
        """
        self.dtype = dtype or torch.get_default_dtype()
        self.sources = sources(kwargs.get("checkpoint_files") or ())
        self._read_one_by_one()
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _read_one_by_one(self) -> None:
        before = os.environ.get(_ONE_BY_ONE)
        os.environ[_ONE_BY_ONE] = "1"
        # a load that fails says nothing to its quantizer
        self._restore = weakref.finalize(self, _set_environment, before)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        for name, shape in packed_layers(model, self.dtype, config.modules_to_not_convert).items():
            layer = empty_four_bit_layer(
                model.get_submodule(name), shape, self.dtype, config.quantize_weight, config.double_quant
            )
            layer.requires_grad_(False)
            model.set_submodule(name, layer)
            self.names.add(name)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of the checkpoint is one to pack."""
        layer, _, tensor = param_name.rpartition(".")
        return layer in self.names and tensor == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        """What transformers calls with each of them."""
        return _Pack(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._restore()
        missing = sorted(self.names - self.packed)
        problems = self.problems or [f"{name}.weight is missing" for name in missing]
        if problems:
            raise ValueError("The checkpoint cannot be packed.\n- " + "\n- ".join(problems))
        config = self.quantization_config
        declare_four_bit(model, config.quantize_weight, config.double_quant, self.dtype)
        return model

    def place(self, name: str, parameter: str) -> str:
        """Where a tensor of the checkpoint comes from, for a message."""
        if name in self.sources:
            return repr(self.sources[name].file)
        # made of several tensors, of names that only transformers' rules know
        block = parameter[: next((i for i, char in enumerate(parameter) if char.isdigit()), len(parameter))]
        return ", ".join(sorted({repr(s.file) for key, s in self.sources.items() if key.startswith(block)})) or "it"


class _Pack(ConversionOps):
    """Packs one tensor; transformers frees what was read."""

    def __init__(self, quantizer: LoQTQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, model: nn.Module, **kwargs: Any) -> dict[str, Any]:
        packed = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            value = value[0] if isinstance(value, list) else value
            layer, _ = get_module_from_name(model, name)
            source = next(iter(kwargs.get("source_patterns") or ()), name)
            wrong = _what_is_wrong(layer, value, self.quantizer.sources.get(source))
            if wrong:
                # an error here would be logged, and what is read next would go on
                self.quantizer.problems.append(f"{name} {wrong}, in {self.quantizer.place(source, name)}")
                packed[name] = layer.weight
            else:
                packed[name] = pack_weight(layer, value.T if issubclass(layer.source_cls, Conv1D) else value)
            layer._is_hf_initialized = True
            self.quantizer.packed.add(name.removesuffix(".weight"))
        return packed


def _what_is_wrong(layer: bnb.nn.Linear4bit, value: torch.Tensor, source: Source | None) -> str | None:
    expected = tuple(layer.weight.shape)
    expected = expected[::-1] if issubclass(layer.source_cls, Conv1D) else expected
    # transformers has cast it
    if source is not None and source.dtype not in _DTYPES:
        return f"is of dtype {source.dtype}, which needs a scale or is not floating"
    if tuple(value.shape) != expected:
        return f"has shape {tuple(value.shape)}, and the model expects {expected}"
    # unlike `isfinite`, it makes no tensor of the same size
    if not all(bound.isfinite() for bound in torch.aminmax(value)):
        return "holds NaN or infinity"
    return None


def _set_environment(value: str | None) -> None:
    if value is None:
        os.environ.pop(_ONE_BY_ONE, None)
    else:
        os.environ[_ONE_BY_ONE] = value


def register() -> None:
    """Make transformers know the quantization method `loqt`, once."""
    if "loqt" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("loqt")(LoQTQuantizationConfig)
        register_quantizer("loqt")(LoQTQuantizer)
