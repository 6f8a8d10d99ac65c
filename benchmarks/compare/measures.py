"""What is measured while a method trains: bytes, directions of change, losses around a switch, the batches."""

import hashlib
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import TrainerCallback

from loqt_peft import LoQTTrainerCallback
from loqt_peft.algorithm.projection import orthonormalize, restrict, squared_norm
from loqt_peft.layers.find import loqt_layers
from loqt_peft.layers.layer import LoQTLayer


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


class SwitchLosses(LoQTTrainerCallback):
    """LoQT's callback, which also looks at what switches do: the loss of the same blocks right before and right after each.

    It puts itself before all others, so that none of them comes between the optimizer's step and the switch.

    Args:
        blocks (`torch.Tensor`): Tokens `[blocks, length]`.

    Attributes:
        before, after (`list[float]`): Nats a token, an element for each update.
        seconds (`float`): What it took to look, all in all.
    """

    def __init__(self, blocks: torch.Tensor):
        super().__init__()
        self.before: list[float] = []
        self.after: list[float] = []
        self.seconds = 0.0
        self._blocks = blocks.long()

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        layers = [layer for _, layer in loqt_layers(model)]
        if not any(layer.capture.adapter_name is not None for layer in layers):
            super().on_optimizer_step(args, state, control, model=model, optimizer=optimizer, **kwargs)
            return
        before, updates = self._loss(model), count_updates(layers)
        super().on_optimizer_step(args, state, control, model=model, optimizer=optimizer, **kwargs)
        # it may have been postponed or called off
        if count_updates(layers) > updates:
            self.before.append(before)
            self.after.append(self._loss(model))

    @torch.no_grad()
    def _loss(self, model: nn.Module) -> float:
        start = time.perf_counter()
        training, tokens = model.training, self._blocks.to(next(model.parameters()).device)
        loss = float(model.eval()(input_ids=tokens, labels=tokens).loss)
        model.train(training)
        self.seconds += time.perf_counter() - start
        return loss


def count_updates(layers: list[LoQTLayer]) -> int:
    return sum(layer.num_updates("default") for layer in layers)


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
