"""One run: from its spec to its line of results, through the stock Trainer."""

import math
import tempfile
import time

import torch
from torch import nn
from torch.utils.data import Subset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.common import Blocks, llama, machine, pretraining_arguments, versions
from benchmarks.compare.measures import BatchHash, ByteCounter, Directions, StopAtDivergence, SwitchLosses
from benchmarks.compare.methods import (
    Prepared,
    ProjectionWatch,
    prepare,
    rest_rate,
    targeted_modules,
    with_rest_at,
)
from benchmarks.compare.relora import ReLoRACallback
from loqt_peft import per_layer_optimizer


CURVE_POINTS = 20
CURVE_BLOCKS, FINAL_BLOCKS, SWITCH_BLOCKS = 256, 1024, 128
BASE_ORDER = 1000
UPDATE_FIGURES = (
    "merged_change",
    "quantization_error_before",
    "quantization_error_after",
    "gradient_energy",
    "seconds",
)


def batch_order(blocks: int, wanted: int, seed: int) -> torch.Tensor:
    """Indices of `wanted` blocks: the text in random order, in a new one each time it is through."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(blocks, generator=generator) for _ in range(math.ceil(wanted / blocks))]
    return torch.cat(epochs)[:wanted]


def training_arguments(spec: dict, folder: str, changes: dict) -> TrainingArguments:
    per_micro_batch = spec["batch"] // spec["micro_batches"]
    points = math.ceil(spec["steps"] / CURVE_POINTS)
    return pretraining_arguments(
        folder,
        spec["steps"],
        seed=spec["seed"],
        per_device_train_batch_size=per_micro_batch,
        gradient_accumulation_steps=spec["micro_batches"],
        per_device_eval_batch_size=min(64, max(16, per_micro_batch)),
        optim=spec["optim"],
        learning_rate=spec["lr"],
        use_cpu=spec["device"] == "cpu",
        prediction_loss_only=True,
        logging_steps=points,
        logging_nan_inf_filter=False,
        **({"eval_strategy": "steps", "eval_steps": points} | changes),
    )


def is_finite(model: nn.Module) -> bool:
    tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None and t.is_floating_point()]
    return all(bool(t.isfinite().all()) for t in tensors)


def train(trainer: Trainer) -> None:
    try:
        trainer.train()
    except torch.linalg.LinAlgError:
        # GaLore's decomposition refuses a gradient that is not finite; of a finite one it is an error of its own
        if is_finite(trainer.model):
            raise


def update_records(callbacks: list[TrainerCallback], history: list[dict]) -> list[dict]:
    """A dictionary for each update, restart or new projection, with the number of steps after which it took place."""
    for callback in callbacks:
        if isinstance(callback, ReLoRACallback):
            return [{"step": step} for step in callback.restarts]
        if isinstance(callback, ProjectionWatch):
            return [{"step": step} for step in callback.steps]
        if isinstance(callback, SwitchLosses):
            entries = [entry for entry in history if "loqt/updates" in entry]
            return [
                {
                    "step": entry["step"],
                    **{name: number(entry.get(f"loqt/{name}")) for name in UPDATE_FIGURES},
                    "loss_before": number(before),
                    "loss_after": number(after),
                }
                for entry, before, after in zip(entries, callback.before, callback.after, strict=True)
            ]
    return []


def number(value: float | None) -> float | None:
    """JSON knows no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def tokens_per_second(history: list[dict], tokens: int, excluded: float = 0.0) -> float | None:
    """Over the whole training: the harmonic mean of the logged figures, weighted by their steps.

    Args:
        history (`list[dict]`): The Trainer's logs.
        tokens (`int`): Of an optimizer step.
        excluded (`float`): Seconds that the figures count and that no training took.
    """
    steps, seconds, last = 0, 0.0, 0
    for entry in history:
        speed = entry.get("loqt/tokens_per_second")
        if "loss" in entry and speed:
            steps, seconds = steps + entry["step"] - last, seconds + tokens * (entry["step"] - last) / speed
        if "loss" in entry:
            last = entry["step"]
    return tokens * steps / (seconds - excluded) if seconds else None


def base_model(spec: dict, training: torch.Tensor) -> nn.Module:
    """The model that a method starts from: random or, if `spec` has a "base", trained at full rank first."""
    sizes = spec["model"]
    model = llama(
        sizes["hidden"],
        sizes["layers"],
        sizes["intermediate"],
        sizes["vocabulary"],
        heads=sizes["heads"],
        positions=sizes["length"],
        seed=spec["seed"],
    ).to(getattr(torch, spec["dtype"]))
    if "base" in spec:
        first = {**spec, **spec["base"], "optim": "adamw_torch"}
        # what comes after it sees the text in another order
        order = batch_order(len(training), first["steps"] * first["batch"], BASE_ORDER + first["seed"])
        with tempfile.TemporaryDirectory() as folder:
            data = Subset(Blocks(training), order.tolist())
            arguments = training_arguments(first, folder, {"eval_strategy": "no"})
            Trainer(model=model, args=arguments, train_dataset=data).train()
    return model


