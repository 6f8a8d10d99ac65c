"""What the processes of test_fsdp.py do: training with the Trainer under FSDP2, on CPUs."""

import os
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from common import TokenDataset, loqt_config, make_trainer, tiny_llama, token_batch
from peft import get_peft_model
from torch.distributed.fsdp import CPUOffloadPolicy

from loqt_peft import LoQTTrainerCallback, prepare_model_for_fully_shard
from loqt_peft.dtensor import full
from loqt_peft.layers.find import loqt_layers


PARTS = ("loqt_B", "loqt_P", "loqt_weight", "loqt_state")
WIDTHS = {"hidden_size": 32, "intermediate_size": 64}


@contextmanager
def fsdp_on_cpus():
    """accelerate enters FSDP on accelerators only, and trains as DDP elsewhere."""
    init = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            if fsdp_plugin.cpu_offload:
                # there is no device that pages could be locked for
                fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = patched
    try:
        yield
    finally:
        AcceleratorState.__init__ = init
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_USE_FSDP", None)


@torch.no_grad()
def whole_state(model, optimizer):
    """The adapter of each layer and every other trained parameter, with the moments of all that is trained, gathered."""
    state = {}
    for name, layer in loqt_layers(model):
        for part in PARTS:
            container = getattr(layer, part)
            state |= {f"{name}.{part}": full(container[key]).clone() for key in container}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state[name] = full(parameter).clone()
            moments = optimizer.state.get(parameter, {})
            state |= {f"{name}.{key}": full(moments[key]).clone() for key in moments}
    return {name.replace("_checkpoint_wrapped_module.", ""): tensor for name, tensor in state.items()}


class Watch(LoQTTrainerCallback):
    """Keeps the losses, the steps of updates, and the states of the beginning, of each update and of the end."""

    def __init__(self):
        super().__init__()
        self.losses, self.updates, self.states = [], [], {}

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, optimizer=optimizer, **kwargs)
        self.states["begin"] = whole_state(model, optimizer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        updated = self._update is not None
        super().on_step_end(args, state, control, model=model, optimizer=optimizer, **kwargs)
        if updated:
            self.updates.append(state.global_step)
            self.states[state.global_step] = whole_state(model, optimizer)

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        super().on_train_end(args, state, control, model=model, **kwargs)
        self.states["end"] = whole_state(model, optimizer)


def train(output_dir, model_kwargs=None, config=None, fsdp=None, resume=None, **args):
    """Train; with `fsdp` (what is added to `fsdp_config`) under FSDP2. See [`Watch`] for what it returns."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(**{**WIDTHS, **(model_kwargs or {})}), loqt_config(**(config or {})))
    world = int(os.environ.get("WORLD_SIZE", 1))
    defaults = {
        "max_steps": 24,
        "logging_steps": 1,
        "per_device_train_batch_size": 12 // world,
        "logging_nan_inf_filter": False,
        "max_grad_norm": 0.5,
    }
    if fsdp is not None:
        wrap = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        defaults |= {"fsdp": True, "fsdp_config": {**wrap, **fsdp}}
    watch = Watch()
    with fsdp_on_cpus():
        trainer = make_trainer(
            model, output_dir, [watch], dataset=TokenDataset(size=96), **{**defaults, **args}
        )
        trainer.train(resume_from_checkpoint=resume)
        if fsdp is not None:
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(f"{output_dir}/final")
    return {"losses": watch.losses, "updates": watch.updates, "states": watch.states}


def each(calls):
    """The results of several calls of `train`, made one after the other in the same processes."""
    return [train(*args, **kwargs) for args, kwargs in calls]
