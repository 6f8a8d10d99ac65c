"""What the processes of test_fsdp.py do: training under FSDP2, on CPUs."""

import os
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from common import TokenDataset, loqt_config, make_trainer, tiny_llama, token_batch
from peft import get_peft_model
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from loqt_peft import LoQTTrainerCallback, LoQTWarning, prepare_model_for_fully_shard
from loqt_peft.dtensor import full
from loqt_peft.layers.find import loqt_layers
from loqt_peft.training import distributed


PARTS = ("loqt_P", "loqt_weight", "loqt_state")
WIDTHS = {"hidden_size": 32, "intermediate_size": 64}
ONE_BLOCK = {"num_hidden_layers": 1}
# updates at steps 0, 7, 14 and 21; W is dense, and P does not depend on rounding
DENSE = {"update_interval": 7, "quantize_weight": None, "quantize_projection": None, "projection": "random"}
NF4 = {"update_interval": 7}


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
    """Keeps the losses, and the states of the beginning, after each update and of the end."""

    def __init__(self):
        super().__init__()
        self.losses, self.states = [], {}

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, optimizer=optimizer, **kwargs)
        self.states["begin"] = whole_state(model, optimizer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        updated = self._update is not None
        super().on_step_end(args, state, control, **kwargs)
        if updated:
            self.states[state.global_step] = whole_state(model, optimizer)

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        super().on_train_end(args, state, control, model=model, **kwargs)
        self.states["end"] = whole_state(model, optimizer)


def make_model(config=(), **kwargs):
    return get_peft_model(tiny_llama(**{**WIDTHS, **kwargs}), loqt_config(**{**NF4, **dict(config)}))


def train(output_dir, config=(), fsdp=None, resume=None, prepared=False, model=(), hsdp=None, **args):
    """Train with the Trainer; what [`Watch`] keeps. If it saves checkpoints, the adapter is saved at last.

    With `fsdp`, settings in addition to those of every run, under FSDP2; with `prepared` as a process by itself that has
    prepared the model in the same way.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    defaults = {
        "max_steps": 24,
        "logging_steps": 1,
        "per_device_train_batch_size": 12 // world,
        "max_grad_norm": 0.5,
    }
    if fsdp is not None:
        defaults |= {
            "fsdp": True,
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **fsdp},
        }
    if hsdp is not None:
        # of accelerate from 1.10 on
        from accelerate.parallelism_config import ParallelismConfig

        defaults["parallelism_config"] = ParallelismConfig(dp_replicate_size=hsdp[0], dp_shard_size=hsdp[1])
    if args.get("optim") == "adamw_torch_8bit":
        # torchao compiles its step, for a minute
        torch.compile = lambda function, **_: function
    watch, model = Watch(), make_model(config, **dict(model))
    if prepared:
        prepare_model_for_fully_shard(model)
    with fsdp_on_cpus():
        trainer = make_trainer(model, output_dir, [watch], dataset=TokenDataset(size=96), **{**defaults, **args})
        trainer.train(resume_from_checkpoint=resume)
        if fsdp is not None and args.get("save_strategy") == "steps":
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
            trainer.save_model(f"{output_dir}/final")
    return {"losses": watch.losses, "states": watch.states}


def each(calls):
    """The results of several calls of `train`, one after the other in the same processes."""
    return [train(*args, **kwargs) for args, kwargs in calls]


###############################
# A loop of one's own
###############################


@contextmanager
def process_group():
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def shard(model, **kwargs):
    for block in model.get_base_model().model.layers:
        fully_shard(block, **kwargs)
    fully_shard(model, **kwargs)
    return model


def loop(model, steps, rank=0, world=1, poison=()):
    """Train by hand, each process on its part of the batch; in steps of `poison` those of process 1 are not finite."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    updates, losses, states = [], [], []
    for step in range(steps):
        model.begin_step(step)
        tokens = token_batch(step, batch=12).chunk(world)[rank]
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        (loss * (float("inf") if step in poison and rank == 1 else 1)).backward()
        if step in poison:
            optimizer.zero_grad()
        optimizer.step()
        updates.append(model.end_step(optimizer) is not None)
        optimizer.zero_grad()
        if updates[-1] or step == steps - 1:
            states.append(whole_state(model, optimizer))
    return {"losses": losses, "updates": updates, "states": states}


def own_loops():
    """Plain `fully_shard`: an ordinary run, one with CPU offload, and one with a gradient that is not finite at an update."""
    with process_group() as rank:
        runs = [{}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}]
        models = [shard(prepare_model_for_fully_shard(make_model(DENSE, **ONE_BLOCK)), **kwargs) for kwargs in runs]
        results = [loop(model, 9, rank, 2) for model in models]
        model = shard(prepare_model_for_fully_shard(make_model(**ONE_BLOCK)))
        return [*results, loop(model, 9, rank, 2, poison=[7])]