def make_trainer(
    spec: dict,
    prepared: Prepared,
    folder: str,
    training: torch.Tensor,
    validation: torch.Tensor,
    watching: list[TrainerCallback],
) -> Trainer:
    """The Trainer of a run; `watching` are callbacks besides those of the method."""
    per_layer = spec.get("per_layer", False)
    changes = prepared.arguments | ({"max_grad_norm": 0.0} if per_layer else {})
    arguments = training_arguments(spec, folder, changes)
    kind, options = (
        per_layer_optimizer(arguments)
        if per_layer
        else Trainer.get_optimizer_cls_and_kwargs(arguments, prepared.model)
    )
    factor, optimizer = rest_rate(spec), None
    if factor:
        decay = {"weight_decay": arguments.weight_decay}
        optimizer = with_rest_at(factor, prepared.model, kind, {**decay, **options})
    order = batch_order(len(training), spec["steps"] * spec["batch"], spec["seed"])
    trainer = Trainer(
        model=prepared.model,
        args=arguments,
        train_dataset=Subset(Blocks(training), order.tolist()),
        eval_dataset=Blocks(validation[:CURVE_BLOCKS]),
        callbacks=[*prepared.callbacks, *watching],
        optimizers=(optimizer, None),
        optimizer_cls_and_kwargs=(kind, options) if per_layer and optimizer is None else None,
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    if prepared.schedule is not None:
        trainer.lr_scheduler = prepared.schedule(trainer.create_optimizer(), arguments)
    return trainer


def run(spec: dict, training: torch.Tensor, validation: torch.Tensor) -> dict:
    """Train and evaluate.

    Args:
        spec (`dict`): See [`settings.make_spec`].
        training, validation (`torch.Tensor`): Token blocks, integers `[blocks, length]`.

    Returns:
        `dict`: The spec, the final validation loss (nats a token) and perplexity, whether the run diverged, the curve of
        validation losses, all updates, bytes, speed, what it ran on and with.
    """
    model = base_model(spec, training)
    names = targeted_modules(model)
    prepared = prepare(spec, model, validation[:SWITCH_BLOCKS])
    counter, directions = ByteCounter(prepared.model), Directions(prepared.model, names)
    with tempfile.TemporaryDirectory() as folder:
        watching = [counter, directions, StopAtDivergence()]
        trainer = make_trainer(spec, prepared, folder, training, validation, watching)
        batches = BatchHash(prepared.model)
        start = time.perf_counter()
        train(trainer)
        seconds = time.perf_counter() - start
        loss = math.nan
        if trainer.state.global_step == spec["steps"]:
            final = Blocks(validation[:FINAL_BLOCKS])
            loss = trainer.evaluate(final, metric_key_prefix="final")["final_loss"]
    history = trainer.state.log_history
    looking = sum(callback.seconds for callback in prepared.callbacks if isinstance(callback, SwitchLosses))
    return {
        "spec": spec,
        "loss": number(loss),
        "perplexity": number(math.exp(min(loss, 700.0))) if math.isfinite(loss) else None,
        # a model no better than guessing uniformly has diverged, whatever its loss says
        "diverged": not math.isfinite(loss) or loss > math.log(spec["model"]["vocabulary"]),
        "steps": trainer.state.global_step,
        "curve": [[entry["step"], number(entry["eval_loss"])] for entry in history if "eval_loss" in entry],
        "updates": update_records(prepared.callbacks, history),
        "overlaps": directions.overlaps,
        "ranks": {name: number(share) for name, share in directions.ranks.items()},
        "bytes": counter.bytes,
        "tokens_per_second": tokens_per_second(history, spec["batch"] * spec["model"]["length"], looking),
        "seconds": seconds,
        "trainable_parameters": sum(p.numel() for p in prepared.model.parameters() if p.requires_grad),
        "epochs": spec["steps"] * spec["batch"] / len(training),
        "batches": batches.sha.hexdigest()[:16],
        "versions": versions(),
        "machine": machine()
        | ({"device": torch.cuda.get_device_name()} if spec["device"] == "cuda" else {"device": "cpu"}),
    }


def measure_bytes(spec: dict) -> dict[str, int]:
    """Bytes of a run's tensors, from a single step of it on random tokens."""
    model = spec["model"]
    shape = (max(spec["batch"], 16), model["length"])
    tokens = torch.randint(model["vocabulary"], shape, generator=torch.Generator().manual_seed(0))
    return run({**spec, "steps": 1}, tokens, tokens[:16])["bytes"]
