"""Memory of training, counted without a device: real layers, optimizer and update on torch's `meta` device.

Tensors on `meta` have shapes and dtypes but no bytes. A dispatch mode sees every operation and logs the birth and the death
of every storage, which gives what a device would hold at every moment. Because a `meta` tensor cannot be copied to the
host, the mode answers such copies by tensors that it counts as host memory.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig

from ..algorithm.quantization import _dynamic_map
from ..config import LoQTConfig
from ..layers.layer import LoQTLayer, loqt_layers
from .closed_form import MemoryOptions


aten = torch.ops.aten

DEVICE, HOST = "device", "host"
# storages that grow with nothing, such as the step counter of AdamW, may be real ones on the CPU
_SMALL = 4096
# layers that a model is built with when the rest is extrapolated
FEW_LAYERS = (2, 3)
# more than decoder layers, so that staggered updates take one layer a step
_INTERVAL = 1000
_ATTENTION = "loqt_attention"


@dataclass
class Peak:
    """The moment with most memory on the device.

    Attributes:
        held (`Counter`): Bytes on the device by category, at that moment.
        host (`Counter`): The largest numbers of bytes on the host by category, each by itself.
    """

    held: Counter = field(default_factory=Counter)
    host: Counter = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.held.values())


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of all storages that operations create while it is active, `meta` or real.

    Args:
        device_type (`str`): Of the tensors that are counted as the device's, `"meta"` or `"cpu"`.

    Attributes:
        category (`str`): Under which new storages are counted.
        label: Under which peaks are noted; none are if it is `None`.
        peaks (`dict[Any, Peak]`): By label.
    """

    def __init__(self, device_type: str = "meta") -> None:
        super().__init__()
        self.device_type = device_type
        self.category = "activations"
        self.label: Any = None
        self.peaks: dict[Any, Peak] = {}
        self.held: dict[str, Counter] = {DEVICE: Counter(), HOST: Counter()}
        # by address of the C++ object: place, category, bytes, and the weak reference that tells of its death
        self._alive: dict[int, tuple[str, str, int, weakref.ref]] = {}

    def begin(self, category: str, label: Any = None) -> None:
        """From now on, count new storages and note peaks under other names."""
        self.category, self.label = category, label
        self._note()

    def register(self, tensor: torch.Tensor, category: str, place: str | None = None) -> None:
        """Count a storage, or move one that is counted to another category or place."""
        storage = tensor.untyped_storage()
        key, place = storage._cdata, place or self.place(tensor)
        if key in self._alive:
            self._bury(key)
        reference = weakref.ref(storage, lambda _, key=key: self._bury(key))
        self._alive[key] = (place, category, storage.nbytes(), reference)
        self.held[place][category] += storage.nbytes()
        self._note()

    def place(self, tensor: torch.Tensor) -> str:
        """Where a tensor lies, or was said to lie."""
        found = self._alive.get(tensor.untyped_storage()._cdata)
        return found[0] if found else DEVICE if tensor.device.type == self.device_type else HOST

    def _bury(self, key: int) -> None:
        place, category, nbytes, _ = self._alive.pop(key)
        self.held[place][category] -= nbytes

    def _copied(self, tensor: torch.Tensor) -> int:
        """Bytes that the device needs for a copy of what an operation reads from the host."""
        place, category, nbytes, _ = self._alive.get(tensor.untyped_storage()._cdata, (DEVICE, "", 0, None))
        # paged memory is read where it lies
        return nbytes if place == HOST and tensor.is_meta and category != "optimizer state" else 0

    def _note(self, transient: int = 0) -> None:
        if self.label is None:
            return
        peak = self.peaks.setdefault(self.label, Peak())
        peak.host |= self.held[HOST]
        if sum(self.held[DEVICE].values()) + transient > peak.total:
            peak.held = self.held[DEVICE] + Counter({"temporaries": transient})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        inputs = [*_tensors(args), *_tensors(kwargs.values())]
        places = {self.place(tensor) for tensor in inputs if tensor.is_meta}
        if func is aten._local_scalar_dense.default and places:
            # the one thing the update asks a device: how many gradients are not finite
            return 0
        place = HOST if places == {HOST} else None
        to_host = "device" in kwargs and torch.device(kwargs["device"] or "meta").type == "cpu"
        if to_host and self.device_type == "meta":
            if func is aten._to_copy.default and places and inputs[0].numel() <= _SMALL:
                return torch.ones_like(inputs[0], device="cpu")
            if places or _is_large_factory(func, args):
                place = HOST
                if kwargs.get("generator") is not None:
                    # on a real device this generator is the device's
                    place, kwargs["generator"] = DEVICE, None
                kwargs |= {"device": torch.device("meta"), "pin_memory": False}
        outputs = func(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in _tensors([outputs]):
            key = tensor.untyped_storage()._cdata
            if key not in self._alive and key not in known:
                self.register(tensor, self.category, place)
        transient = _inside(func, args)
        if len(places) == 2 and func is not aten.copy_.default:
            transient += sum(self._copied(tensor) for tensor in inputs)
        if transient:
            self._note(transient)
        return outputs


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    # torch's own pytree takes longer than most operations on `meta`
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _is_large_factory(func, args) -> bool:
    shape = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    return all(isinstance(size, int) for size in shape) and math.prod(shape) > _SMALL


def _inside(func, args) -> int:
    """Bytes that an operation allocates and frees by itself."""
    # for large batches bitsandbytes multiplies with a dequantized copy of the weight
    if func is torch.ops.bitsandbytes.gemm_4bit.default:
        return math.prod(args[2]) * args[0].element_size()
    return 0


def _flash_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Causal attention that never forms the attention matrix, for transformers' `AttentionInterface`."""
    if query.is_meta:
        # what is chosen on CUDA; without a device torch would choose the kernel that does
        output = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout, True, scale=scaling)[0]
    else:
        gqa = key.shape[1] != query.shape[1]
        output = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=gqa
        )
    return output.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def _on_meta() -> Iterator[None]:
    """Keep `meta` from torch, which raises when asked for its autocast, and from the tables that bitsandbytes caches."""
    ask, tables = torch.is_autocast_enabled, bnb.functional.name2qmap

    def is_autocast_enabled(*args):
        return False if args and args[0] == "meta" else ask(*args)

    torch.is_autocast_enabled, bnb.functional.name2qmap = is_autocast_enabled, {}
    try:
        yield
    finally:
        torch.is_autocast_enabled, bnb.functional.name2qmap = ask, tables


