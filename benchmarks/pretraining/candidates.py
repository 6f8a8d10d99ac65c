"""Changes of an update that are tried out here, and that the package does not have.

A candidate is applied to one run and undone after it. What wins moves into the package as a field of `LoQTConfig`; what does
not stays here, so that its figures can be measured again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from accelerate.state import GradientState
from bitsandbytes.functional import get_4bit_type
from torch import nn
from transformers import TrainingArguments

import loqt_peft.layer
from loqt_peft import LoQTTrainerCallback
from loqt_peft.compensation import Compensated, compensate
from loqt_peft.layer import LoQTLayer
from loqt_peft.projection import expand, is_right, project, random_projection, restrict
from loqt_peft.quantization import BLOCKSIZE, DenseFormat, FourBitFormat
from loqt_peft.update import active_layers, begin_step, cancel_step


class Candidate:
    """Changes nothing; what the others override."""

    def project(self, layer: LoQTLayer, gradient: torch.Tensor, r: int, method: str) -> torch.Tensor:
        """As [`loqt_peft.projection.project`], of a layer."""
        return project(gradient, r, method)

    def draw(self, layer: LoQTLayer, shape: tuple[int, int], r: int, seed: int, device) -> torch.Tensor:
        """As [`loqt_peft.projection.random_projection`], of a layer."""
        return random_projection(shape, r, seed, device)

    def compensate(self, layer: LoQTLayer, W, P, storage, scale, steps, dtype) -> Compensated:
        """As [`loqt_peft.compensation.compensate`], of a layer."""
        return compensate(W, P, storage, scale, steps, dtype)

    def callback(self) -> LoQTTrainerCallback:
        return LoQTTrainerCallback()

    def optimizer(
        self, model: nn.Module, arguments: TrainingArguments, kind: type[torch.optim.Optimizer], options: dict
    ) -> torch.optim.Optimizer | None:
        """In place of the Trainer's own, which would be of class `kind` with `options`."""
        return None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While the context lasts, every LoQT layer updates as this candidate says."""
        names = ("project_gradient", "draw_projection", "compute_switch")
        original = {name: getattr(LoQTLayer, name) for name in names}
        updated = None

        def remembering(name):
            def method(layer, *args):
                nonlocal updated
                updated = layer
                return original[name](layer, *args)

            return method

        with (
            mock.patch.multiple(LoQTLayer, **{name: remembering(name) for name in original}),
            mock.patch.object(loqt_peft.layer, "project", lambda *args: self.project(updated, *args)),
            mock.patch.object(loqt_peft.layer, "random_projection", lambda *args: self.draw(updated, *args)),
            mock.patch.object(loqt_peft.layer, "compensate", lambda *args: self.compensate(updated, *args)),
        ):
            yield


def stochastically_rounded(W: torch.Tensor, quant_type: str, generator: torch.Generator) -> torch.Tensor:
    """W `[out, in]`, float32, with each element at one of its two neighbouring 4-bit levels, W on average."""
    levels = get_4bit_type(quant_type, device=W.device).float().sort().values
    blocks = nn.functional.pad(W.flatten(), (0, -W.numel() % BLOCKSIZE)).view(-1, BLOCKSIZE)
    absmax = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    shares = (blocks / absmax).clamp(levels[0], levels[-1])
    above = torch.searchsorted(levels, shares).clamp(min=1)
    low, high = levels[above - 1], levels[above]
    drawn = torch.rand(shares.shape, generator=generator, device=generator.device).to(W.device)
    rounded = torch.where(drawn * (high - low) < shares - low, high, low) * absmax
    return rounded.flatten()[: W.numel()].view(W.shape)


class _StochasticFormat:
    """A 4-bit format that rounds stochastically."""

    is_lossless = False

    def __init__(self, storage: FourBitFormat, generator: torch.Generator):
        self.storage, self.generator = storage, generator
        self.unpack = storage.unpack

    def pack(self, W: torch.Tensor) -> torch.Tensor:
        # at the levels already, so that nothing is rounded again
        return self.storage.pack(stochastically_rounded(W, self.storage.quant_type, self.generator))


class StochasticRounding(Candidate):
    """W is requantized with stochastic rounding, in every iteration of compensation."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def compensate(self, layer, W, P, storage, scale, steps, dtype):
        if not isinstance(storage, DenseFormat):
            storage = _StochasticFormat(storage, self.generator)
        return super().compensate(layer, W, P, storage, scale, steps, dtype)


