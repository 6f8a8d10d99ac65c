"""`estimate_memory`: what training needs, what decides it, and what would help."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from .closed_form import ClosedForm
from .options import MemoryOptions
from .shape import CLOSED_FORM_TYPES, ModelShape, load_config


# Assumptions, not measured: what the CUDA context takes, and the share of the peak that the allocator cannot use.
CONTEXT_BYTES = 512 * 1024**2
FRAGMENTATION = 0.05
UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("iB", 1024), ("B", 1000))
}
# of a device's memory, written without a unit; what lies between them is mostly MiB, as nvidia-smi prints them
LARGEST_NUMBER_OF_GIB = 4096
SMALLEST_NUMBER_OF_BYTES = 2**27


def parse_bytes(size: str | int | float) -> int:
    """Bytes of `"24GiB"`, `"16 GB"`, or a number alone: below 4096 it counts GiB, from 2²⁷ on bytes.

    Raises:
        ValueError: If it is not a positive size, or a number alone that could be meant in several units.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    units = {name.upper(): factor for name, factor in UNITS.items()}
    if not match or match[2].upper() not in units or not float(match[1]):
        raise ValueError(
            f"budget={size!r} is not allowed: a positive size such as '24GiB', '16GB' or 24 (GiB), or a number of bytes."
        )
    number, unit = float(match[1]), match[2].upper()
    if not unit:
        if number < LARGEST_NUMBER_OF_GIB:
            unit = "GIB"
        elif number < SMALLEST_NUMBER_OF_BYTES:
            raise ValueError(
                f"budget={size!r} is not allowed without a unit: too much for GiB, too little for bytes. Say what it counts, "
                f"as '{match[1]}MiB'."
            )
    return int(number * units[unit])


