"""Which layers of a base model are packed, and what keeps one from it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from ..compat import kept_in_float32
from ..layers.base_weight import BaseWeight
from ..layers.target_modules import default_target_modules


def packed_layers(
    model: PreTrainedModel, dtype: torch.dtype, modules_to_not_convert: list[str] | None = None
) -> dict[str, tuple[int, int]]:
    """Names of the linear layers to pack, in the order of the model, and the shapes of their weights, `[out, in]`.

    They are those that LoQT targets by default, without those whose dtype transformers or the model's code depends on.

    Args:
        model (`PreTrainedModel`): The model, also on `meta`.
        dtype (`torch.dtype`): Of its weights.
        modules_to_not_convert (`list[str]`, *optional*): What else is left as it is.

    Raises:
        ValueError: If the dtype is one that bitsandbytes does not know, or there is no layer to pack.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype} is not allowed for a packed base: float32, bfloat16 or float16.")
    left = [*(modules_to_not_convert or ()), *kept_in_float32(model)]
    targets = default_target_modules(model)
    names = [name for name, _ in model.named_modules() if name in targets and should_convert_module(name, left)]
    if not names:
        raise ValueError(
            f"No layer of this {type(model).__name__} can be packed"
            + (f" beside modules_to_not_convert={modules_to_not_convert!r}." if modules_to_not_convert else ".")
        )
    return {name: BaseWeight(model.get_submodule(name)).shape for name in names}
