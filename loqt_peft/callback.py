"""`LoQTTrainerCallback`: brings LoQT's updates to the stock Trainer. It keeps no state of its own beyond a step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from .distributed import tell_ddp
from .findings import Finding, report
from .layer import LoQTLayer
from .model_card import keep_loqt_section, write_model_card
from .optimizer_state import optimizer_findings
from .performance import PerformanceCallback, callback_handler
from .update import LoQTUpdate, active_layers, begin_step, cancel_step, end_step
from .weight_shares import weight_shares


REFUSED = {
    DistributedType.DEEPSPEED: "DeepSpeed partitions or replicates B behind the model's back, so the values that an update "
    "writes into it would be lost",
    DistributedType.FSDP: "FSDP shards the parameters that an update reads and writes",
    DistributedType.MEGATRON_LM: "Megatron-LM splits the layers that an update reads and writes",
}


# of TRL
AVERAGES = ("SyncRefModelCallback", "BEMACallback")


def check_averages(callbacks: Iterable[TrainerCallback]) -> list[Finding]:
    """Callbacks that average the parameters of two models, and nothing else of them."""
    return [
        Finding(
            "error",
            "averages_parameters",
            f"{type(callback).__name__} averages the parameters of two models, but of a LoQT adapter only B is one: after an "
            "update B belongs to another W and P, which it does not average.",
            "Leave it out (`sync_ref_model=False`).",
        )
        for callback in callbacks
        if any(base.__name__ in AVERAGES for base in type(callback).__mro__)
    ]


class LoQTTrainerCallback(PerformanceCallback):
    """Captures the gradients of an update step, switches all layers after the optimizer's step, and logs what it did.

    Whether a step is an update step follows from the adapter's config and `global_step`; everything else lives in the
    adapter, so that a checkpoint needs nothing of this callback. At each update these go to the Trainer's logs:
    `loqt/updates`, `loqt/merged_change`, `loqt/quantization_error_before`, `loqt/quantization_error_after`,
    `loqt/change_to_error`, `loqt/gradient_energy`, `loqt/seconds` (see [`loqt_peft.update.LoQTUpdate`]); and with each of
    the Trainer's own entries what [`PerformanceCallback`] measures.

    Raises:
        ValueError:
            When training begins, with the reason and what to do instead: no LoQT adapter that trains, two of these
            callbacks, an optimizer that does not hold B, those of GaLore and APOLLO, one whose state cannot be treated as
            `optimizer_state` says (see [`loqt_peft.optimizer_state.optimizer_findings`]), `nn.DataParallel`, DeepSpeed, FSDP,
            `auto_find_batch_size`, or a per-layer optimizer with arguments that it does not allow.
    """

    def __init__(self) -> None:
        super().__init__()
        self._update: LoQTUpdate | None = None

    def on_init_end(self, args, state, control, model=None, **kwargs):
        # when training begins, the Trainer has wrapped the model already
        tell_ddp(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        **kwargs,
    ):
        self._check_setup(args, model, optimizer)
        handler = callback_handler()
        report(check_averages([] if handler is None else handler.callbacks))
        super().on_train_begin(args, state, control, model=model, optimizer=optimizer, **kwargs)
        if state.is_world_process_zero:
            print(self._summary(model, state), flush=True)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        # the Trainer sets it before each forward pass
        begin_step(model, state.global_step, lambda: GradientState().sync_gradients)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self._update = end_step(model, optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if self._update is None:
            return
        logs, self._update = self._update.metrics(), None
        if state.epoch is not None:
            logs["epoch"] = state.epoch
        state.log_history.append({**logs, "step": state.global_step})
        handler = callback_handler()
        if handler is not None:
            # the event resets the flag, which may ask for the Trainer's own logs of this step
            should_log = control.should_log
            handler.on_log(args, state, control, logs)
            control.should_log = should_log

    def on_train_end(self, args, state, control, model=None, **kwargs):
        super().on_train_end(args, state, control, model=model, **kwargs)
        cancel_step(model)

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        # an adapter added by transformers has no card of PEFT's
        if not state.is_world_process_zero or not isinstance(model, PeftModel):
            return
        # a push in the middle of training writes no card, and copies the files of the adapter "default" only
        write_model_card(model, args.output_dir, [name for name in model.peft_config if name == "default"])
        # the one at its end writes a new one
        keep_loqt_section(model)

    @staticmethod
    def _summary(model: nn.Module, state: TrainerState) -> str:
        adapter_name, layers = active_layers(model)
        ranks = sorted({layer.r[adapter_name] for _, layer in layers})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        weights = sum(layer.out_features * layer.in_features for _, layer in layers)
        others = sum(
            p.numel() for n, p in model.named_parameters() if ".base_layer.weight" not in n and "loqt_B" not in n
        )
        steps = layers[0][1].config[adapter_name].schedule.update_steps(state.max_steps, state.global_step)
        return (
            f"LoQT: {len(layers)} layers, {rank}, {trainable:,} trainable parameters "
            f"({100 * trainable / (weights + others):.1f}% of the base model's), "
            f"{len(steps)} updates to come in {state.max_steps - state.global_step} steps\n"
            f"LoQT: {weight_shares(model, adapter_name)}"
        )

    @staticmethod
    def _check_setup(args: TrainingArguments, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        if not any(isinstance(module, LoQTLayer) for module in model.modules()):
            raise ValueError(
                "LoQTTrainerCallback: the model has no LoQT layers. Wrap it with `get_peft_model(model, LoQTConfig(...))` "
                "before giving it to the Trainer."
            )
        adapter_name, layers = active_layers(model)
        if adapter_name is None:
            raise ValueError(
                "LoQTTrainerCallback: no LoQT adapter is active and trainable. Activate one with `model.set_adapter(name)`, "
                "or load it with `is_trainable=True`."
            )
        if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED and args.n_gpu > 1:
            raise ValueError(
                f"LoQTTrainerCallback: nn.DataParallel over {args.n_gpu} devices copies the layers, and what the copies "
                "capture is lost. Start the script with `torchrun` or `accelerate launch` (DDP), or set "
                "CUDA_VISIBLE_DEVICES to one device."
            )
        distributed_type = AcceleratorState().distributed_type
        if distributed_type in REFUSED:
            raise ValueError(
                f"LoQTTrainerCallback: {distributed_type.value} is not supported: {REFUSED[distributed_type]}. Use DDP."
            )
        if args.auto_find_batch_size and any(layer.num_updates(adapter_name) for _, layer in layers):
            raise ValueError(
                "LoQTTrainerCallback: auto_find_batch_size starts training again with weights that have already changed. "
                "Set per_device_train_batch_size instead."
            )
        if args.optim_target_modules is not None:
            raise ValueError(
                f"LoQTTrainerCallback: optim={args.optim!s} with optim_target_modules={args.optim_target_modules!r} is not "
                "allowed: GaLore and APOLLO make a low rank of the gradients of nn.Linear's weights, which LoQT has frozen, "
                "and do not see B, which is of low rank by itself. Use optim='adamw_torch' or 'adamw_bnb_8bit', without "
                "optim_target_modules."
            )
        if optimizer is not None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            missing = [name for name, layer in layers if id(layer.loqt_B[adapter_name]) not in held]
            if missing:
                raise ValueError(
                    f"LoQTTrainerCallback: the optimizer does not hold B of {len(missing)} of {len(layers)} LoQT layers, "
                    f"e.g. {missing[0]}. Create it after `get_peft_model` and give it all trainable parameters."
                )
            report(optimizer_findings(layers, adapter_name, optimizer))