@dataclass(frozen=True)
class Lever:
    """A change of one option.

    Attributes:
        change (`dict`): The option and its new value.
        saved (`int`): Bytes by which it lowers the peak on the device.
    """

    change: dict[str, Any]
    saved: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted memory of training; nothing here was measured on a device.

    Attributes:
        model (`str`): What the user called the model.
        options ([`MemoryOptions`]): What is trained, and how.
        source (`str`): `"closed form"` or `"simulation"`.
        phases (`dict[str, dict[str, int]]`):
            Bytes on the device by category, at the peak of each phase: "load" (before the first step), "forward" (its end,
            with the loss and its derivative), "backward", "optimizer", and with LoQT or GaLore "update step": all of a step
            with an update. "first update" is LoQT's first one where the base was loaded dense, which is quantized by it.
        host (`dict[str, int]`): Bytes in the memory of the host, by category.
        levers (`tuple[Lever]`): What would lower the peak, by the closed form; the largest saving first.
        notes (`tuple[str]`): What the user should know.
        budget (`int`, *optional*): Bytes of the device.
    """

    model: str
    options: MemoryOptions
    source: str
    phases: dict[str, dict[str, int]]
    host: dict[str, int]
    levers: tuple[Lever, ...] = ()
    notes: tuple[str, ...] = ()
    budget: int | None = None

    @property
    def peak_phase(self) -> str:
        """The phase that decides the peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Bytes of tensors on the device, at most."""
        return sum(self.phases[self.peak_phase].values())

    @property
    def update_ratio(self) -> float | None:
        """Peak of a step with an update by that of an ordinary step; `None` without updates."""
        if "update step" not in self.phases:
            return None
        ordinary = max(sum(self.phases[name].values()) for name in ("forward", "backward", "optimizer"))
        return sum(self.phases["update step"].values()) / ordinary

    @property
    def required(self) -> int:
        """Bytes that a device should have: the peak, 5% of it for the allocator, 512 MiB for the CUDA context.

        Both margins are assumptions.
        """
        return required_bytes(self.peak)

    @property
    def fits(self) -> bool | None:
        """Whether the budget is enough; `None` without one."""
        return None if self.budget is None else self.required <= self.budget

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "predicted": True,
            "model": self.model,
            "source": self.source,
            "options": asdict(self.options),
            "peak_bytes": self.peak,
            "peak_phase": self.peak_phase,
            "required_bytes": self.required,
            "assumed_margin": {"context_bytes": CONTEXT_BYTES, "fragmentation": FRAGMENTATION},
            "budget_bytes": self.budget,
            "fits": self.fits,
            "update_step_ratio": self.update_ratio,
            "phases": {name: dict(held) for name, held in self.phases.items()},
            "host": dict(self.host),
            "levers": [asdict(lever) for lever in self.levers],
            "notes": list(self.notes),
        }


def required_bytes(peak: int) -> int:
    """A peak with the assumed margins."""
    return int(peak * (1 + FRAGMENTATION)) + CONTEXT_BYTES


def estimate_memory(
    model: Any,
    *,
    budget: str | float | None = None,
    simulate: bool = False,
    all_layers: bool = False,
    levers: bool = True,
    **options: Any,
) -> MemoryEstimate:
    """Predict the memory of training a causal language model.

    ```py
    print(loqt_peft.estimate_memory("meta-llama/Llama-2-7b-hf", rank=1024, optimizer="adamw_8bit").peak)
    ```

    Args:
        model:
            A name on the Hub, a folder, the path of a `config.json`, a transformers config, or a model that has one. No
            weights are loaded or made.
        budget (`str` or `float`, *optional*):
            Memory of the device, as `"24GiB"`. A number alone counts GiB below 4096, and bytes from 2²⁷ on.
        simulate (`bool`):
            Run the real layers, optimizer and update on torch's `meta` device (seconds) instead of the closed form
            (instant, and for some architectures only).
        all_layers (`bool`): Simulate every decoder layer, instead of a few from which the rest follows.
        levers (`bool`): Look for what would lower the peak, which takes ten times as long as the estimate.
        **options: Fields of [`~loqt_peft.memory.options.MemoryOptions`].

    Returns:
        [`MemoryEstimate`]

    Raises:
        ValueError:
            If an option is not allowed, the config is incomplete, or the architecture or method is one that this way of
            estimating does not cover.
        OSError: If the Hub or the file system has no such model.
    """
    chosen = memory_options(options)
    budget = None if budget is None else parse_bytes(budget)
    config, name = load_config(model)
    known = config.model_type in CLOSED_FORM_TYPES
    shape = ModelShape.from_config(config, name) if known or not simulate else None
    phases, host = _simulated(config, chosen, all_layers) if simulate else _in_closed_form(shape, chosen)
    return MemoryEstimate(
        model=name,
        options=chosen,
        source="simulation" if simulate else "closed form",
        phases=phases,
        host=dict(+host),
        levers=_levers(shape, chosen) if shape and levers else (),
        notes=tuple(_notes(shape, chosen)),
        budget=budget,
    )


def _simulated(
    config: PreTrainedConfig, options: MemoryOptions, all_layers: bool
) -> tuple[dict[str, dict[str, int]], Counter]:
    # slow to import
    from .simulation import simulate

    peaks = simulate(config, options, all_layers)
    host: Counter[str] = Counter()
    for peak in peaks.values():
        host |= peak.host
    return {phase: dict(peak.held) for phase, peak in peaks.items()}, host


def _in_closed_form(shape: ModelShape, options: MemoryOptions) -> tuple[dict[str, dict[str, int]], Counter]:
    form = ClosedForm(shape, options)
    return {phase: dict(+held) for phase, held in form.phases().items()}, form.host()


def memory_options(options: dict[str, Any]) -> MemoryOptions:
    """Options by name.

    Raises:
        ValueError: If there is no option of a name, or a value is not allowed.
    """
    unknown = sorted(set(options) - set(MemoryOptions.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"{unknown[0]}={options[unknown[0]]!r} is not allowed: the options are "
            f"{', '.join(MemoryOptions.__dataclass_fields__)}."
        )
    return MemoryOptions(**options)


def closed_form_peak(shape: ModelShape, options: MemoryOptions) -> int:
    """Bytes of tensors on the device, at most, in closed form."""
    return max(sum(held.values()) for held in ClosedForm(shape, options).phases().values())


def _levers(shape: ModelShape, options: MemoryOptions) -> tuple[Lever, ...]:
    changes: list[dict[str, Any]] = [
        {"per_layer": True},
        {"gradient_checkpointing": True},
        {"optimizer": "adamw_8bit"},
        {"double_quant": True},
        {"batch_size": max(options.batch_size // 2, 1)},
        {"update_mode": "backward"},
        {"update_mode": "stagger"},
        {"projection": "random"},
        {"retain_base": "cpu"},
    ]
    if options.method != "full":
        changes.append({"rank": max(min(options.rank, shape.hidden) // 2, 1)})
    peak = closed_form_peak(shape, options)
    levers = [Lever(change, peak - closed_form_peak(shape, replace(options, **change))) for change in changes]
    return tuple(sorted((lever for lever in levers if lever.saved > 0), key=lambda lever: -lever.saved))


def _notes(shape: ModelShape | None, options: MemoryOptions) -> Iterator[str]:
    if shape and (options.trains_loqt or options.method == "galore"):
        clamped = {x.name: min(x.shape) for x in shape.linears if min(x.shape) < options.rank}
        if clamped:
            listed = ", ".join(f"{name} to {side}" for name, side in clamped.items())
            yield f"rank={options.rank} is above the width of some layers and is clamped: {listed}."
    if options.paged:
        yield "The paged optimizer state is counted on the host; the driver keeps what fits on the device."
    if options.per_layer and options.gradient_accumulation_steps > 1:
        yield "With gradient accumulation per-layer updates save no gradients: they are summed until the last micro-batch."
    if options.method in ("lora", "qlora") and options.dtype != "float32":
        yield "Counted without `prepare_model_for_kbit_training`, which casts embeddings, norms and head to float32."
    if options.starts_dense:
        yield "The base is loaded dense and becomes 4-bit in the first update; loaded in 4 bits it starts as small as it ends."