def _error(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def refusals():
    """What a loop of one's own is told, on each process."""
    with process_group() as rank:
        torch.manual_seed(rank)
        unlike = _error(prepare_model_for_fully_shard, make_model({"init_weights": False}, seed=rank))
        unprepared = shard(make_model())
        begun = _error(unprepared.begin_step, 0)
        feedback = _error(prepare_model_for_fully_shard, make_model({"error_feedback": True}))
        model = shard(prepare_model_for_fully_shard(make_model()))
        actions = [model.merge_and_unload, model.unload, model.disable_adapter_layers]
        actions += [lambda: model.base_model.export(f"never{rank}", "dense")]
        actions += [lambda: model.delete_adapter("default"), lambda: model.add_adapter("other", loqt_config())]
        return {"unlike": unlike, "unprepared": begun, "feedback": feedback, "actions": list(map(_error, actions))}


# what is asked of the Trainer -> its arguments, and those of `fsdp_config`
REFUSED = {
    "fsdp1": ({}, {"version": 1, "sync_module_states": False}),
    "cpu_ram_efficient_loading": ({}, {"cpu_ram_efficient_loading": True}),
    "bitsandbytes": ({"optim": "paged_adamw_8bit"}, {}),
    "torchao, whole": ({"optim": "adamw_torch_8bit", "save_strategy": "steps"}, {}),
    "dtypes": ({}, {}),
}


def trainer_refusals(output_dir):
    """What the Trainer says when it is made; and whether the model is then as it was. At last without FSDP for CPUs."""
    told = {}
    for name, (kwargs, config) in REFUSED.items():
        model = make_model({"full_rank_modules": ["lm_head"]})
        if name == "dtypes":
            model.get_base_model().lm_head.to(torch.bfloat16)
        with fsdp_on_cpus():
            kwargs = {"fsdp": True, "fsdp_config": {"version": 2, **config}, **kwargs}
            error = _error(make_trainer, model, output_dir, [LoQTTrainerCallback()], **kwargs)
        told[name] = error, not any(layer.base.is_sharded for _, layer in loqt_layers(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(make_model(), output_dir, [LoQTTrainerCallback()], fsdp=True, fsdp_config={"version": 2})
        told["not active"] = [str(w.message) for w in caught if issubclass(w.category, LoQTWarning)]
    return told


def unused_module():
    """A block's module that runs on process 0 only."""
    with process_group() as rank:
        model = shard(prepare_model_for_fully_shard(make_model(DENSE, **ONE_BLOCK)))
        model.set_reduce_scatter_unused_params(True)
        if rank:
            mlp = model.get_base_model().model.layers[0].mlp
            mlp.forward = lambda x: torch.zeros_like(x)
        return loop(model, 2, rank, 2)


def killed():
    """Process 1 ends in the middle of an update; what process 0 is told."""
    with process_group() as rank:
        model = shard(prepare_model_for_fully_shard(make_model()))
        if rank:
            distributed.compute_switch = lambda *_: os._exit(1)
        return _error(loop, model, 1, rank, 2)
