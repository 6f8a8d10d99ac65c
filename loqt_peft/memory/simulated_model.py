"""The model whose training is simulated, its optimizers, and what `meta` tensors need of torch, transformers, bitsandbytes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig

from ..compat import quantize_now
from ..config import LoQTConfig
from ..layers.find import loqt_layers
from .options import MemoryOptions


# more than decoder layers, so that staggered updates take one layer a step
INTERVAL = 1000
_ATTENTION = "loqt_attention"


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


# without a mask function of that name, transformers builds no mask
AttentionInterface.register(_ATTENTION, _flash_attention)


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Keep `meta` from torch, which raises when asked for its autocast, and from the tables that bitsandbytes caches."""
    ask, tables = torch.is_autocast_enabled, bnb.functional.name2qmap

    def is_autocast_enabled(*args):
        return False if args and args[0] == "meta" else ask(*args)

    torch.is_autocast_enabled, bnb.functional.name2qmap = is_autocast_enabled, {}
    try:
        yield
    finally:
        torch.is_autocast_enabled, bnb.functional.name2qmap = ask, tables


@contextlib.contextmanager
def no_overrides() -> Iterator[None]:
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
    # transformers 5.0 does not on the meta device
    model.tie_weights()
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
            update_interval=INTERVAL,
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
    layer.weight = quantize_now(weight, torch.device(device))
    layer.bias = linear.bias
    return layer


def make_optimizer(
    parameters: list[nn.Parameter], options: MemoryOptions, is_embedding: bool
) -> torch.optim.Optimizer:
    """The optimizer of a group of parameters, as the Trainer makes it."""
    if options.optimizer == "adamw":
        # "foreach", the default on CUDA, needs one more buffer of the size of all gradients
        return torch.optim.AdamW(parameters, lr=1e-3, foreach=False)
    if is_embedding or options.optimizer_bits == 32:
        return bnb.optim.AdamW32bit(parameters, lr=1e-3)
    return bnb.optim.AdamW8bit(parameters, lr=1e-3)


def tensors_of_weight(weight: torch.Tensor) -> list[torch.Tensor]:
    """A weight and, if it is a 4-bit one, its quantization state."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return [weight]
    nested = [] if state.state2 is None else [state.state2.absmax, state.offset]
    return [weight, state.absmax, *nested]
