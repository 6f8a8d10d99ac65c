"""The sizes of a decoder, read from its config."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig


# decoders of this form: RMSNorm, attention with rotary embeddings, a gated MLP
CLOSED_FORM_TYPES = ("llama", "mistral", "qwen2")
FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Linear:
    """A weight `[out, in]` of a decoder layer.

    Attributes:
        group (`str`): Linear layers of one group have the same input.
    """

    name: str
    group: str
    shape: tuple[int, int]
    bias: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that the closed form needs.

    Attributes:
        name (`str`): What the user called the model.
        hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary (`int`): As in its config.
        tied (`bool`): Whether the head is the embedding.
        qkv_bias, o_bias, mlp_bias (`bool`): Which linear layers have biases.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool

    @property
    def linears(self) -> list[Linear]:
        """Of one decoder layer."""
        h, i, q, kv = self.hidden, self.intermediate, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            Linear("q_proj", "attention", (q, h), self.qkv_bias),
            Linear("k_proj", "attention", (kv, h), self.qkv_bias),
            Linear("v_proj", "attention", (kv, h), self.qkv_bias),
            Linear("o_proj", "output", (h, q), self.o_bias),
            Linear("gate_proj", "mlp", (i, h), self.mlp_bias),
            Linear("up_proj", "mlp", (i, h), self.mlp_bias),
            Linear("down_proj", "down", (h, i), self.mlp_bias),
        ]

    @classmethod
    def from_config(cls, config: PreTrainedConfig, name: str) -> ModelShape:
        """Read a transformers config.

        Raises:
            ValueError: If there is no closed form for its `model_type`.
        """
        if config.model_type not in CLOSED_FORM_TYPES:
            raise ValueError(
                f"model_type={config.model_type!r} is not allowed without simulate: one of "
                f"{', '.join(map(repr, CLOSED_FORM_TYPES))}. Simulation takes any causal language model of transformers."
            )
        heads = config.num_attention_heads
        bias = bool(getattr(config, "attention_bias", False))
        return cls(
            name=name,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=config.num_key_value_heads or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            tied=config.tie_word_embeddings,
            qkv_bias=bias or config.model_type == "qwen2",
            o_bias=bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
        )


def load_config(model: Any) -> tuple[PreTrainedConfig, str]:
    """The config of a model, and what to call it.

    Args:
        model: A name on the Hub, a folder, the path of a `config.json`, a config, or a model.

    Raises:
        ValueError: If there is none; if a file lacks a field, or a size is not a positive integer.
        OSError: If the Hub or the file system has no such model.
    """
    if isinstance(model, nn.Module):
        model = getattr(model, "config", None)
    if isinstance(model, PreTrainedConfig):
        return _checked(model, model.to_dict(), type(model).__name__), model.name_or_path or model.model_type
    if not isinstance(model, (str, Path)):
        raise ValueError(
            f"model={model!r} is not allowed: a name on the Hub, a folder, a config.json, a transformers config, or a model "
            "that has one."
        )
    if Path(model).suffix == ".json" and not Path(model).exists():
        raise ValueError(f"model={str(model)!r} is not allowed: there is no such file.")
    if Path(model).is_file():
        try:
            raw = json.loads(Path(model).read_text())
        except ValueError as error:
            raise ValueError(f"model={str(model)!r} is not allowed: not a JSON file ({error}).") from None
    else:
        raw, _ = PreTrainedConfig.get_config_dict(str(model))
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise ValueError(f"model={str(model)!r} is not allowed: its config has no model_type.")
    try:
        config = AutoConfig.for_model(**raw)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"model_type={raw['model_type']!r} is not allowed, or its config is broken: {error}"
        ) from None
    return _checked(config, raw, str(model)), str(model)


def _checked(config: PreTrainedConfig, raw: dict, source: str) -> PreTrainedConfig:
    # transformers fills what is missing with the sizes of some other model
    required = FIELDS if config.model_type in CLOSED_FORM_TYPES else ()
    missing = [name for name in required if raw.get(name) is None]
    if missing:
        raise ValueError(f"The config of {source!r} is incomplete: it has no {', '.join(missing)}.")
    for name in required:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not allowed in the config of {source!r}: a positive integer.")
    return config
