"""One run: from its spec to its line of results, through the stock Trainer."""

import hashlib
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Subset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

import loqt_peft.callback
from benchmarks.common import Blocks, llama, machine, pretraining_arguments, versions
from benchmarks.pretraining.methods import ProjectionWatch, prepare, targeted_modules
from benchmarks.pretraining.relora import ReLoRACallback
from loqt_peft import per_layer_optimizer
from loqt_peft.layer import LoQTLayer
from loqt_peft.projection import orthonormalize, restrict, squared_norm
from loqt_peft.update import LoQTUpdate, end_step, loqt_layers


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


###############################
# What is measured
###############################


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of an optimizer's state, those inside the projectors of GaLore and APOLLO included."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))


def count_bytes(tensors) -> int:
    """Bytes of these tensors; what appears twice (a shared code book) counts once.

    A view counts with its own elements: in float32 galore-torch keeps the whole of a singular value decomposition alive
    behind its projections, which is no part of its method.
    """
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors if t.numel()}.values())


class ByteCounter(TrainerCallback):
    """Counts what lies in memory at the end of training: weights, gradients, optimizer state; and on the host.

    Attributes:
        bytes (`dict[str, int]`):
            "weights" (packed weights, absmax, projections, buffers), "gradients" (the most that lay there at once),
            "optimizer", and "host": what LoQT keeps aside after its first update, base weights and `error_feedback`'s errors.
    """

    def __init__(self, model: nn.Module):
        self.bytes = {"gradients": 0}
        trained = [p for p in model.parameters() if p.requires_grad]

        def count(parameter: nn.Parameter) -> None:
            held = count_bytes(p.grad for p in trained if p.grad is not None)
            self.bytes["gradients"] = max(self.bytes["gradients"], held)

        # with per-layer updates the optimizer's hook, which comes after this one, frees the gradient again
        self._handles = [parameter.register_post_accumulate_grad_hook(count) for parameter in trained]

    def on_step_end(self, args, state, control, **kwargs):
        # every step holds as much as the first, and the others are timed
        while self._handles:
            self._handles.pop().remove()

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        aside = [
            layer.get_base_layer().weight
            for _, layer in loqt_layers(model)
            if all(layer.num_updates(name) for name in layer.active_adapters)
        ]
        aside += [error for _, layer in loqt_layers(model) for error in layer.loqt_error.values()]
        ids = {id(tensor) for tensor in aside}
        held = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in ids]
        self.bytes["weights"] = count_bytes(held)
        self.bytes["optimizer"] = count_bytes(tensors_in(dict(enumerate(optimizer.state.values()))))
        self.bytes["host"] = count_bytes(aside)


class Directions(TrainerCallback):
    """In which directions a method changes the weights of the linear layers `names`.

    Attributes:
        overlaps (`list[float]`):
            Of each update of LoQT but the first: ‖Q_new Q_oldᵀ‖² / r, with orthonormal bases Q of the old and the new P, on
            average over the layers. 1: the same subspace; r/n: as much as of two random ones in n dimensions.
        ranks (`dict[str, float]`):
            The effective rank (Σσ²)² / Σσ⁴ of what training added to a targeted weight, and of the weight before, as shares of
            the smaller side, on average over the layers.
    """

    def __init__(self, model: nn.Module, names: list[str]):
        self.overlaps: list[float] = []
        self.ranks: dict[str, float] = {}
        self._names = names
        self._start = {name: w.clone() for name, w in effective_weights(model, names).items()}
        self._layers = list(loqt_layers(model))
        self._bases: dict[str, torch.Tensor] = {}
        self._updates = 0

    def on_optimizer_step(self, args, state, control, **kwargs):
        updates = self._layers[0][1].num_updates("default") if self._layers else 0
        if updates == self._updates:
            return
        self._updates = updates
        old, self._bases = (
            self._bases,
            {name: orthonormalize(layer.projection("default"), layer.right)[0] for name, layer in self._layers},
        )
        if old:
            inner = [restrict(self._bases[name], old[name], layer.right) for name, layer in self._layers]
            self.overlaps.append(statistics.mean(float(squared_norm(matrix)) / len(matrix) for matrix in inner))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        end = effective_weights(model, self._names)
        changes = {name: weight - self._start[name] for name, weight in end.items()}
        for what, weights in (("before", self._start), ("change", changes)):
            self.ranks[what] = statistics.mean(map(effective_rank, weights.values()))