# without a mask function of that name, transformers builds no mask
AttentionInterface.register(_ATTENTION, _flash_attention)


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """A copy of a config with fewer layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def build_model(config: PreTrainedConfig, options: MemoryOptions, device: str = "meta") -> nn.Module:
    """The model with the adapters of the method, ready to train, its trainable parameters marked.

    Args:
        config (`PreTrainedConfig`): Of a causal language model.
        options (`MemoryOptions`): What is trained, and how.
        device (`str`): `"meta"`, or `"cpu"` for real, random weights.
    """
    dtype, adapter_dtype = getattr(torch, options.dtype), getattr(torch, options.adapter_dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_ATTENTION)
    model.config.use_cache = False
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if not names:
        raise ValueError(f"A {type(model).__name__} cannot be simulated: it has no nn.Linear but the head.")
    if options.base == "4bit":
        for name in names:
            model.set_submodule(name, _four_bit(model.get_submodule(name), options, device))
    if options.method in ("full", "galore"):
        return model.train()

    if options.trains_loqt:
        quantization, updates = "nf4" if options.method == "loqt" else None, int(not options.starts_dense)
        adapter = LoQTConfig(
            r=options.rank,
            target_modules=names,
            quantize_weight=quantization,
            quantize_projection=quantization,
            double_quant=options.double_quant,
            update_mode=options.update_mode,
            update_interval=_INTERVAL,
            interval_schedule="constant",
            full_rank_modules="all" if options.full_rank else None,
            retain_base=options.retain_base,
            offload_gradients=options.offload_gradients,
            projection=options.projection,
            error_feedback=options.error_feedback,
            num_updates=updates,
            task_type="CAUSAL_LM",
        )
    else:
        adapter = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=names, task_type="CAUSAL_LM")
    with torch.device(device):
        model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_" in name or "loqt_" in name):
            parameter.data = parameter.data.to(adapter_dtype)
        elif options.full_rank and not options.trains_loqt and "base_layer" not in name:
            parameter.requires_grad = True
    for _, layer in loqt_layers(model):
        # it steers the run, so it must have a value
        layer.loqt_state["default"] = torch.tensor([updates, 0], dtype=torch.int64, device="cpu")
    return model.train()


def _four_bit(linear: nn.Linear, options: MemoryOptions, device: str) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        compress_statistics=options.double_quant,
        quant_type="nf4",
        device="meta",
    )
    weight = bnb.nn.Params4bit(
        linear.weight.data,
        requires_grad=False,
        compress_statistics=options.double_quant,
        quant_type="nf4",
        module=layer,
    )
    layer.weight = weight._quantize(torch.device(device))
    layer.bias = linear.bias
    return layer


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
            layer.base.move = lambda device, layer=layer: self._move_base(layer, device)
            layer.capture.stop = lambda stop=layer.capture.stop: self._stop_capture(stop)
            layer.kept_error = lambda name, kept=layer.kept_error: self._to_device(kept(name))
            layer.place = lambda layer=layer, place=layer.place: self._place(layer, place)

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
        return {key: _make_optimizer(group, self.options, group[0] in tables) for key, group in groups.items()}

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
        for tensor in _tensors_of_weight(layer.get_base_layer().weight):
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
        steps = [("ordinary", _INTERVAL - 1)]
        if loqt:
            # of staggered updates that of the last layer, whose gradient is held longest
            steps += [("update", _INTERVAL + staggered)]
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
        with _no_overrides():
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
                for tensor in _tensors_of_weight(parameter):
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


@contextlib.contextmanager
def _no_overrides() -> Iterator[None]:
    """Without the bits that bitsandbytes was told for single parameters.

    It goes by their place among the parameters and by `id`, which a later tensor may have again, so what the Trainer told it
    for one optimizer would reach any other.
    """
    manager = bnb.optim.GlobalOptimManager.get_instance()
    overrides = manager.index2config, manager.pid2config
    manager.index2config, manager.pid2config = {}, {}
    try:
        yield
    finally:
        manager.index2config, manager.pid2config = overrides


def _make_optimizer(
    parameters: list[nn.Parameter], options: MemoryOptions, is_embedding: bool
) -> torch.optim.Optimizer:
    if options.optimizer == "adamw":
        # "foreach", the default on CUDA, needs one more buffer of the size of all gradients
        return torch.optim.AdamW(parameters, lr=1e-3, foreach=False)
    if is_embedding or options.optimizer_bits == 32:
        return bnb.optim.AdamW32bit(parameters, lr=1e-3)
    return bnb.optim.AdamW8bit(parameters, lr=1e-3)


def _tensors_of_weight(weight: torch.Tensor) -> list[torch.Tensor]:
    """A weight and, if it is a 4-bit one, its quantization state."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return [weight]
    nested = [] if state.state2 is None else [state.state2.absmax, state.offset]
    return [weight, state.absmax, *nested]


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
        with _on_meta():
            peaks = Run(config, options).run()
    else:
        staggered = options.trains_loqt and options.update_mode == "stagger"
        # a staggered update has its peak in the last layer but one, which must not be the first
        layers = tuple(number + staggered for number in FEW_LAYERS)
        with _on_meta():
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
    steps = [("ordinary", _INTERVAL - 1)]
    if options.trains_loqt:
        steps.append(("update step", _INTERVAL))
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
