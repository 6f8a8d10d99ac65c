"""What outlives a training step, in formulas: weights, adapter, optimizer state."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from ..algorithm.packed_layout import BLOCKSIZE, NESTED_BLOCKSIZE, packed_bytes
from ..algorithm.projection import projection_shape, trainable_shape
from .options import MemoryOptions
from .shape import Linear, ModelShape


DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class LastingMemory:
    """Bytes that are held from step to step; every method counts what its name says.

    Args:
        shape ([`ModelShape`]): The model.
        options ([`MemoryOptions`]): What is trained, and how.
    """

    def __init__(self, shape: ModelShape, options: MemoryOptions) -> None:
        self.shape, self.options = shape, options
        self.size, self.adapter_size = DTYPE_BYTES[options.dtype], DTYPE_BYTES[options.adapter_dtype]
        self.tokens = options.batch_size * options.sequence_length

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
            return packed_bytes(shape, options.double_quant)
        return self.size * math.prod(shape)

    def adapter(self, linear: Linear) -> list[int]:
        """Numbers of elements of the trainable matrices of a layer's adapter."""
        if self.options.trains_loqt:
            return [math.prod(trainable_shape(linear.shape, self.rank(linear)))]
        if self.options.method in ("lora", "qlora"):
            return [side * self.rank(linear) for side in linear.shape]
        return []

    def norms_and_biases(self) -> list[int]:
        """Numbers of elements of a decoder layer's vectors."""
        return [self.shape.hidden] * 2 + [linear.shape[0] for linear in self.shape.linears if linear.bias]

    @property
    def table(self) -> int:
        """Number of elements of the embedding, and of the head."""
        return self.shape.vocabulary * self.shape.hidden

    def rest(self) -> list[int]:
        """Numbers of elements of all that is not targeted."""
        tables = [self.table] if self.shape.tied else [self.table] * 2
        return tables + [self.shape.hidden] + self.norms_and_biases() * self.shape.layers

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
        projected = {linear.numel: linear.shape for linear in self.shape.linears} if self.is_galore else {}
        for numel, size, count in self.trainable():
            if numel in projected:
                numel = math.prod(trainable_shape(projected[numel], min(self.options.rank, *projected[numel])))
            total += count * self._moments(numel, size)
        if self.options.full_rank and self.options.optimizer_bits == 8 and not self.is_galore:
            # those of an embedding stay in 32 bits with the Trainer
            total += 8 * self.table - self._moments(self.table, self.size)
        return total

    @property
    def is_galore(self) -> bool:
        """Whether the targeted weights are trained by GaLore's optimizer."""
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
            held["base weights"] = self.base_weights()
        if not self.options.paged:
            held["optimizer state"] = self.optimizer_state()
        return held

    def base_weights(self) -> int:
        """The original weights, which LoQT keeps beside the switched ones."""
        if self.options.base == "dense":
            return self.shape.layers * self.size * sum(linear.numel for linear in self.shape.linears)
        return self.four_bit_weights()

    def four_bit_weights(self) -> int:
        """All targeted weights in 4 bits."""
        return self.shape.layers * sum(sum(self._four_bit(linear.numel)) for linear in self.shape.linears)
