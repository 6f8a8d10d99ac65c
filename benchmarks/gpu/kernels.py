"""Seconds of what an update is made of, and what TF32 changes of its results."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import torch

from loqt_peft.algorithm.compensation import compensate
from loqt_peft.algorithm.projection import captured_energy, project, projection_shape, sketch_width, squared_norm
from loqt_peft.algorithm.quantization import FourBitFormat

from . import formulas
from .claims import at_most, within
from .results import Recorder
from .settings import Settings, seconds_of


STEPS, SCALE = 5, 0.5
# passes over memory come on top of the products that are counted
PASSES = 1.0
# what TF32 may change of an error or of the energy that is missed
TF32_TOLERANCE = 0.01


@contextmanager
def tf32(allowed: bool):
    """Whether float32 products may be computed in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def products_per_second(settings: Settings, size: int) -> float:
    """Floating-point operations a second of a float32 product of square matrices."""
    X = torch.randn(size, size, device=settings.device)
    return 2 * size**3 / seconds_of(lambda: X @ X, settings)


def made_up_gradient(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """float32 `[out, in]` with a spectrum that falls like 1/√i, in directions that are not the axes."""
    generator = torch.Generator(device).manual_seed(0)
    smaller = min(shape)
    spectrum = torch.arange(1, smaller + 1, device=device) ** -0.5
    left = torch.randn(shape[0], smaller, device=device, generator=generator)
    right = torch.randn(smaller, shape[1], device=device, generator=generator)
    return left * spectrum @ right / smaller**0.5


class Case:
    """One weight with its gradient.

    Args:
        shape (`tuple[int, int]`): `[out, in]`.
        r (`int`): Rank.
        settings ([`Settings`]): Device.
    """

    def __init__(self, shape: tuple[int, int], r: int, settings: Settings) -> None:
        self.shape, self.r, self.settings = shape, r, settings
        self.gradient = made_up_gradient(shape, settings.device)
        self.weight = torch.randn(
            shape, device=settings.device, generator=torch.Generator(settings.device).manual_seed(1)
        )
        self.weight_format = FourBitFormat(shape, "nf4", True)
        self.projection_format = FourBitFormat(projection_shape(shape, r), "nf4", True)
        packed = self.projection_format.pack(project(self.gradient, r, "randomized"))
        self.P = self.projection_format.unpack(packed)

    def compensate(self):
        return compensate(self.weight, self.P, self.weight_format, SCALE, STEPS, torch.bfloat16)

    def calls(self) -> dict:
        """Name -> what is timed."""
        smaller, device = min(self.shape), self.settings.device
        width = sketch_width(self.r, smaller)
        thin = torch.randn(smaller, width, device=device)
        gram = thin.T @ thin
        # what layers of one shape could share
        grams = gram.expand(4, -1, -1).contiguous()
        packed = self.weight_format.pack(self.weight)
        return {
            f"qr of {smaller} x {width}": lambda: torch.linalg.qr(thin),
            f"eigh of {width} x {width}": lambda: torch.linalg.eigh(gram),
            f"eigh of 4 of {width} x {width} at once": lambda: torch.linalg.eigh(grams),
            "pack": lambda: self.weight_format.pack(self.weight),
            "unpack": lambda: self.weight_format.unpack(packed),
            "compensate": self.compensate,
            "project, randomized": lambda: project(self.gradient, self.r, "randomized"),
            "project, eigh": lambda: project(self.gradient, self.r, "eigh"),
        }

    def quality(self) -> dict[str, float]:
        """Share of the gradient that P misses, and of the weight that compensation leaves; computed without TF32."""
        P, new = project(self.gradient, self.r, "randomized"), self.compensate()
        with tf32(False):
            missed = 1 - captured_energy(self.gradient, P) / squared_norm(self.gradient)
            left = self.weight - self.weight_format.unpack(new.weight)
            low_rank = new.B.float() @ self.P if self.P.shape[0] == self.r else self.P @ new.B.float()
            error = squared_norm(left - SCALE * low_rank) / squared_norm(self.weight)
        return {"energy missed": missed.item(), "error left": error.sqrt().item()}


def _one_shape(recorder: Recorder, shape: tuple[int, int], r: int) -> None:
    settings, name = recorder.settings, f"{shape[0]} x {shape[1]}"
    case, quality, seconds = Case(shape, r, settings), {}, {}
    for allowed in (False, True):
        label = f"{name}, r {r}, TF32 {'on' if allowed else 'off'}"
        with tf32(allowed):
            rate = products_per_second(settings, min(shape))
            seconds[allowed] = {what: seconds_of(call, settings) for what, call in case.calls().items()}
            quality[allowed] = case.quality()
        recorder.figure(f"{label}, seconds", seconds[allowed])
        recorder.figure(f"{label}, results", {**quality[allowed], "float32 products a second": rate})
        if not allowed:
            operations = formulas.compensation(shape, r, STEPS)
            claim = f"seconds of compensate, {name}"
            source = (
                f"{operations:.3g} floating-point operations (formulas.compensation) at the measured rate of products"
            )
            predicted, measured = operations / rate, seconds[allowed]["compensate"]
            recorder.claim(at_most(claim, predicted, measured, PASSES, unit="s", source=source))
    claim, source = f"randomized takes no longer than eigh, {name}", "eigh, measured beside it"
    predicted, measured = seconds[False]["project, eigh"], seconds[False]["project, randomized"]
    recorder.claim(at_most(claim, predicted, measured, unit="s", source=source))
    for what in quality[False]:
        claim, source = f"{what} with TF32, {name}", "the same without TF32, measured beside it"
        recorder.claim(within(claim, quality[False][what], quality[True][what], TF32_TOLERANCE, source=source))


def kernels(recorder: Recorder) -> None:
    settings = recorder.settings
    shapes = settings.pick(((4096, 4096), (11008, 4096)), ((128, 128), (256, 128)))
    r = settings.pick(1024, 32)
    for shape in shapes:
        _one_shape(recorder, shape, r)
    # last and once, since on CUDA it may take minutes
    for shape in shapes:
        name, gradient = f"{shape[0]} x {shape[1]}", made_up_gradient(shape, settings.device)
        seconds = [
            seconds_of(partial(call, gradient), settings, repeats=1, warm_up=0)
            for call in (partial(project, r=r, method="svd"), partial(torch.linalg.svd, full_matrices=False))
        ]
        recorder.figure(f"{name}, seconds", dict(zip(("project, svd", "torch.linalg.svd"), seconds, strict=True)))
        claim, source = f'"svd" takes no longer than torch.linalg.svd, {name}', "torch.linalg.svd, measured beside it"
        recorder.claim(at_most(claim, seconds[1], seconds[0], unit="s", source=source))
