"""Which layers become LoQT layers unless they are named: those of `target_modules=None` and `"all-linear"`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import SimpleNamespace

from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedModel

from ..compat import include_all_linear_layers
from .target_checks import PASSED_OVER, TargetChecks, is_linear


_BERT = ["query", "key", "value", "intermediate.dense", "output.dense"]

# The linear layers of the blocks, but not of poolers and projected embeddings: those are small, and often new. Of a model that
# is not listed all linear layers but the output head are meant.
TARGET_MODULES_MAPPING: dict[str, list[str]] = {
    "albert": ["query", "key", "value", "attention.dense", "ffn", "ffn_output"],
    "bert": _BERT,
    "camembert": _BERT,
    "deberta": ["in_proj", "pos_proj", "pos_q_proj", "intermediate.dense", "output.dense"],
    "deberta-v2": [
        "query_proj",
        "key_proj",
        "value_proj",
        "pos_key_proj",
        "pos_query_proj",
        "intermediate.dense",
        "output.dense",
    ],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "electra": _BERT,
    "modernbert": ["Wqkv", "Wi", "Wo"],
    "mpnet": ["attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "roberta": _BERT,
    "t5": ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"],
    "xlm-roberta": _BERT,
}

# children of a whole model that turn its features into an answer; PEFT trains such heads as modules_to_save
_HEADS = {*SEQ_CLS_HEAD_NAMES, "classification_head", "head", "lm_head", "proj_out", "qa_outputs"}


def is_head(model: nn.Module, name: str) -> bool:
    """Whether the linear layer at `name` is (a part of) the model's head: what lies outside of the base model, unless in
    blocks of its own, as a decoder's."""
    parts = name.split(".")
    if parts[0] in _HEADS:
        return True
    backbone = model.base_model if isinstance(model, PreTrainedModel) else model
    if backbone is model or any(model.get_submodule(".".join(parts[:i])) is backbone for i in range(1, len(parts))):
        return False
    in_block = any(
        isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList) for i in range(1, len(parts) - 1)
    )
    return not in_block or re.search("head|classif|predict", name) is not None


def without_unfit(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of the linear layers at `names` that LoQT takes by default.

    Left out are heads, and layers that cannot be LoQT layers by what they are: with a `forward` or a computed weight of their
    own, whose weight the model reads instead of calling them, or shares with another module.
    """
    checks = TargetChecks(model)
    return {
        name
        for name in names
        if not is_head(model, name)
        and ((obstacle := checks.obstacle(name)) is None or obstacle.code not in PASSED_OVER)
    }


def default_target_modules(model: PreTrainedModel) -> set[str]:
    """Names of the layers that `target_modules=None` stands for in a model."""
    listed = TARGET_MODULES_MAPPING.get(model.config.model_type)
    if listed is None:
        asked = SimpleNamespace(target_modules=INCLUDE_LINEAR_LAYERS_SHORTHAND, task_type=None)
        return without_unfit(model, include_all_linear_layers(asked, model).target_modules)
    ends = tuple(f".{name}" for name in listed)
    return {name for name, module in model.named_modules() if f".{name}".endswith(ends) and is_linear(module)}
