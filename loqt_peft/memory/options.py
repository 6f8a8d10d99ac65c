"""What a memory estimate is asked about. No library is imported, so that the command line can name it at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..choices import (
    BASES,
    DTYPES,
    ESTIMATED_METHODS,
    ESTIMATED_OPTIMIZERS,
    ESTIMATED_PROJECTIONS,
    RETAIN_BASE,
    UPDATE_MODES,
)


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
