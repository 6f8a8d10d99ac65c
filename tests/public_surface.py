"""The public names as users' code uses them. Nobody runs this: `make types` checks that the annotations say what is true."""

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments
from typing_extensions import assert_type

import loqt_peft
from loqt_peft import (
    LoQTConfig,
    LoQTModel,
    LoQTQuantizationConfig,
    LoQTTrainerCallback,
    PerformanceCallback,
    estimate_memory,
    get_last_checkpoint,
    pack_model,
    per_layer,
    per_layer_optimizer,
    plan_memory,
)
from loqt_peft.export import ExportReport
from loqt_peft.memory import MemoryEstimate, MemoryPlan
from loqt_peft.training.figures import LoQTUpdate


def configure() -> LoQTConfig:
    config = LoQTConfig(
        task_type="CAUSAL_LM",
        r=128,
        loqt_alpha="auto",
        target_modules=["q_proj"],
        full_rank_modules="all",
        quantize_weight=None,
        interval_schedule="constant",
        projection="random",
        optimizer_state="rotate",
        update_mode="stagger",
    )
    assert_type(config.r, int)
    assert_type(config.max_interval, int | None)
    assert_type(config.save_pretrained("adapter"), None)
    return LoQTConfig.paper("60m", r=104)


def own_loop(model: LoQTModel, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    assert_type(model.begin_step(0), bool)
    assert_type(model.begin_step(0, lambda: True), bool)
    update = model.end_step(optimizer)
    assert_type(update, LoQTUpdate | None)
    assert_type(model.end_step(), LoQTUpdate | None)
    assert_type(model.cancel_step(), None)
    assert_type(model.export("out", "lora", rank=0.9), ExportReport)
    if update is None:
        return {}
    assert_type(update.num_updates, int)
    assert_type(update.gradient_energy, float | None)
    return update.metrics()


def trainer(model: LoQTModel, args: TrainingArguments) -> None:
    per_layer(torch.optim.AdamW)
    trainer = Trainer(
        model,
        args,
        optimizer_cls_and_kwargs=per_layer_optimizer(args),
        callbacks=[LoQTTrainerCallback(), PerformanceCallback()],
    )
    checkpoint = get_last_checkpoint("out")
    assert_type(checkpoint, str | None)
    trainer.train(resume_from_checkpoint=checkpoint)


def memory() -> None:
    estimate = estimate_memory("config.json", budget="24GiB", rank=1024)
    assert_type(estimate, MemoryEstimate)
    assert_type(estimate.peak, int)
    assert_type(estimate.fits, bool | None)
    assert_type(plan_memory("config.json", 16 * 2**30), MemoryPlan)
    assert_type(loqt_peft.__version__, str)


def pack(model: PreTrainedModel) -> None:
    config = LoQTQuantizationConfig("fp4", double_quant=True, modules_to_not_convert=["k_proj"])
    assert_type(pack_model(model, "cuda", config), PreTrainedModel)