class Mixed(Candidate):
    """A share of P's directions are leading singular vectors, the others random ones, orthogonal to them."""

    def __init__(self, share: float = 0.5):
        self.share = share

    def project(self, layer, gradient, r, method):
        leading = round(self.share * r)
        (adapter_name,) = layer.loqt_B
        random = random_projection(gradient.shape, r, layer.projection_seed(adapter_name), gradient.device)
        if not leading:
            return random
        P = super().project(layer, gradient, leading, method)
        right = is_right(gradient.shape)
        both = torch.cat([P.T, random.T[:, leading:]] if right else [P, random[:, leading:]], dim=1)
        # the first columns stay as they are, but for their signs
        Q = torch.linalg.qr(both).Q
        return Q.T.contiguous() if right else Q


class RandomBasis(Candidate):
    """The span of the leading singular vectors, in a random orthonormal basis: Adam treats each coordinate on its own."""

    def project(self, layer, gradient, r, method):
        (adapter_name,) = layer.loqt_B
        P = super().project(layer, gradient, r, method)
        turn = random_projection((r, r), r, layer.projection_seed(adapter_name), gradient.device)
        return turn @ P if is_right(gradient.shape) else P @ turn


class AlignedBasis(Candidate):
    """Random directions, in the basis of their span in which the rows of PᵀG are orthogonal, as singular vectors' are."""

    def project(self, layer, gradient, r, method):
        (adapter_name,) = layer.loqt_B
        P = random_projection(gradient.shape, r, layer.projection_seed(adapter_name), gradient.device)
        if is_right(gradient.shape):
            return torch.linalg.svd(gradient @ P.T, full_matrices=False).Vh @ P
        return P @ torch.linalg.svd(P.T @ gradient, full_matrices=False).U


class Sweep(Candidate):
    """Random directions, all of which have had their turn before one comes back: blocks of one orthogonal matrix."""

    def __init__(self):
        self.directions: WeakKeyDictionary[LoQTLayer, torch.Tensor] = WeakKeyDictionary()

    def draw(self, layer, shape, r, seed, device):
        side = min(shape)
        if layer not in self.directions:
            self.directions[layer] = random_projection((side, side), side, seed, device)
        right = is_right(shape)
        # the next ones come to the front
        Q = self.directions[layer]
        self.directions[layer] = Q.roll(-r, 0 if right else 1)
        return (Q[:r] if right else Q[:, :r]).contiguous()


class RunningAverage(Candidate):
    """P from a running average of the updates' gradients, M <- decay M + G, which lies on the host."""

    def __init__(self, decay: float = 0.9):
        self.decay = decay
        self.averages: WeakKeyDictionary[LoQTLayer, torch.Tensor] = WeakKeyDictionary()

    def project(self, layer, gradient, r, method):
        if layer in self.averages:
            gradient = gradient + self.averages[layer].to(gradient.device).mul_(self.decay)
        self.averages[layer] = gradient.to("cpu", copy=True)
        return super().project(layer, gradient, r, method)


class WarmStart(Candidate):
    """P by a power iteration from the old P: the gradient's singular vectors within the span of GᵀG Pᵀ (or GGᵀ P)."""

    def project(self, layer, gradient, r, method):
        (adapter_name,) = layer.loqt_B
        if not layer.num_updates(adapter_name):
            return super().project(layer, gradient, r, method)
        right, P = is_right(gradient.shape), layer.projection(adapter_name)
        image = restrict(gradient, P, right)
        image = gradient.T @ image if right else gradient @ image.T
        basis = torch.linalg.qr(image).Q
        basis = basis.T if right else basis
        return super().project(layer, expand(basis, restrict(gradient, basis, right), right), r, method)


