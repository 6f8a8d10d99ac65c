"""How a base model is packed, as an argument of `from_pretrained`."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..choices import QUANT_TYPES


class LoQTQuantizationConfig(QuantizationConfigMixin):
    """Packs the layers that LoQT trains by default into 4 bits, each as it is read.

    ```py
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, quantization_config=LoQTQuantizationConfig())
    ```

    The model is one of bitsandbytes then, with the very codes that a LoQT layer would hold of the same weights; see
    [`~loqt_peft.pack_model`] for a model that is in memory already.

    Args:
        quantize_weight (`str`): `"nf4"` or `"fp4"`, as in `LoQTConfig`.
        double_quant (`bool`): Quantize the absmax to 8 bits too, as in `LoQTConfig`.
        modules_to_not_convert (`list[str]`, *optional*):
            Names of modules that stay as they are, beside those that LoQT passes over: heads, embeddings, routers, layers
            whose weight the model reads by itself. A name stands for all modules whose names end with it, or lie in it.

    Raises:
        ValueError: If an argument has a value that is not allowed.
    """

    quant_method = "loqt"

    def __init__(
        self,
        quantize_weight: str = "nf4",
        double_quant: bool = False,
        modules_to_not_convert: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        unknown = sorted(kwargs.keys() - {"quant_method"})
        if unknown:
            raise TypeError(f"LoQTQuantizationConfig got an unexpected keyword argument {unknown[0]!r}.")
        if quantize_weight not in QUANT_TYPES:
            raise ValueError(
                f"quantize_weight={quantize_weight!r} is not allowed: one of {', '.join(map(repr, QUANT_TYPES))}."
            )
        if not isinstance(double_quant, bool):
            raise ValueError(f"double_quant={double_quant!r} is not allowed: True or False.")
        names = modules_to_not_convert
        if names is not None and (isinstance(names, str) or not all(isinstance(name, str) for name in names)):
            raise ValueError(f"modules_to_not_convert={names!r} is not allowed: a list of names of modules.")
        self.quant_method = "loqt"
        self.quantize_weight = quantize_weight
        self.double_quant = double_quant
        self.modules_to_not_convert = None if names is None else list(names)
