"""How much memory training takes, predicted in closed form: the peaks of every phase."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from .step import StepMemory


class ClosedForm(StepMemory):
    """Bytes of one model trained in one way, at the peak of every phase.

    Args:
        shape ([`ModelShape`]): The model.
        options ([`MemoryOptions`]): What is trained, and how.
    """

    def phases(self) -> dict[str, Counter]:
        """The peak of every phase, by category; see [`~loqt_peft.memory.estimate.MemoryEstimate`]."""
        load = self.static(self.options.starts_dense)
        del load["optimizer state"]
        phases = {"load": load, **_StepPeaks(self).by_phase()}
        if self.options.trains_loqt:
            phases["update step"] = _largest(_StepPeaks(self, update=True).by_phase().values())
            if self.options.starts_dense:
                phases["first update"] = _largest(_StepPeaks(self, update=True, dense=True).by_phase().values())
        if self.is_galore:
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
            held["base weights"] = self.base_weights()
        if options.error_feedback:
            held["error"] = self.four_bit_weights()
        if options.trains_loqt and self.captures and self.offloads():
            updated = 1 if options.update_mode == "stagger" else layers
            if options.update_mode == "whole" or options.gradient_accumulation_steps > 1:
                held["gradients"] = 4 * updated * sum(linear.numel for linear in self.shape.linears)
            if options.update_mode != "whole":
                held["P"] = updated * sum(self.projection(linear) for linear in self.shape.linears)
        if options.paged:
            held["optimizer state"] = self.optimizer_state()
        return held


class _StepPeaks:
    """The moments of a step that may be its peak, on the device.

    Args:
        memory ([`StepMemory`]): Of what its parts need.
        update (`bool`): Whether it is a step with an update of LoQT.
        dense (`bool`): Whether the weights are those before the first update, of a base that was loaded dense.
    """

    def __init__(self, memory: StepMemory, update: bool = False, dense: bool = False) -> None:
        self.memory, self.update, self.dense = memory, update, dense
        shape, options = memory.shape, memory.options
        self.shape, self.options, self.layers = shape, options, shape.layers
        self.held = memory.static(dense)
        self.stream = memory.tokens * shape.hidden * memory.size
        self.rope = options.sequence_length * shape.head_dim * memory.size * 2
        capture = update and memory.captures
        self.mode = options.update_mode if capture else None
        self._set_gradients()
        self._set_activations()
        # what a captured layer holds, the sums over micro-batches of all layers, and what capturing needs for a while
        self.captured, sums, capturing = memory.capturing() if capture else (0, 0, 0)
        self.earlier = sums if self.accumulated else 0
        self.ordinary = memory.in_layer(self.layer)
        self.capturing = max(self.ordinary, capturing + self.stream)
        # of staggered updates the last layer's: its sum is held while all others go through their backward
        self.block = self.earlier if self.mode == "stagger" else 0

    def _set_gradients(self) -> None:
        options, memory = self.options, self.memory
        layer, head, embedding = memory.gradients()
        every = self.layers * layer + head + embedding
        self.accumulated = every if options.gradient_accumulation_steps > 1 else 0
        if options.per_layer:
            layer = head = embedding = 0
            every = self.accumulated
        self.layer, self.head, self.embedding, self.every = layer, head, embedding, every
        self.table = memory.size * memory.table if options.full_rank else 0
        # a table is stepped within the backward pass; a tied one only when its second gradient has come, and both then
        # exist beside what was accumulated
        self.stepped = self.table if options.per_layer else 0
        self.waiting = self.table if self.shape.tied and (self.accumulated or options.per_layer) else 0

    def _set_activations(self) -> None:
        """What all layers keep, what one of them saves, and what more it saves for a staggered update."""
        options, memory, mode = self.options, self.memory, self.mode
        saved = memory.activations(mode not in (None, "stagger"), not self.dense)
        more = memory.activations(True, not self.dense) - saved if mode == "stagger" else 0
        kept = self.layers * self.stream if options.gradient_checkpointing else self.layers * saved + more
        self.again = saved + more if options.gradient_checkpointing else 0
        self.last_norm = memory.norm() + (self.stream if options.full_rank else 0)
        if not (options.full_rank or options.gradient_checkpointing):
            # without a gradient of the embedding nothing before the first adapter is saved
            kept -= memory.norm()
        self.saved, self.more, self.kept = saved, more, kept

    def by_phase(self) -> dict[str, Counter]:
        """The peaks of "forward", "backward", "optimizer" and, with an update, "switch", by category."""
        found = {
            "forward": _largest(self._forward()),
            "backward": _largest(self._backward()),
            "optimizer": self._optimizer(),
        }
        if self.update:
            found["switch"] = self._switch()
        return found

    def _peak(self, **parts: int) -> Counter:
        return self.held + Counter(parts)

    def _forward(self) -> list[Counter]:
        """Its end: the loss, its derivative, and the head."""
        memory, accumulated, activations = self.memory, self.accumulated, self.kept + self.rope + self.last_norm
        return [
            self._peak(
                activations=activations, logits=memory.logits(), gradients=accumulated, temporaries=self.earlier
            ),
            self._peak(
                activations=activations,
                logits=memory.tokens * self.shape.vocabulary * memory.size,
                gradients=accumulated + max(self.head if accumulated else 0, self.stepped) or self.head,
                temporaries=self.earlier,
            ),
            self._peak(
                activations=activations,
                gradients=accumulated + self.stepped,
                temporaries=self.earlier + (0 if self.shape.tied else memory.table_step()),
            ),
        ]

    def _backward(self) -> list[Counter]:
        """The last layer, when nearly all is saved; the first, when nearly all gradients are there; the embedding."""
        L, accumulated, again, captured = self.layers, self.accumulated, self.again, self.captured
        several, activations = L > 1, self.kept + self.rope + again
        tables = self.table if accumulated or self.options.per_layer else 2 * self.table if self.shape.tied else 0
        return [
            self._peak(
                activations=activations,
                gradients=max(accumulated, self.head) + self.waiting,
                temporaries=self.capturing + self.earlier,
            ),
            self._peak(
                activations=activations - (self.stream if again else self.saved + self.more) if several else 0,
                gradients=max(accumulated, self.head + self.layer) + self.waiting,
                temporaries=self.ordinary + self.block if several else 0,
            ),
            self._peak(
                activations=self.saved + self.rope + (self.stream if again else 0),
                gradients=max(accumulated, self.head + (L - 1) * self.layer) + self.waiting,
                temporaries=(
                    self.ordinary + self.block
                    if self.block
                    else self.capturing + max(self.earlier, (L - 1) * captured)
                ),
            ),
            self._peak(
                gradients=max(accumulated, self.head + L * self.layer + self.embedding) + self.waiting + tables,
                activations=2 * self.stream,
                temporaries=self.memory.table_step() + L * captured,
            ),
        ]

    def _optimizer(self) -> Counter:
        memory, stepping = self.memory, 0
        if not self.options.per_layer:
            stepping = max(memory.optimizer_temporaries(numel, size) for numel, size, _ in memory.trainable())
        return self._peak(gradients=self.every, temporaries=self.layers * self.captured + stepping)

    def _switch(self) -> Counter:
        options, memory, linears = self.options, self.memory, self.shape.linears
        # of the layers that are switched together the gradients of B are gone
        gone = 0 if options.per_layer else 1 if options.update_mode == "stagger" else self.layers
        rest = self.every - memory.adapter_size * sum(sum(memory.adapter(x)) for x in linears) * gone
        before = 4 * sum(x.numel for x in linears if x.group in ("attention", "output"))
        left = self.layers * self.captured - (before if self.captured and self.mode == "whole" else 0)
        return self._peak(gradients=rest, temporaries=left + memory.switch())


def _largest(counters: Iterable[Counter]) -> Counter:
    return max(counters, key=lambda counter: sum(counter.values()))
