"""Memory of training, counted without a device: real layers, optimizer and update on torch's `meta` device."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..algorithm.quantization import _dynamic_map
from ..layers.find import loqt_layers
from ..layers.layer import LoQTLayer
from .counter import DEVICE, HOST, Peak, StorageCounter
from .options import MemoryOptions
from .simulated_model import (
    INTERVAL,
    build_model,
    make_optimizer,
    no_overrides,
    on_meta,
    tensors_of_weight,
    with_layers,
)


# layers that a model is built with when the rest is extrapolated
FEW_LAYERS = (2, 3)


class Run:
    """Training steps of one model under a [`StorageCounter`], on `meta` or, for comparison, for real on the CPU.

    Peaks are noted by (step, phase, place), with the steps "ordinary", "update" and, where LoQT starts from dense weights,
    "first update". Memory grows or shrinks evenly from layer to layer, so that those at the ends have the peaks.

    Args:
        config (`PreTrainedConfig`): Of a causal language model.
        options (`MemoryOptions`): What is trained, and how.
        device (`str`): `"meta"` or `"cpu"`.

    Raises:
        ValueError: If the method is one that cannot be run, or the model has no list of decoder layers.
    """

    def __init__(self, config: PreTrainedConfig, options: MemoryOptions, device: str = "meta") -> None:
        if options.method == "galore":
            raise ValueError("method='galore' cannot be simulated: its optimizer is no part of this package.")
        self.options = options
        # bitsandbytes builds its tables of levels on first use, from temporaries of their own
        _dynamic_map(torch.device(device))
        self.model = build_model(config, options, device)
        self.counter = StorageCounter(device)
        self.layers = self._decoder_layers(config.num_hidden_layers)
        shape = (options.batch_size, options.sequence_length)
        self.tokens = torch.randint(config.vocab_size, shape, device=device)
        self._step, self._backward, self._last_micro_batch = "warm-up", False, True
        if options.gradient_checkpointing:
            model = self.model if options.method == "full" else self.model.get_base_model()
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizers = self._make_optimizers(trained)
        self._hook(trained)
        for layer in self._loqt_layers():
            self._watch(layer)

    def _decoder_layers(self, count: int) -> nn.ModuleList:
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
        raise ValueError(f"A {type(self.model).__name__} cannot be simulated: it has no list of {count} layers.")

    def _make_optimizers(self, trained: list[nn.Parameter]) -> dict[Any, torch.optim.Optimizer]:
        """By parameter if they are stepped one by one, else the embeddings' and that of all others, which is `None`'s."""
        tables = {module.weight for module in self.model.modules() if isinstance(module, nn.Embedding)}
        groups: dict[Any, list[nn.Parameter]] = {}
        for parameter in trained:
            key = parameter if self.options.per_layer else "embeddings" if parameter in tables else None
            groups.setdefault(key, []).append(parameter)
        # the Trainer leaves the state of embeddings in 32 bits
        return {key: make_optimizer(group, self.options, group[0] in tables) for key, group in groups.items()}

    def _loqt_layers(self) -> list[LoQTLayer]:
        return [layer for _, layer in loqt_layers(self.model)]

    ###############################
    # Hooks
    ###############################

    def _hook(self, trained: list[nn.Parameter]) -> None:
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(lambda *_, i=index: self._enter("forward", i))
            layer.register_forward_hook(lambda _module, _args, output, i=index: self._hook_output(output, i))
        model = self.model if self.options.method == "full" else self.model.get_base_model()
        model.get_output_embeddings().register_forward_pre_hook(lambda *_: self._enter("forward", "head"))
        self._hooks = [p.register_post_accumulate_grad_hook(self._gradient_is_ready) for p in trained]

    def _watch(self, layer: LoQTLayer) -> None:
        """Count what a layer moves between device and host, which on `meta` moves nothing."""
        layer.base.move = lambda device: self._move_base(layer, device)
        layer.capture.stop = lambda stop=layer.capture.stop: self._stop_capture(stop)
        layer.kept_error = lambda name, kept=layer.kept_error: self._to_device(kept(name))
        layer.place = lambda place=layer.place: self._place(layer, place)

    def _hook_output(self, output: Any, index: int) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            output.register_hook(lambda _: self._enter("backward", index))

    def _enter(self, phase: str, place: int | str) -> None:
        # checkpointing runs a layer forward again within its backward
        if phase == "forward" and self._backward and not str(place).startswith("start"):
            return
        self._backward = phase == "backward"
        category = "logits" if place == "head" else "activations" if phase == "forward" else "temporaries"
        if isinstance(place, int):
            count = len(self.layers)
            ends = {count - 2: "last layer but one", count - 1: "last layer", 0: "first layer"}
            place = ends.get(place, f"layer {place}")
        self.counter.begin(category, (self._step, phase, place))

    def _gradient_is_ready(self, parameter: nn.Parameter) -> None:
        self.counter.register(parameter.grad, "gradients")
        if self.options.per_layer and self._last_micro_batch:
            self._optimizers[parameter].step()
            parameter.grad = None

    def _move_base(self, layer: LoQTLayer, device: torch.device) -> None:
        place = HOST if device.type == "cpu" else DEVICE
        for tensor in tensors_of_weight(layer.get_base_layer().weight):
            self.counter.register(tensor, "base weights" if place == HOST else "weights", place)

    def _stop_capture(self, stop: Callable) -> tuple:
        gradient, projected = stop()
        if gradient is not None:
            gradient = self._to_device(gradient)
        if projected is not None:
            projected = projected._replace(P=self._to_device(projected.P))
        return gradient, projected

    def _place(self, layer: LoQTLayer, place: Callable) -> None:
        place()
        self._register_error(layer)

    def _register_error(self, layer: LoQTLayer) -> None:
        for tensor in layer.loqt_error.values():
            self.counter.register(tensor, "error", HOST)

    def _to_device(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is not None and self.counter.place(tensor) == HOST:
            # `tensor.to(device)` does nothing on `meta`
            tensor = torch.empty_like(tensor)
            self.counter.register(tensor, "temporaries", DEVICE)
        return tensor

    ###############################
    # Steps
    ###############################

    def run(self) -> dict[tuple[str, str, str], Peak]:
        """Run the steps that differ from each other, and return the peaks."""
        loqt = self.options.trains_loqt
        staggered = len(self.layers) - 1 if loqt and self.options.update_mode == "stagger" else 0
        steps = [("ordinary", INTERVAL - 1)]
        if loqt:
            # of staggered updates that of the last layer, whose gradient is held longest
            steps += [("update", INTERVAL + staggered)]
        with self.counter, self.prepared():
            if self.options.starts_dense:
                names = ["first update", *["between"] * (staggered - 1), "first update, last layer"][: staggered + 1]
                steps = list(zip(names, range(staggered + 1), strict=True)) + steps
            for self._step, step in steps:
                self.step(step)
        return self.counter.peaks

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """The state between two steps, with base weights and optimizer states where they then are."""
        with no_overrides():
            yield from self._prepared()

    def _prepared(self) -> Iterator[None]:
        self._register()
        if not self.options.starts_dense:
            for layer in self._loqt_layers():
                layer.place()
        self.counter.begin("weights", ("load", "", ""))
        self._warm_up()
        try:
            yield
        finally:
            # a hook on a parameter keeps it alive, and all that the hook refers to
            for hook in self._hooks:
                hook.remove()

    def _warm_up(self) -> None:
        """Give the optimizers their states."""
        self.counter.begin("optimizer state")
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        for optimizer in self._optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        self._register()

    def _register(self) -> None:
        """Count everything that outlives a step under its name."""
        register, place = self.counter.register, self.counter.place
        for layer in self._loqt_layers():
            for tensor in layer.loqt_weight.values():
                register(tensor, "weights")
            self._register_error(layer)
            for tensor in layer.loqt_P.values():
                register(tensor, "P")
        head = self.model.get_output_embeddings()
        linear = {m.weight for m in self.model.modules() if isinstance(m, nn.Linear) and m is not head}
        for name, parameter in self.model.named_parameters():
            if "loqt_B" in name or "lora_" in name:
                register(parameter, "B")
            elif place(parameter) == DEVICE:
                for tensor in tensors_of_weight(parameter):
                    register(tensor, "weights" if parameter in linear else "embeddings and norms")
        for optimizer in self._optimizers.values():
            for state in optimizer.state.values():
                for tensor in state.values():
                    if isinstance(tensor, torch.Tensor) and tensor.dim():
                        register(tensor, "optimizer state", HOST if self.options.paged else None)

    def step(self, step: int) -> None:
        """Run optimizer step number `step`."""
        options = self.options
        if options.trains_loqt:
            self.model.begin_step(step, lambda: self._last_micro_batch)
        for micro_batch in range(min(options.gradient_accumulation_steps, 2)):
            self._last_micro_batch = micro_batch == min(options.gradient_accumulation_steps, 2) - 1
            self._enter("forward", f"start {micro_batch}")
            loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
            self._enter("backward", f"head {micro_batch}")
            loss.backward()
            del loss
        self._enter("optimizer", "all")
        if not options.per_layer:
            for optimizer in self._optimizers.values():
                optimizer.step()
        self._register()
        if options.trains_loqt:
            if self._step != "ordinary":
                self._enter("update", "all")
            self.model.end_step(self._optimizers.get(None))
        for parameter in self.model.parameters():
            parameter.grad = None
        self._register()


def simulate(config: PreTrainedConfig, options: MemoryOptions, all_layers: bool = False) -> dict[str, Peak]:
    """The peak of every phase: "load", "forward", "backward", "optimizer" and, with LoQT, "update step".

    "forward" ends with the loss and its derivative, "update step" is a whole step with an update of LoQT. Where the
    weights are larger before the first of them, that is "first update".

    Args:
        config (`PreTrainedConfig`): Of a causal language model.
        options (`MemoryOptions`): What is trained, and how.
        all_layers (`bool`): Run all decoder layers, instead of a few from which the rest follows by a straight line.

    Returns:
        `dict[str, Peak]`

    Raises:
        ValueError: If the model or the method cannot be simulated.
    """
    count = config.num_hidden_layers
    if all_layers or count <= FEW_LAYERS[-1] + 1:
        with on_meta():
            peaks = Run(config, options).run()
    else:
        staggered = options.trains_loqt and options.update_mode == "stagger"
        # a staggered update has its peak in the last layer but one, which must not be the first
        layers = tuple(number + staggered for number in FEW_LAYERS)
        with on_meta():
            few, more = (Run(with_layers(config, number), options).run() for number in layers)
        factor = count - layers[0]
        peaks = {label: _extrapolate(few[label], more[label], factor) for label in few if label in more}
    phases: dict[str, Peak] = {}
    for (step, phase, place), peak in peaks.items():
        name = step
        if step == "ordinary":
            name = "forward" if phase == "forward" or place.startswith("head") else phase
        name = "update step" if step == "update" else name.split(",")[0]
        if name not in ("between", "warm-up"):
            best = phases.setdefault(name, peak)
            phases[name] = Peak(max(best, peak, key=lambda p: p.total).held, best.host | peak.host)
    return phases


def _extrapolate(few: Peak, more: Peak, factor: float) -> Peak:
    def line(first: Counter, second: Counter) -> Counter:
        return Counter({name: round(first[name] + factor * (second[name] - first[name])) for name in first | second})

    return Peak(line(few.held, more.held), line(few.host, more.host))


def measure_on_cpu(config: PreTrainedConfig, options: MemoryOptions) -> dict[str, int]:
    """Run real steps on the CPU, and count what its allocator hands out.

    For comparison with [`simulate`]: small models only, and torch's optimizer, since bitsandbytes' 8-bit one has
    temporaries on the CPU that it does not have on CUDA.

    Args:
        config (`PreTrainedConfig`): Of a causal language model; its weights are random.
        options (`MemoryOptions`): What is trained, and how.

    Returns:
        `dict[str, int]`: Largest number of bytes in an "ordinary" step and, with LoQT, in an "update step".
    """
    run = Run(config, options, "cpu")
    steps = [("ordinary", INTERVAL - 1)]
    if options.trains_loqt:
        steps.append(("update step", INTERVAL))
    peaks = {}
    with run.prepared():
        for name, step in steps:
            # the profiler knows what earlier profiles saw: collected during this one, it would count as freed by the step
            gc.collect()
            before = sum(run.counter.held[DEVICE].values())
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                run.step(step)
            events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
            events.sort(key=lambda event: event.start_ns())
            peaks[name] = before + max(itertools.accumulate(event.nbytes() for event in events))
    return peaks
