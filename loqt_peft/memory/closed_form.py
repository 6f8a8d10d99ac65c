"""How much memory training takes, predicted in closed form."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from ..algorithm.linear_map import BRANCH, cheapest, keeps_input
from ..algorithm.projection import is_right, projection_shape, sketch_width, trainable_shape
from ..algorithm.quantization import BLOCKSIZE, NESTED_BLOCKSIZE, storage_format
from ..choices import (
    BASES,
    DTYPES,
    ESTIMATED_METHODS,
    ESTIMATED_OPTIMIZERS,
    ESTIMATED_PROJECTIONS,
    RETAIN_BASE,
    UPDATE_MODES,
)


# decoders of this form: RMSNorm, attention with rotary embeddings, a gated MLP
CLOSED_FORM_TYPES = ("llama", "mistral", "qwen2")
FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class MemoryOptions:
    """What is trained, and how.

    Args:
        method (`str`):
            `"loqt"`, `"loqt-nq"` (LoQT, not quantized), `"lora"`, `"qlora"`, `"galore"` or `"full"`, on all linear layers
            but the head.
        rank (`int`): Of the adapter or the projection.
        optimizer (`str`):
            `"adamw"` (torch, `foreach=False`) or `"adamw_8bit"` (bitsandbytes), and both `"paged_..."`, whose state lies in
            memory that the driver moves between device and host: it is counted on the host.
        per_layer (`bool`): Each gradient is applied and freed within the (last) backward pass.
        gradient_checkpointing (`bool`): Decoder layers are computed again in the backward pass (not reentrant).
        batch_size (`int`): Sequences of a micro-batch.
        sequence_length (`int`): Tokens of a sequence.
        gradient_accumulation_steps (`int`): Micro-batches of a step.
        dtype (`str`): Of weights and activations, without autocast.
        adapter_dtype (`str`, *optional*):
            Of the adapter's trainable matrices; `dtype` if `None`, as with `autocast_adapter_dtype=False` in
            `get_peft_model`. PEFT's default is `"float32"`.
        base (`str`, *optional*):
            How the model was loaded: `"4bit"` (the default for LoQT and QLoRA) or `"dense"`.
        double_quant (`bool`): The absmax is quantized too.
        update_mode (`str`): As in [`LoQTConfig`].
        offload_gradients (`bool`, *optional*): As in [`LoQTConfig`].
        projection (`str`): `"randomized"`, or `"random"`, with which an update needs no gradient.
        full_rank (`bool`, *optional*):
            Whether embeddings, norms, biases and the head are trained; `None`: not with LoRA and QLoRA.
        retain_base (`str`): As in [`LoQTConfig`].
        error_feedback (`bool`): As in [`LoQTConfig`]; for LoQT only.

    Raises:
        ValueError: If a field has a value that is not allowed; the message names field, value and what is allowed.
    """

    method: str = "loqt"
    rank: int = 256
    optimizer: str = "adamw"
    per_layer: bool = False
    gradient_checkpointing: bool = False
    batch_size: int = 1
    sequence_length: int = 256
    gradient_accumulation_steps: int = 1
    dtype: str = "bfloat16"
    adapter_dtype: str | None = None
    base: str | None = None
    double_quant: bool = False
    update_mode: str = "backward"
    offload_gradients: bool | None = None
    projection: str = "randomized"
    full_rank: bool | None = None
    retain_base: str = "cpu"
    error_feedback: bool = False

    def __post_init__(self) -> None:
        def choice(name: str, choices) -> None:
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r} is not allowed: one of {', '.join(map(repr, choices))}.")

        choice("method", ESTIMATED_METHODS)
        choice("optimizer", ESTIMATED_OPTIMIZERS)
        choice("dtype", DTYPES)
        choice("update_mode", UPDATE_MODES)
        choice("retain_base", RETAIN_BASE)
        choice("projection", ESTIMATED_PROJECTIONS)
        for name in ("rank", "batch_size", "sequence_length", "gradient_accumulation_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} is not allowed: an integer of at least 1.")
        for name in ("per_layer", "gradient_checkpointing", "double_quant", "error_feedback"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: True or False.")
        if self.offload_gradients not in (True, False, None):
            raise ValueError(f"offload_gradients={self.offload_gradients!r} is not allowed: True, False or None.")
        if self.adapter_dtype is None:
            self._set("adapter_dtype", self.dtype)
        choice("adapter_dtype", DTYPES)
        if self.base is None:
            self._set("base", "4bit" if self.method in ("loqt", "qlora") else "dense")
        choice("base", BASES)
        if self.full_rank is None:
            self._set("full_rank", self.method not in ("lora", "qlora"))
        if not isinstance(self.full_rank, bool):
            raise ValueError(f"full_rank={self.full_rank!r} is not allowed: True, False or None.")
        needed = {"qlora": "4bit", "lora": "dense", "full": "dense", "galore": "dense"}.get(self.method, self.base)
        if self.base != needed:
            raise ValueError(f"base={self.base!r} is not allowed with method={self.method!r}: only {needed!r}.")
        if self.error_feedback and self.method != "loqt":
            raise ValueError(f"error_feedback=True is not allowed with method={self.method!r}: only 'loqt'.")
        if self.method in ("full", "galore") and not self.full_rank:
            raise ValueError(f"full_rank=False is not allowed with method={self.method!r}: it trains every weight.")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def trains_loqt(self) -> bool:
        """Whether the method is LoQT, quantized or not."""
        return self.method in ("loqt", "loqt-nq")

    @property
    def starts_dense(self) -> bool:
        """Whether the weights are larger before LoQT's first update than after it."""
        return self.method == "loqt" and self.base == "dense"

    @property
    def optimizer_bits(self) -> int:
        return 8 if self.optimizer.endswith("8bit") else 32

    @property
    def paged(self) -> bool:
        """Whether the optimizer's state lies in memory that the driver moves to the host when the device is full."""
        return self.optimizer.startswith("paged")


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


