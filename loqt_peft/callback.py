"""`LoQTTrainerCallback`: brings LoQT's updates to the stock Trainer. It keeps no state of its own beyond a step."""

from __future__ import annotations

from accelerate.state import GradientState
from peft import PeftModel
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ._moved import moved_names
from .findings import report_once
from .health import trainer_findings
from .layers.find import active_layers
from .layers.weight_shares import weight_shares
from .saving.model_card import keep_loqt_section, write_model_card
from .training.distributed import tell_ddp
from .training.figures import LoQTUpdate
from .training.performance import PerformanceCallback, callback_handler
from .training.sharding import prepare_model_for_fully_shard
from .training.sharding_checks import engine_findings, is_fsdp
from .training.update import begin_step, cancel_step, end_step


__getattr__ = moved_names(__name__)


class LoQTTrainerCallback(PerformanceCallback):
    """Captures the gradients of an update step, switches all layers after the optimizer's step, and logs what it did.

    Whether a step is an update step follows from the adapter's config and `global_step`; everything else lives in the
    adapter, so that a checkpoint needs nothing of this callback. At each update these go to the Trainer's logs:
    `loqt/updates`, `loqt/merged_change`, `loqt/quantization_error_before`, `loqt/quantization_error_after`,
    `loqt/change_to_error`, `loqt/gradient_energy`, `loqt/seconds` (see [`loqt_peft.training.update.LoQTUpdate`]); and with
    each of the Trainer's own entries what [`PerformanceCallback`] measures.

    Raises:
        ValueError:
            When training begins, with the reason and what to do instead: no LoQT adapter that trains, two of these
            callbacks, an optimizer that does not hold B, those of GaLore and APOLLO, one whose state cannot be treated as
            `optimizer_state` says (see [`loqt_peft.training.optimizer_state.optimizer_findings`]), `nn.DataParallel`,
            DeepSpeed, `auto_find_batch_size`, or a per-layer optimizer with arguments that it does not allow.
    """

    def __init__(self) -> None:
        super().__init__()
        self._update: LoQTUpdate | None = None

    def on_init_end(self, args, state, control, model=None, **kwargs):
        # when training begins, the Trainer has wrapped or sharded the model already
        report_once(model, engine_findings(model, args))
        if is_fsdp():
            prepare_model_for_fully_shard(model, args.device)
        else:
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
        handler = callback_handler()
        report_once(model, trainer_findings(model, args, optimizer, [] if handler is None else handler.callbacks))
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
        steps = layers[0][1].config[adapter_name].schedule.update_steps(state.max_steps, state.global_step)
        return (
            f"LoQT: {len(layers)} layers, {rank}, {trainable:,} trainable parameters, "
            f"{len(steps)} updates to come in {state.max_steps - state.global_step} steps\n"
            f"LoQT: {weight_shares(model, adapter_name)}"
        )