class WhenItPays(Candidate):
    """An update that is due takes place only if what it would merge, ‖s·P(B − B₀)‖, is at least `ratio` of what the last
    quantization left, ‖W − deq(Q) − s·PB₀‖, over all layers."""

    def __init__(self, ratio: float = 1.0):
        self.ratio = ratio
        self.start: WeakKeyDictionary[LoQTLayer, tuple[torch.Tensor, torch.Tensor]] = WeakKeyDictionary()

    def compensate(self, layer, W, P, storage, scale, steps, dtype):
        new = super().compensate(layer, W, P, storage, scale, steps, dtype)
        self.start[layer] = new.B.clone(), new.error_after
        return new

    def pays(self, model: nn.Module) -> bool:
        adapter_name, layers = active_layers(model)
        if any(layer not in self.start for _, layer in layers):
            return True
        learned = error = 0.0
        for _, layer in layers:
            B, left_over = self.start[layer]
            change = (layer.loqt_B[adapter_name].detach() - B).float()
            product = expand(layer.projection(adapter_name), change, layer.right) * layer.scaling[adapter_name]
            learned += float(product.square().sum())
            error += float(left_over)
        return learned >= self.ratio**2 * error

    def callback(self):
        candidate = self

        class Callback(LoQTTrainerCallback):
            def on_step_begin(self, args, state, control, model=None, **kwargs):
                due = begin_step(model, state.global_step, lambda: GradientState().sync_gradients)
                if due and not candidate.pays(model):
                    cancel_step(model)

        return Callback()


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for some parameters and AdamW for the others, as one optimizer."""

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float, betas, eps: float):
        self.both = (
            # its updates have the size of AdamW's, so that one learning rate does
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=0.0),
        )
        super().__init__([{"params": matrices}, {"params": others}], {"lr": lr})

    def step(self, closure=None):
        for optimizer, group in zip(self.both, self.param_groups, strict=True):
            # where the schedule writes it
            optimizer.param_groups[0]["lr"] = group["lr"]
            optimizer.step()
            self.state.update(optimizer.state)


class MuonForB(Candidate):
    """B is trained by Muon: one state instead of two."""

    def optimizer(self, model, arguments, kind, options):
        B = {id(p) for name, p in model.named_parameters() if "loqt_B" in name}
        trainable = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trainable if id(p) in B]
        others = [p for p in trainable if id(p) not in B]
        betas = (arguments.adam_beta1, arguments.adam_beta2)
        return MuonWithAdamW(matrices, others, arguments.learning_rate, betas, arguments.adam_epsilon)


class RateOfTheRest(Candidate):
    """What is no linear layer of the blocks (embeddings, norms, head) trains at `factor` times the learning rate."""

    def __init__(self, factor: float):
        self.factor = factor

    def optimizer(self, model, arguments, kind, options):
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        at_the_ends = {id(p) for module in ends for p in module.parameters()}
        blocks, rest = [], []
        for parameter in model.parameters():
            if parameter.requires_grad:
                (rest if parameter.ndim < 2 or id(parameter) in at_the_ends else blocks).append(parameter)
        groups = {"params": blocks}, {"params": rest, "lr": self.factor * options["lr"]}
        return kind(groups, weight_decay=arguments.weight_decay, **options)


CANDIDATES: dict[str, type[Candidate]] = {
    "stochastic_rounding": StochasticRounding,
    "mixed": Mixed,
    "random_basis": RandomBasis,
    "aligned_basis": AlignedBasis,
    "sweep": Sweep,
    "running_average": RunningAverage,
    "warm_start": WarmStart,
    "when_it_pays": WhenItPays,
    "muon": MuonForB,
    "rate_of_the_rest": RateOfTheRest,
}


def make_candidate(description: dict | None) -> Candidate:
    """From a spec: `{"name": ..., **its arguments}`, or `None`."""
    if description is None:
        return Candidate()
    arguments = dict(description)
    return CANDIDATES[arguments.pop("name")](**arguments)