###############################
# Closed form
###############################


class ClosedForm:
    """Bytes of one model trained in one way; every method counts what its name says.

    Args:
        shape ([`ModelShape`]): The model.
        options ([`MemoryOptions`]): What is trained, and how.
    """

    def __init__(self, shape: ModelShape, options: MemoryOptions) -> None:
        self.shape, self.options = shape, options
        self.size = torch.empty(0, dtype=getattr(torch, options.dtype)).element_size()
        self.adapter_size = torch.empty(0, dtype=getattr(torch, options.adapter_dtype)).element_size()
        self.tokens = options.batch_size * options.sequence_length

    ###############################
    # What outlives a step
    ###############################

    def rank(self, linear: Linear) -> int:
        """LoQT clamps the rank to the smaller side; LoRA takes it as it is."""
        return min(self.options.rank, *linear.shape) if self.options.trains_loqt else self.options.rank

    def _four_bit(self, numel: int) -> tuple[int, int]:
        """Codes and absmax."""
        blocks = math.ceil(numel / BLOCKSIZE)
        nested = blocks + 4 * math.ceil(blocks / NESTED_BLOCKSIZE) + 4
        return math.ceil(numel / 2), nested if self.options.double_quant else 4 * blocks

    def weights(self, dense: bool = False) -> tuple[int, int]:
        """The targeted weights of a layer: their values, and what quantization adds."""
        codes = state = 0
        for linear in self.shape.linears:
            if dense or self.options.method not in ("loqt", "qlora"):
                codes += self.size * linear.numel
            else:
                both = self._four_bit(linear.numel)
                codes, state = codes + both[0], state + both[1]
        return codes, state

    def projection(self, linear: Linear) -> int:
        """P of LoQT or GaLore."""
        options = self.options
        if not (options.trains_loqt or options.method == "galore"):
            return 0
        shape = projection_shape(linear.shape, min(options.rank, *linear.shape))
        if options.method == "loqt":
            return storage_format(shape, "nf4", options.double_quant, getattr(torch, options.dtype)).nbytes
        return self.size * math.prod(shape)

    def adapter(self, linear: Linear) -> list[int]:
        """Numbers of elements of the trainable matrices of a layer's adapter."""
        if self.options.trains_loqt:
            return [math.prod(trainable_shape(linear.shape, self.rank(linear)))]
        if self.options.method in ("lora", "qlora"):
            return [side * self.rank(linear) for side in linear.shape]
        return []

    def _norms_and_biases(self) -> list[int]:
        """Numbers of elements of a decoder layer's vectors."""
        return [self.shape.hidden] * 2 + [linear.shape[0] for linear in self.shape.linears if linear.bias]

    @property
    def table(self) -> int:
        """Number of elements of the embedding, and of the head."""
        return self.shape.vocabulary * self.shape.hidden

    def rest(self) -> list[int]:
        """Numbers of elements of all that is not targeted."""
        tables = [self.table] if self.shape.tied else [self.table] * 2
        return tables + [self.shape.hidden] + self._norms_and_biases() * self.shape.layers

    def trainable(self) -> Iterator[tuple[int, int, int]]:
        """Number of elements, bytes of one, and number of like tensors, of everything that is trained."""
        options, layers = self.options, self.shape.layers
        for linear in self.shape.linears:
            if options.method in ("full", "galore"):
                yield linear.numel, self.size, layers
            for numel in self.adapter(linear):
                yield numel, self.adapter_size, layers
        if options.full_rank:
            for numel in self.rest():
                yield numel, self.size, 1

    def optimizer_state(self) -> int:
        """Both moments of everything that is trained; GaLore's of targeted weights are projected."""
        total = 0
        projected = {linear.numel: linear.shape for linear in self.shape.linears} if self._galore else {}
        for numel, size, count in self.trainable():
            if numel in projected:
                numel = math.prod(trainable_shape(projected[numel], min(self.options.rank, *projected[numel])))
            total += count * self._moments(numel, size)
        if self.options.full_rank and self.options.optimizer_bits == 8 and not self._galore:
            # those of an embedding stay in 32 bits with the Trainer
            total += 8 * self.table - self._moments(self.table, self.size)
        return total

    @property
    def _galore(self) -> bool:
        return self.options.method == "galore"

    def _moments(self, numel: int, size: int) -> int:
        if self.options.optimizer == "adamw":
            return 2 * size * numel
        # of bitsandbytes: float32, or blocks of 8 bits unless a tensor is small
        is_float32 = numel < 4096 or self.options.optimizer_bits == 32
        return 8 * numel if is_float32 else 2 * (numel + 4 * math.ceil(numel / 256))

    def static(self, dense: bool = False) -> Counter:
        """What is held from step to step on the device."""
        shape, layers = self.shape, self.shape.layers
        codes, state = self.weights(dense)
        held = Counter(
            {
                "weights": layers * codes,
                "quantization state": layers * state,
                "embeddings and norms": self.size * sum(self.rest()),
                "P": layers * sum(self.projection(linear) for linear in shape.linears),
                "B": layers * self.adapter_size * sum(sum(self.adapter(linear)) for linear in shape.linears),
            }
        )
        if self.options.trains_loqt and self.options.retain_base == "device" and not dense:
            held["base weights"] = self._base_weights()
        if not self.options.paged:
            held["optimizer state"] = self.optimizer_state()
        return held

    ###############################
    # What a step adds
    ###############################

    def gradients(self) -> tuple[int, int, int]:
        """Of a decoder layer, of the head with the last norm, and of the embedding."""
        layer = head = embedding = 0
        for linear in self.shape.linears:
            if self.options.method in ("full", "galore"):
                layer += self.size * linear.numel
            layer += self.adapter_size * sum(self.adapter(linear))
        if self.options.full_rank:
            layer += self.size * sum(self._norms_and_biases())
            head = self.size * (self.table + self.shape.hidden)
            embedding = 0 if self.shape.tied else self.size * self.table
        return layer, head, embedding

    def _norm(self) -> int:
        """Saved by one RMSNorm, without its output: its input in float32, the factor, and what its weight multiplies."""
        trained = self.size if self.options.full_rank else 0
        return self.tokens * (self.shape.hidden * (4 + trained) + 4)

    def _saves_input(self, linear: Linear, capture: bool, drifted: bool) -> bool:
        method = self.options.method
        if capture or method in ("full", "galore"):
            return True
        same_dtype = self.size == self.adapter_size
        return same_dtype and (method in ("lora", "qlora") or not self._saves_thin(linear, capture, drifted))

    def _saves_thin(self, linear: Linear, capture: bool, drifted: bool) -> bool:
        """Whether `x Pᵀ` is kept for the gradient of B."""
        way = self._way(linear, capture) if drifted else BRANCH
        return self.options.trains_loqt and not keeps_input(way, linear.shape, self.rank(linear))

    def _way(self, linear: Linear, capture: bool = False) -> str:
        """How the products of a drifted layer are computed."""
        # layers of several dtypes multiply with each matrix in its own
        if not self.options.trains_loqt or self.size != self.adapter_size:
            return BRANCH
        return cheapest(self.tokens, linear.shape, self.rank(linear), records=capture)

    def activations(self, capture: bool = False, drifted: bool = True) -> int:
        """Saved by a decoder layer from its forward to its backward.

        Args:
            capture (`bool`): Whether the gradients of the targeted weights are recorded.
            drifted (`bool`): Whether LoQT has been through its first update.
        """
        shape, options, T = self.shape, self.options, self.tokens
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        total = 2 * self._norm()
        # attention: rotated query and key, value, output, and the sums of its rows
        total += T * ((2 * q + 2 * kv) * self.size + 4 * shape.heads)
        # MLP: gate and its SiLU, up
        total += T * 3 * shape.intermediate * self.size
        groups = {linear.group for linear in shape.linears if self._saves_input(linear, capture, drifted)}
        inputs = {"attention": shape.hidden, "mlp": shape.hidden, "down": shape.intermediate, "output": 0}
        total += T * self.size * sum(inputs[group] for group in groups)
        for linear in shape.linears:
            lora = options.method in ("lora", "qlora")
            if lora or self._saves_thin(linear, capture, drifted):
                total += T * self.rank(linear) * self.adapter_size
            cast = lora or (options.trains_loqt and not is_right(linear.shape))
            if cast and self.size != self.adapter_size:
                total += T * linear.shape[1] * self.adapter_size
        return total

    def _optimizer_temporaries(self, numel: int, size: int) -> int:
        # torch's AdamW makes a square root and a denominator; bitsandbytes', the paged ones too, makes nothing
        return 2 * size * numel if self.options.optimizer_bits == 32 and not self.options.paged else 0

    def _table_step(self) -> int:
        """Beyond the gradient of the embedding or the head, what stepping it within the backward pass needs."""
        per_layer = self.options.per_layer and self.options.full_rank
        return self._optimizer_temporaries(self.table, self.size) if per_layer else 0

    def _in_layer(self, gradients: int) -> int:
        """The most that the backward of one decoder layer holds beyond its saved activations."""
        shape, T, e = self.shape, self.tokens, self.size
        numel = max(linear.numel for linear in shape.linears)
        dense = self.options.method in ("full", "galore")
        # the copy of a 4-bit weight, the sum with s·PB, or the gradient of a trained one
        sums = any(self._way(linear) != BRANCH for linear in shape.linears)
        weight = e * numel if dense or sums or self.options.method in ("loqt", "qlora") else 0
        if self.options.per_layer and dense:
            weight += self._optimizer_temporaries(numel, e)
        wide = T * e * shape.intermediate
        # what a checkpoint computed again is freed later
        second = weight + wide if dense and self.options.gradient_checkpointing else max(weight, wide)
        first = T * e * shape.hidden + wide + second
        mlp = e * sum(linear.numel for linear in shape.linears if linear.group in ("mlp", "down")) if dense else 0
        last = min(mlp, gradients) + T * e * (shape.hidden - shape.intermediate)
        return max(first, last)

    def _logits(self) -> int:
        """The largest of the loss and its derivative: float32 copies of the logits."""
        forward = self.size + (0 if self.size == 4 else 4) + 4
        return self.tokens * self.shape.vocabulary * max(forward, 12)

    def _step(self, update: bool, dense: bool = False) -> dict[str, Counter]:
        """The peaks of an ordinary step, or of one with an update of LoQT."""
        capture = update and self._captures
        shape, options, T, e, L = self.shape, self.options, self.tokens, self.size, self.shape.layers
        held = self.static(dense)
        layer, head, embedding = self.gradients()
        every = L * layer + head + embedding
        accumulated = every if options.gradient_accumulation_steps > 1 else 0
        if options.per_layer:
            layer = head = embedding = 0
            every = accumulated
        mode = options.update_mode if capture else None
        saved = self.activations(capture and mode != "stagger", not dense)
        more = self.activations(True, not dense) - saved if mode == "stagger" else 0
        stream = T * shape.hidden * e
        rope = options.sequence_length * shape.head_dim * e * 2
        kept = L * stream if options.gradient_checkpointing else L * saved + more
        again = saved + more if options.gradient_checkpointing else 0
        last_norm = self._norm() + (stream if options.full_rank else 0)
        if not (options.full_rank or options.gradient_checkpointing):
            # without a gradient of the embedding nothing before the first adapter is saved
            kept -= self._norm()
        captured, sums, capturing = self._capture() if capture else (0, 0, 0)
        table = e * self.table if options.full_rank else 0
        # a table is stepped within the backward pass; a tied one only when its second gradient has come, and both then
        # exist beside what was accumulated
        stepped = table if options.per_layer else 0
        waiting = table if shape.tied and (accumulated or options.per_layer) else 0
        earlier = sums if accumulated else 0

        def peak(**parts: int) -> Counter:
            return held + Counter(parts)

        ordinary, capturing = self._in_layer(layer), max(self._in_layer(layer), capturing + stream)
        # of staggered updates the last layer's: its sum is held while all others go through their backward
        block = earlier if mode == "stagger" else 0
        candidates = {
            "forward": [
                peak(
                    activations=kept + rope + last_norm,
                    logits=self._logits(),
                    gradients=accumulated,
                    temporaries=earlier,
                ),
                peak(
                    activations=kept + rope + last_norm,
                    logits=T * shape.vocabulary * e,
                    gradients=accumulated + max(head if accumulated else 0, stepped) or head,
                    temporaries=earlier,
                ),
                peak(
                    activations=kept + rope + last_norm,
                    gradients=accumulated + stepped,
                    temporaries=earlier + (0 if shape.tied else self._table_step()),
                ),
            ],
            "backward": [
                # the last layer, when nearly all is saved; the first, when nearly all gradients are there
                peak(
                    activations=kept + rope + again,
                    gradients=max(accumulated, head) + waiting,
                    temporaries=capturing + earlier,
                ),
                peak(
                    activations=kept + rope + again - (stream if again else saved + more) if L > 1 else 0,
                    gradients=max(accumulated, head + layer) + waiting,
                    temporaries=ordinary + block if L > 1 else 0,
                ),
                peak(
                    activations=saved + rope + (stream if again else 0),
                    gradients=max(accumulated, head + (L - 1) * layer) + waiting,
                    temporaries=(ordinary + block if block else capturing + max(earlier, (L - 1) * captured)),
                ),
                peak(
                    gradients=max(accumulated, head + L * layer + embedding)
                    + waiting
                    + (table if accumulated or options.per_layer else 2 * table if shape.tied else 0),
                    activations=2 * stream,
                    temporaries=self._table_step() + L * captured,
                ),
            ],
            "optimizer": [
                peak(
                    gradients=every,
                    temporaries=L * captured
                    + (
                        0
                        if options.per_layer
                        else max(self._optimizer_temporaries(numel, size) for numel, size, _ in self.trainable())
                    ),
                )
            ],
        }
        if update:
            rest = every - self.adapter_size * sum(sum(self.adapter(x)) for x in shape.linears) * (
                0 if options.per_layer else 1 if options.update_mode == "stagger" else L
            )
            before = 4 * sum(x.numel for x in shape.linears if x.group in ("attention", "output"))
            left = L * captured - (before if captured and mode == "whole" else 0)
            candidates["switch"] = [peak(gradients=rest, temporaries=left + self._switch())]
        return {name: _largest(found) for name, found in candidates.items()}

    def _base_weights(self) -> int:
        """The original weights, which LoQT keeps beside the drifted ones."""
        if self.options.base == "dense":
            return self.shape.layers * self.size * sum(linear.numel for linear in self.shape.linears)
        return self._four_bit_weights()

    def _four_bit_weights(self) -> int:
        """All targeted weights in 4 bits."""
        return self.shape.layers * sum(sum(self._four_bit(linear.numel)) for linear in self.shape.linears)

    @property
    def _captures(self) -> bool:
        """Whether an update needs gradients of the weights."""
        return self.options.projection != "random"

    def _offloads(self) -> bool:
        options = self.options
        return options.update_mode != "whole" if options.offload_gradients is None else options.offload_gradients

    def _capture(self) -> tuple[int, int, int]:
        """What a captured layer holds until the switch (averaged over all layers), the sums over micro-batches of all
        layers together, and what capturing needs for a while."""
        shape, options = self.shape, self.options
        numel = max(linear.numel for linear in shape.linears)
        gradient = numel * (4 + (self.size if self.size < 4 else 0))
        gradients = 0 if self._offloads() else 4 * sum(linear.numel for linear in shape.linears)
        if options.update_mode == "whole":
            return gradients, shape.layers * gradients, gradient
        projections = 0 if self._offloads() else sum(self.projection(linear) for linear in shape.linears)
        transient = max(gradient, 4 * numel + max(self._thin(linear) for linear in shape.linears))
        if options.gradient_accumulation_steps > 1:
            transient = max(transient, 8 * numel)
        if options.update_mode == "stagger":
            return projections // shape.layers, gradients, transient
        return projections, shape.layers * gradients, transient

    def _thin(self, linear: Linear) -> int:
        """The matrices of the randomized range finder, float32, of its width."""
        smaller, larger = min(linear.shape), max(linear.shape)
        # a sketch and what it is made of; the QR of its image
        return 4 * sketch_width(self.rank(linear), smaller) * max(larger + smaller, 3 * smaller)

    def _switch(self) -> int:
        """Merging, requantizing and compensating one layer: float32 matrices of its size."""
        largest = max(self.shape.linears, key=lambda linear: linear.numel)
        packed = sum(self._four_bit(largest.numel)) if self.options.method == "loqt" else self.size * largest.numel
        # W and its residual; the best W so far, a new one, and the codes that it is made of
        matrices = 8 * largest.numel + 3 * packed
        if self._captures and self.options.update_mode == "whole" and self._offloads():
            matrices += 4 * largest.numel
        # B in the coordinates of the basis: the present one, the best so far and the better of them; P and the basis
        adapter, P = sum(self.adapter(largest)), math.prod(projection_shape(largest.shape, self.rank(largest)))
        return matrices + 12 * adapter + 8 * P

    def phases(self) -> dict[str, Counter]:
        """The peak of every phase, by category; see [`~loqt_peft.memory.estimate.MemoryEstimate`]."""
        load = self.static(self.options.starts_dense)
        del load["optimizer state"]
        phases = {"load": load, **self._step(update=False)}
        if self.options.trains_loqt:
            phases["update step"] = _largest(self._step(update=True).values())
            if self.options.starts_dense:
                phases["first update"] = _largest(self._step(update=True, dense=True).values())
        if self._galore:
            phases["update step"] = self._galore_update()
        return phases

    def _galore_update(self) -> Counter:
        # GaLore's optimizer decomposes the gradient of one layer in float32, in full
        layer, head, embedding = self.gradients()
        out, inner = max((linear.shape for linear in self.shape.linears), key=math.prod)
        small = min(out, inner)
        held = self.size * out * inner if self.options.per_layer else self.shape.layers * layer + head + embedding
        return self.static() + Counter(
            gradients=held, temporaries=4 * (out * inner + out * small + small + small * inner)
        )

    def host(self) -> Counter:
        """What lies in the memory of the host."""
        options, layers = self.options, self.shape.layers
        held: Counter[str] = Counter()
        if options.trains_loqt and options.retain_base == "cpu":
            held["base weights"] = self._base_weights()
        if options.error_feedback:
            held["error"] = self._four_bit_weights()
        if options.trains_loqt and self._captures and self._offloads():
            updated = 1 if options.update_mode == "stagger" else layers
            if options.update_mode == "whole" or options.gradient_accumulation_steps > 1:
                held["gradients"] = 4 * updated * sum(linear.numel for linear in self.shape.linears)
            if options.update_mode != "whole":
                held["P"] = updated * sum(self.projection(linear) for linear in self.shape.linears)
        if options.paged:
            held["optimizer state"] = self.optimizer_state()
        return held


def _largest(counters) -> Counter:
    return max(counters, key=lambda counter: sum(counter.values()))
