"""What a training step adds, in formulas: activations, gradients, what an update captures and computes."""

from __future__ import annotations

import math

from ..algorithm.operations import BRANCH, cheapest, keeps_input
from ..algorithm.projection import is_right, projection_shape, sketch_width
from .lasting import LastingMemory
from .shape import Linear


class StepMemory(LastingMemory):
    """Bytes that one part of a step needs by itself, beside those that are held from step to step."""

    def gradients(self) -> tuple[int, int, int]:
        """Of a decoder layer, of the head with the last norm, and of the embedding."""
        layer = head = embedding = 0
        for linear in self.shape.linears:
            if self.options.method in ("full", "galore"):
                layer += self.size * linear.numel
            layer += self.adapter_size * sum(self.adapter(linear))
        if self.options.full_rank:
            layer += self.size * sum(self.norms_and_biases())
            head = self.size * (self.table + self.shape.hidden)
            embedding = 0 if self.shape.tied else self.size * self.table
        return layer, head, embedding

    def norm(self) -> int:
        """Saved by one RMSNorm, without its output: its input in float32, the factor, and what its weight multiplies."""
        trained = self.size if self.options.full_rank else 0
        return self.tokens * (self.shape.hidden * (4 + trained) + 4)

    def _saves_input(self, linear: Linear, capture: bool, switched: bool) -> bool:
        method = self.options.method
        if capture or method in ("full", "galore"):
            return True
        same_dtype = self.size == self.adapter_size
        return same_dtype and (method in ("lora", "qlora") or not self._saves_thin(linear, capture, switched))

    def _saves_thin(self, linear: Linear, capture: bool, switched: bool) -> bool:
        """Whether `x Pᵀ` is kept for the gradient of B."""
        way = self._way(linear, capture) if switched else BRANCH
        return self.options.trains_loqt and not keeps_input(way, linear.shape, self.rank(linear))

    def _way(self, linear: Linear, capture: bool = False) -> str:
        """How the products of a switched layer are computed."""
        # layers of several dtypes multiply with each matrix in its own
        if not self.options.trains_loqt or self.size != self.adapter_size:
            return BRANCH
        return cheapest(self.tokens, linear.shape, self.rank(linear), records=capture)

    def activations(self, capture: bool = False, switched: bool = True) -> int:
        """Saved by a decoder layer from its forward to its backward.

        Args:
            capture (`bool`): Whether the gradients of the targeted weights are recorded.
            switched (`bool`): Whether LoQT has been through its first update.
        """
        shape, options, T = self.shape, self.options, self.tokens
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        total = 2 * self.norm()
        # attention: rotated query and key, value, output, and the sums of its rows
        total += T * ((2 * q + 2 * kv) * self.size + 4 * shape.heads)
        # MLP: gate and its SiLU, up
        total += T * 3 * shape.intermediate * self.size
        groups = {linear.group for linear in shape.linears if self._saves_input(linear, capture, switched)}
        inputs = {"attention": shape.hidden, "mlp": shape.hidden, "down": shape.intermediate, "output": 0}
        total += T * self.size * sum(inputs[group] for group in groups)
        for linear in shape.linears:
            lora = options.method in ("lora", "qlora")
            if lora or self._saves_thin(linear, capture, switched):
                total += T * self.rank(linear) * self.adapter_size
            cast = lora or (options.trains_loqt and not is_right(linear.shape))
            if cast and self.size != self.adapter_size:
                total += T * linear.shape[1] * self.adapter_size
        return total

    def optimizer_temporaries(self, numel: int, size: int) -> int:
        """Of the step of a tensor with elements of `size` bytes."""
        # torch's AdamW makes a square root and a denominator; bitsandbytes', the paged ones too, makes nothing
        return 2 * size * numel if self.options.optimizer_bits == 32 and not self.options.paged else 0

    def table_step(self) -> int:
        """Beyond the gradient of the embedding or the head, what stepping it within the backward pass needs."""
        per_layer = self.options.per_layer and self.options.full_rank
        return self.optimizer_temporaries(self.table, self.size) if per_layer else 0

    def in_layer(self, gradients: int) -> int:
        """The most that the backward of one decoder layer holds beyond its saved activations."""
        shape, T, e = self.shape, self.tokens, self.size
        numel = max(linear.numel for linear in shape.linears)
        dense = self.options.method in ("full", "galore")
        # the copy of a 4-bit weight, the sum with s·PB, or the gradient of a trained one
        sums = any(self._way(linear) != BRANCH for linear in shape.linears)
        weight = e * numel if dense or sums or self.options.method in ("loqt", "qlora") else 0
        if self.options.per_layer and dense:
            weight += self.optimizer_temporaries(numel, e)
        wide = T * e * shape.intermediate
        # what a checkpoint computed again is freed later
        second = weight + wide if dense and self.options.gradient_checkpointing else max(weight, wide)
        first = T * e * shape.hidden + wide + second
        mlp = e * sum(linear.numel for linear in shape.linears if linear.group in ("mlp", "down")) if dense else 0
        last = min(mlp, gradients) + T * e * (shape.hidden - shape.intermediate)
        return max(first, last)

    def logits(self) -> int:
        """The largest of the loss and its derivative: float32 copies of the logits."""
        forward = self.size + (0 if self.size == 4 else 4) + 4
        return self.tokens * self.shape.vocabulary * max(forward, 12)

    @property
    def captures(self) -> bool:
        """Whether an update needs gradients of the weights."""
        return self.options.projection != "random"

    def offloads(self) -> bool:
        """Whether what is captured lies on the host."""
        options = self.options
        return options.update_mode != "whole" if options.offload_gradients is None else options.offload_gradients

    def capturing(self) -> tuple[int, int, int]:
        """What a captured layer holds until the switch (averaged over all layers), the sums over micro-batches of all
        layers together, and what capturing needs for a while."""
        shape, options = self.shape, self.options
        numel = max(linear.numel for linear in shape.linears)
        gradient = numel * (4 + (self.size if self.size < 4 else 0))
        gradients = 0 if self.offloads() else 4 * sum(linear.numel for linear in shape.linears)
        if options.update_mode == "whole":
            return gradients, shape.layers * gradients, gradient
        projections = 0 if self.offloads() else sum(self.projection(linear) for linear in shape.linears)
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

    def switch(self) -> int:
        """Merging, requantizing and compensating one layer: float32 matrices of its size."""
        largest = max(self.shape.linears, key=lambda linear: linear.numel)
        packed = sum(self._four_bit(largest.numel)) if self.options.method == "loqt" else self.size * largest.numel
        # W and its residual; the best W so far, a new one, and the codes that it is made of
        matrices = 8 * largest.numel + 3 * packed
        if self.captures and self.options.update_mode == "whole" and self.offloads():
            matrices += 4 * largest.numel
        # B in the coordinates of the basis: the present one, the best so far and the better of them; P and the basis
        adapter, P = sum(self.adapter(largest)), math.prod(projection_shape(largest.shape, self.rank(largest)))
        return matrices + 12 * adapter + 8 * P
