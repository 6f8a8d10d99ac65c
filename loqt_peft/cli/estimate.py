"""`python -m loqt_peft estimate`: predicted memory, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from ..choices import (
    BASES,
    DTYPES,
    ESTIMATED_METHODS,
    ESTIMATED_OPTIMIZERS,
    ESTIMATED_PROJECTIONS,
    RETAIN_BASE,
    UPDATE_MODES,
)
from ..memory.options import MemoryOptions


if TYPE_CHECKING:
    from ..memory import MemoryEstimate, MemoryPlan


GB = 10**9
# options of the command line that are fields of MemoryOptions
FIELDS = tuple(MemoryOptions.__dataclass_fields__)
# of a plan
SEARCHED = ("rank", "batch_size", "optimizer", "double_quant", "per_layer", "gradient_checkpointing")


def add_estimate_parser(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "estimate",
        help="predict how much memory training takes",
        description="Predict how much memory training a causal language model takes, what decides it, and what would lower "
        "it. Nothing is measured on a device.",
        argument_default=argparse.SUPPRESS,
    )
    yes_no = argparse.BooleanOptionalAction
    parser.add_argument("model", metavar="MODEL", help="name on the Hub, folder, or config.json")
    parser.add_argument("--method", choices=ESTIMATED_METHODS, help="default: loqt")
    parser.add_argument("--rank", type=int, help="default: 256")
    parser.add_argument("--optimizer", choices=ESTIMATED_OPTIMIZERS, help="default: adamw")
    parser.add_argument("--per-layer", action=yes_no, help="apply and free each gradient within the backward pass")
    parser.add_argument("--gradient-checkpointing", action=yes_no)
    parser.add_argument("--batch-size", type=int, help="sequences of a micro-batch (default: 1)")
    parser.add_argument("--sequence-length", type=int, help="default: 256")
    parser.add_argument("--gradient-accumulation-steps", type=int, help="default: 1")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and activations (default: bfloat16)")
    parser.add_argument("--adapter-dtype", choices=DTYPES, help="of the adapter (default: that of the weights)")
    parser.add_argument("--base", choices=BASES, help="how the model is loaded (default: by method)")
    parser.add_argument("--double-quant", action=yes_no)
    parser.add_argument("--update-mode", choices=UPDATE_MODES, help="default: backward")
    parser.add_argument("--offload-gradients", action=yes_no, help="default: by update mode")
    parser.add_argument("--projection", choices=ESTIMATED_PROJECTIONS, help="how P is computed (default: randomized)")
    parser.add_argument("--full-rank", action=yes_no, help="train embeddings, norms and head (default: by method)")
    parser.add_argument("--retain-base", choices=RETAIN_BASE, help="default: cpu")
    parser.add_argument("--error-feedback", action=yes_no, help="keep what quantization leaves over, on the host")
    parser.add_argument(
        "--gpu", metavar="SIZE", default=None, help="memory of the device, as 24GiB; 24 alone counts GiB"
    )
    parser.add_argument(
        "--simulate",
        action="store_true",
        default=False,
        help="run the real layers, optimizer and update on torch's meta device; for any architecture",
    )
    parser.add_argument("--all-layers", action="store_true", default=False, help="simulate every decoder layer")
    parser.add_argument(
        "--plan", action="store_true", default=False, help="what fits --gpu: search rank, batch and options not given"
    )
    parser.add_argument("--json", action="store_true", default=False)
    parser.add_argument(
        "--plot",
        metavar="FILE",
        default=None,
        help="draw the phases, or of a plan its first setting's; .svg, .png or .pdf",
    )
    parser.set_defaults(run=estimate_command)


def estimate_command(options: argparse.Namespace) -> None:
    """Print an estimate or a plan."""
    from .. import register
    from ..memory import estimate_memory, plan_memory

    if options.simulate:
        # what is simulated is a PEFT model; formulas need not wait for PEFT
        register()
    chosen = {name: getattr(options, name) for name in FIELDS if hasattr(options, name)}
    how = {"simulate": options.simulate, "all_layers": options.all_layers}
    if options.plan:
        if options.gpu is None:
            raise ValueError("--plan needs --gpu: the memory of the device, as 24GiB.")
        result = plan_memory(options.model, options.gpu, **how, **chosen)
        text = plan_text
    else:
        result = estimate_memory(options.model, budget=options.gpu, **how, **chosen)
        text = estimate_text
    print(json.dumps(result.to_dict(), indent=2) if options.json else text(result))
    if options.plot is not None:
        from ..plots import plot_estimate

        plot_estimate(_first(result) if options.plan else result, options.plot)


def _first(plan: MemoryPlan) -> MemoryEstimate:
    return plan.fitting[0] if plan.fitting else plan.smallest


def _gb(size: int) -> str:
    return f"{size / GB:.2f}"


def _settings(estimate: MemoryEstimate, names: tuple[str, ...] = FIELDS) -> str:
    options = estimate.options
    shown = []
    for name in names:
        value = getattr(options, name)
        if isinstance(value, bool):
            shown += [name] if value else []
        elif value is not None:
            shown.append(f"{name}={value}")
    return ", ".join(shown)


def _margin() -> str:
    from ..memory import CONTEXT_BYTES, FRAGMENTATION

    return (
        f"assumed margin: {FRAGMENTATION:.0%} for the allocator, {CONTEXT_BYTES // 1024**2} MiB for the CUDA context"
    )


def _verdict(estimate: MemoryEstimate) -> str:
    needed = f"needs {_gb(estimate.required)} GB ({_margin()})"
    if estimate.budget is None:
        return needed
    return f"{'fits' if estimate.fits else 'does not fit'} {_gb(estimate.budget)} GB: {needed}"


def estimate_text(estimate: MemoryEstimate) -> str:
    """A table of phases and categories, and what follows from it."""
    categories = list(dict.fromkeys(name for held in estimate.phases.values() for name in held))
    width = max(map(len, categories))
    lines = [
        f"{estimate.model}, predicted by {estimate.source}, GB (10^9 bytes)",
        _settings(estimate),
        "",
        " " * width + "".join(f"{phase:>14}" for phase in estimate.phases),
    ]
    for name in categories:
        lines.append(
            f"{name:<{width}}" + "".join(f"{_gb(held.get(name, 0)):>14}" for held in estimate.phases.values())
        )
    lines.append(f"{'sum':<{width}}" + "".join(f"{_gb(sum(held.values())):>14}" for held in estimate.phases.values()))
    host = ", ".join(f"{name} {_gb(size)}" for name, size in estimate.host.items())
    lines += ["", f"peak {_gb(estimate.peak)} GB, decided by: {estimate.peak_phase}", _verdict(estimate)]
    lines.append(f"host memory: {host or 'none to speak of'}")
    if estimate.levers:
        lines += ["", "what would lower the peak (closed form):"]
        for lever in estimate.levers:
            change = ", ".join(f"{name}={value}" for name, value in lever.change.items())
            lines.append(f"  {change:<32}{'-' + _gb(lever.saved):>8} GB")
    lines += [f"note: {note}" for note in estimate.notes]
    return "\n".join(lines)


def plan_text(plan: MemoryPlan) -> str:
    """The settings that fit, the preferred one first."""
    if not plan.fitting:
        least = plan.smallest
        return (
            f"Nothing that was tried fits {_gb(plan.budget)} GB. The smallest needs {_gb(least.required)} GB "
            f"(predicted; {_margin()}):\n  {_settings(least)}"
        )
    lines = [f"{plan.fitting[0].model}: what fits {_gb(plan.budget)} GB, predicted; {_margin()}", ""]
    for estimate in plan.fitting:
        lines.append(f"  {_gb(estimate.required):>7} GB  {_settings(estimate, SEARCHED)}  ({estimate.source})")
    return "\n".join([*lines, "", *_recommendation(plan)])


def _recommendation(plan: MemoryPlan) -> list[str]:
    """The plan's first setting, as the command that predicts it and the code that trains so."""
    from ..memory.recommend import command, training_code

    best = plan.fitting[0]
    budget = f"{plan.budget / 1024**3:g}GiB"
    lines = [f"Recommended, the largest rank at the least cost: {_settings(best, SEARCHED)}", ""]
    lines.append(f"  {command(best.model, best.options, budget)}")
    if best.options.trains_loqt:
        lines += ["", *(f"  {line}" for line in training_code(best.options).splitlines())]
    return lines
