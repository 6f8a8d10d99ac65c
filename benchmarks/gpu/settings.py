"""What the measurements share: device and sizes, clocks, models and optimizers."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

# the only import from outside of this folder
from benchmarks.common import bpe_blocks, versions
from loqt_peft import LoQTConfig
from loqt_peft.memory.options import MemoryOptions
from loqt_peft.training.per_layer import per_layer


__all__ = [
    "ROOT",
    "Settings",
    "bpe_blocks",
    "build_model",
    "endless",
    "linear_names",
    "make_optimizer",
    "micro_batch",
    "seconds_of",
    "timed_calls",
    "training_step",
    "versions",
]

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples" / "pretraining" / "configs"
# made by kit.py
TOKENS = ROOT / "gpu_output" / "tokens.safetensors"
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}


@dataclass(frozen=True)
class Settings:
    """Device and sizes of a form of the measurements.

    Attributes:
        tiny (`bool`): Small models on the CPU, instead of the real ones on the first CUDA device.
    """

    tiny: bool = False

    def __post_init__(self) -> None:
        if not self.tiny and not torch.cuda.is_available():
            raise RuntimeError("No CUDA device is visible. `make gpu GPU_ARGS=--tiny` runs the small form on the CPU.")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.tiny else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        # the CPU has no fast bfloat16
        return torch.float32 if self.tiny else torch.bfloat16

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def pick(self, full, tiny):
        """The one or the other, by the form."""
        return tiny if self.tiny else full

    def config(self, size: str) -> PreTrainedConfig:
        """The LLaMA of that size (`"60m"`, `"1b"`, `"7b"`, ...), or in the tiny form a small one."""
        fields = json.loads((CONFIGS / f"llama_{size}.json").read_text(encoding="utf-8"))
        return LlamaConfig(**{**fields, **(TINY if self.tiny else {})})

    def synchronize(self) -> None:
        """Wait until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def empty_cache(self) -> None:
        """Give freed memory back to the driver, so that the next one finds it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def tokens(self, vocabulary: int) -> dict[str, torch.Tensor]:
        """Token ids `[blocks, 256]` for "training" and "validation"; random ones in the tiny form.

        Raises:
            FileNotFoundError: If `make gpu-kit` has not made them.
        """
        if self.tiny:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(vocabulary, (48, 32), generator=generator)
            return {"training": ids[:32], "validation": ids[32:]}
        if not TOKENS.exists():
            raise FileNotFoundError(f"{TOKENS} is missing: `make gpu-kit` makes it.")
        return {name: ids.long() for name, ids in load_file(TOKENS).items()}


def seconds_of(call: Callable[[], object], settings: Settings, repeats: int = 3, warm_up: int = 1) -> float:
    """Median seconds of a call, the device's work included, after calls that do not count."""
    found = []
    for _ in range(warm_up + repeats):
        settings.synchronize()
        start = time.perf_counter()
        call()
        settings.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[warm_up:])


###############################
# Models
###############################


def linear_names(model: nn.Module) -> list[str]:
    """Names of all linear layers but the head."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def _quantize(model: nn.Module, double_quant: bool) -> None:
    """Put the linear layers into 4 bits where they lie, one at a time, as a loader does."""
    for name in linear_names(model):
        linear = model.get_submodule(name)
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            compress_statistics=double_quant,
            quant_type="nf4",
            device="meta",
        )
        weight = bnb.nn.Params4bit(
            linear.weight.data,
            requires_grad=False,
            compress_statistics=double_quant,
            quant_type="nf4",
            module=layer,
        )
        layer.weight, layer.bias = weight.to(linear.weight.device), linear.bias
        model.set_submodule(name, layer)


def build_model(config: PreTrainedConfig, options: MemoryOptions, device: torch.device, **adapter) -> nn.Module:
    """A model with random weights, made on the device, and the adapter of a method.

    Args:
        config (`PreTrainedConfig`): Of a causal language model.
        options (`MemoryOptions`): What is trained, and how; what the memory estimate is asked about.
        device (`torch.device`): Where.
        **adapter: Fields of `LoQTConfig` beside those that follow from the options.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    model.config.use_cache = False
    names = linear_names(model)
    if options.base == "4bit":
        _quantize(model, options.double_quant)
    if options.method == "full":
        return model.train()
    if options.method == "qlora":
        model.requires_grad_(False)
        chosen = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=names, task_type="CAUSAL_LM")
    else:
        chosen = LoQTConfig(
            r=options.rank,
            target_modules=names,
            double_quant=options.double_quant,
            update_mode=options.update_mode,
            full_rank_modules="all" if options.full_rank else None,
            retain_base=options.retain_base,
            projection=options.projection,
            task_type="CAUSAL_LM",
            **adapter,
        )
    return get_peft_model(model, chosen, autocast_adapter_dtype=False).train()


def make_optimizer(model: nn.Module, options: MemoryOptions, lr: float = 1e-3) -> torch.optim.Optimizer:
    """The optimizer that the Trainer would make: with 8-bit moments, but those of embeddings in 32 bits."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    if options.optimizer_bits == 32:
        optimizer_class, arguments = torch.optim.AdamW, {"foreach": False}
    else:
        optimizer_class, arguments = bnb.optim.AdamW8bit, {}
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    if options.per_layer:
        optimizer_class = per_layer(optimizer_class)
    return optimizer_class(parameters, lr=lr, weight_decay=0.0, **arguments)


###############################
# Steps
###############################


def micro_batch(config: PreTrainedConfig, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Random token ids `[batch, length]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (batch, length), generator=generator).to(device)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, step: int | None) -> None:
    """One optimizer step of one micro-batch.

    Args:
        model (`nn.Module`): With or without LoQT.
        optimizer (`torch.optim.Optimizer`): Of its parameters.
        tokens (`torch.Tensor`): Ids `[batch, length]`.
        step (`int`, *optional*): Number of the step, by LoQT's schedule; `None` without LoQT.
    """
    if step is not None:
        model.begin_step(step, lambda: True)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    if step is not None:
        model.end_step(optimizer)
    optimizer.zero_grad()


@contextmanager
def timed_calls(
    modules: Iterable[ModuleType], name: str, settings: Settings, seconds: dict[str, float]
) -> Iterator[None]:
    """Add up under its name in `seconds` what a function takes that some modules call, the device's work included."""
    modules = [module for module in modules if hasattr(module, name)]

    def timed(call):
        def wrapped(*args, **kwargs):
            settings.synchronize()
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                settings.synchronize()
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

        return wrapped

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, name, timed(getattr(module, name))))
        yield


def endless(tokens: torch.Tensor, batch: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Batches of blocks in an order that follows from the seed, epoch after epoch."""
    for epoch in itertools.count():
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed + epoch))
        for start in range(0, len(tokens) - batch + 1, batch):
            yield tokens[order[start : start + batch]]