@torch.no_grad()
def effective_weights(model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """The weights of the linear layers `names`, as they are multiplied with: adapters merged, float32 `[out, in]`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = {}
    for name in names:
        module = base.get_submodule(name)
        if isinstance(module, LoQTLayer):
            found[name] = module.effective_weight("default")
        elif isinstance(module, LoraLayer):
            found[name] = module.get_base_layer().weight.float() + module.get_delta_weight("default").float()
        else:
            found[name] = module.weight.float()
    return found


def effective_rank(matrix: torch.Tensor) -> float:
    """(Σσ²)² / Σσ⁴, as a share of the smaller side; 0 of a matrix of zeros."""
    squares = torch.linalg.svdvals(matrix).square()
    total = float(squares.sum())
    return total**2 / float(squares.square().sum()) / len(squares) if total else 0.0


class SwitchLosses:
    """What switches do to the validation loss: of the same blocks right before and right after each.

    Attributes:
        before, after (`list[float]`): Nats a token, an element for each update.
        seconds (`float`): What it took to look, all in all.
    """

    def __init__(self, blocks: torch.Tensor):
        self.before: list[float] = []
        self.after: list[float] = []
        self.seconds = 0.0
        self._blocks = blocks.long()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """While the context lasts, the losses at every switch of the Trainer's callback are noted."""
        # the callback puts itself before all others, so that none of them comes between the optimizer's step and the switch
        with mock.patch.object(loqt_peft.callback, "end_step", self._end_step):
            yield

    def _end_step(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> LoQTUpdate | None:
        is_due = any(layer.update_due for _, layer in loqt_layers(model))
        before = self._loss(model) if is_due else math.nan
        update = end_step(model, optimizer)
        # it may have been postponed or called off
        if update is not None:
            self.before.append(before)
            self.after.append(self._loss(model))
        return update

    @torch.no_grad()
    def _loss(self, model: nn.Module) -> float:
        start = time.perf_counter()
        training, tokens = model.training, self._blocks.to(next(model.parameters()).device)
        loss = float(model.eval()(input_ids=tokens, labels=tokens).loss)
        model.train(training)
        self.seconds += time.perf_counter() - start
        return loss


class BatchHash:
    """Forward pre-hook that hashes the tokens which the model is trained on, in their order."""

    def __init__(self, model: nn.Module):
        self.sha = hashlib.sha256()
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if model.training:
            self.sha.update(kwargs["input_ids"].cpu().numpy().tobytes())


class StopAtDivergence(TrainerCallback):
    """Ends a training whose loss is no number any more: what is left of it would be time lost."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not all(math.isfinite(logs[name]) for name in ("loss", "eval_loss") if name in logs):
            control.should_training_stop = True


###############################
# The run
###############################


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


def update_records(callbacks, history: list[dict], losses: SwitchLosses) -> list[dict]:
    """A dictionary for each update, restart or new projection, with the number of steps after which it took place."""
    for callback in callbacks:
        if isinstance(callback, ReLoRACallback):
            return [{"step": step} for step in callback.restarts]
        if isinstance(callback, ProjectionWatch):
            return [{"step": step} for step in callback.steps]
    entries = [entry for entry in history if "loqt/updates" in entry]
    return [
        {
            "step": entry["step"],
            **{name: number(entry.get(f"loqt/{name}")) for name in UPDATE_FIGURES},
            "loss_before": number(before),
            "loss_after": number(after),
        }
        for entry, before, after in zip(entries, losses.before, losses.after, strict=True)
    ]


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
    prepared = prepare(spec, model)
    counter, directions = ByteCounter(prepared.model), Directions(prepared.model, names)
    losses = SwitchLosses(validation[:SWITCH_BLOCKS])
    order = batch_order(len(training), spec["steps"] * spec["batch"], spec["seed"])
    with tempfile.TemporaryDirectory() as folder:
        per_layer = spec.get("per_layer", False)
        changes = prepared.arguments | ({"max_grad_norm": 0.0} if per_layer else {})
        arguments = training_arguments(spec, folder, changes)
        made = (
            per_layer_optimizer(arguments)
            if per_layer
            else Trainer.get_optimizer_cls_and_kwargs(arguments, prepared.model)
        )
        optimizer = prepared.candidate.optimizer(prepared.model, arguments, *made)
        trainer = Trainer(
            model=prepared.model,
            args=arguments,
            train_dataset=Subset(Blocks(training), order.tolist()),
            eval_dataset=Blocks(validation[:CURVE_BLOCKS]),
            callbacks=[*prepared.callbacks, counter, directions, StopAtDivergence()],
            optimizers=(optimizer, None),
            optimizer_cls_and_kwargs=made if per_layer and optimizer is None else None,
        )
        for printing in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printing)
        if prepared.schedule is not None:
            trainer.lr_scheduler = prepared.schedule(trainer.create_optimizer(), arguments)
        batches = BatchHash(prepared.model)
        start = time.perf_counter()
        with prepared.candidate.applied(), losses.noted():
            train(trainer)
        seconds = time.perf_counter() - start
        finished = trainer.state.global_step == spec["steps"]
        loss = math.nan
        if finished:
            final = Blocks(validation[:FINAL_BLOCKS])
            loss = trainer.evaluate(final, metric_key_prefix="final")["final_loss"]
    history = trainer.state.log_history
    return {
        "spec": spec,
        "loss": number(loss),
        "perplexity": number(math.exp(min(loss, 700.0))) if math.isfinite(loss) else None,
        # a model no better than guessing uniformly has diverged, whatever its loss says
        "diverged": not math.isfinite(loss) or loss > math.log(spec["model"]["vocabulary"]),
        "steps": trainer.state.global_step,
        "curve": [[entry["step"], number(entry["eval_loss"])] for entry in history if "eval_loss" in entry],
        "updates": update_records(prepared.callbacks, history, losses),
        "overlaps": directions.overlaps,
        "ranks": {name: number(share) for name, share in directions.ranks.items()},
        "bytes": counter.bytes,
        "tokens_per_second": tokens_per_second(history, spec["batch"] * spec["model"]["length"], losses.seconds),
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


###############################
# In a worker process
###############################


def start_worker() -> None:
    """Of a worker that the harness started: it ends when the harness does, however that ended."""

    def watch():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def run_in_worker(spec: dict, blocks: Path, log: Path) -> dict:
    """[`run`] on the token blocks in a file; what it prints goes to `log`, also if the process dies of it."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    parts = load_file(blocks)
    try:
        return run(spec, parts["training"], parts["validation"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
