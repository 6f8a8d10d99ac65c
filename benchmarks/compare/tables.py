"""Markdown tables of finished runs."""

import itertools
import math
import statistics
from collections.abc import Iterable
from dataclasses import replace

from benchmarks.common import markdown_table
from benchmarks.compare.errors import CompareError
from benchmarks.compare.settings import key_of
from benchmarks.compare.variants import LOQT


HEADER = (
    "",
    "learning rate",
    "validation loss",
    "perplexity",
    "weights",
    "gradients",
    "optimizer",
    "sum",
    "on the host",
    "tokens/s",
    "updates",
)
PARTS = ("weights", "gradients", "optimizer")


def mean_and_error(figures: list[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean; `None` for a single figure."""
    if len(figures) < 2:
        return figures[0], None
    return statistics.mean(figures), statistics.stdev(figures) / math.sqrt(len(figures))


def with_error(figures: list[float], form: str) -> str:
    mean, error = mean_and_error(figures)
    return format(mean, form) if error is None else f"{mean:{form}} ± {error:{form.lstrip('+')}}"


def runs_of(plan, variant, done: dict[str, dict]) -> list[dict]:
    """The finished runs of a variant at its learning rate, over the seeds."""
    rate = plan.best_rate(variant, done)
    if rate is None:
        return []
    return [done[key_of(spec)] for spec in plan.at_rate(variant, rate) if key_of(spec) in done]


def check_batches(runs: Iterable[dict]) -> None:
    """Raises CompareError if two runs of the same seed, text and steps were not trained on the same tokens."""
    seen: dict[tuple, dict] = {}
    for run in runs:
        spec = run["spec"]
        if run["steps"] < spec["steps"]:
            continue
        first = seen.setdefault((spec["seed"], spec["steps"], spec["text"], spec["batch"], spec["size"]), run)
        if first["batches"] != run["batches"]:
            raise CompareError(
                f"the runs {key_of(first['spec'])} and {key_of(spec)} saw different batches: they cannot be compared"
            )


def row(plan, variant, done: dict[str, dict]) -> tuple | None:
    runs = runs_of(plan, variant, done)
    if not runs:
        grid = [done.get(key_of(spec)) for spec in plan.grid(variant)]
        all_diverged = bool(grid) and all(run is not None and run["diverged"] for run in grid)
        return (variant.name, "", "diverged at every rate", *[""] * 8) if all_diverged else None
    converged = [run for run in runs if not run["diverged"]]
    rates = sorted(spec["lr"] for spec in plan.grid(variant))
    rate = runs[0]["spec"]["lr"]
    # the best may lie beyond
    edge = " †" if variant.search and len(rates) > 1 and rate in (rates[0], rates[-1]) else ""
    losses = "diverged"
    perplexities = ""
    if converged:
        lost = f" ({len(runs) - len(converged)} of {len(runs)} diverged)" if len(converged) < len(runs) else ""
        losses = with_error([run["loss"] for run in converged], ".4f") + lost
        perplexities = with_error([run["perplexity"] for run in converged], ".2f")
    counted = runs[0]["bytes"]
    counts = [counted.get(part, 0) for part in PARTS]
    speeds = [run["tokens_per_second"] for run in runs if run["tokens_per_second"]]
    return (
        variant.name,
        f"{rate:g}{edge}",
        losses,
        perplexities,
        *(f"{count:,}" for count in (*counts, sum(counts), counted.get("host", 0))),
        with_error(speeds, ",.0f") if speeds else "",
        len(runs[0]["updates"]),
    )


def grid_rows(plan, done: dict[str, dict]) -> list[tuple]:
    rows = []
    for variant in plan.variants:
        if not variant.search:
            continue
        for spec in plan.grid(variant):
            run = done.get(key_of(spec))
            if run is not None:
                loss = "diverged" if run["diverged"] else f"{run['loss']:.4f}"
                rows.append((variant.name, f"{spec['lr']:g}", loss))
    return rows


def direction_rows(plan, done: dict[str, dict]) -> list[tuple]:
    rows = []
    for variant in plan.variants:
        # the first results were taken without
        runs = [run for run in runs_of(plan, variant, done) if run.get("ranks")]
        if runs:
            overlaps = [overlap for run in runs for overlap in run["overlaps"]]
            shares = [run["ranks"]["change"] for run in runs]
            rows.append(
                (variant.name, with_error(shares, ".3f"), f"{statistics.mean(overlaps):.3f}" if overlaps else "")
            )
    return rows


def difference_rows(plan, done: dict[str, dict]) -> list[tuple]:
    """Validation losses against those of the paper's recipe with the same base, learning rate and seed."""
    rows = []
    for variant in plan.variants:
        reference = replace(LOQT, base=variant.base)
        pairs = [
            (run, done.get(key_of(plan.spec(reference, run["spec"]["lr"], run["spec"]["seed"]))))
            for run in runs_of(plan, variant, done)
        ]
        pairs = [(run, other) for run, other in pairs if other is not run]
        if pairs and all(other and not run["diverged"] and not other["diverged"] for run, other in pairs):
            rows.append((variant.name, with_error([run["loss"] - other["loss"] for run, other in pairs], "+.4f")))
    return rows


def switch_rows(plan, done: dict[str, dict]) -> list[tuple]:
    """What switches add to the validation loss, the first and the others on average."""
    rows = []
    for variant in plan.variants:
        changes = []
        for run in runs_of(plan, variant, done):
            losses = [(update.get("loss_before"), update.get("loss_after")) for update in run["updates"]]
            # the first results were taken without
            if losses and None not in itertools.chain(*losses):
                changes.append([after - before for before, after in losses])
        if changes and all(len(of_run) > 1 for of_run in changes):
            first = with_error([of_run[0] for of_run in changes], ".5f")
            later = with_error([statistics.mean(of_run[1:]) for of_run in changes], ".5f")
            rows.append((variant.name, first, later))
    return rows


def provenance(runs: list[dict]) -> str:
    """The machines and versions of the runs, which need not be those that write the report."""
    lines = set()
    for run in runs:
        here, found = run["machine"], ", ".join(f"{name} {number}" for name, number in run["versions"].items())
        where = here["device"] if here["device"] != "cpu" else f"{here['processor']}, {here['cores']} cores"
        lines.add(f"Machine: {where}, {here['threads']} threads a run. Versions: {found}.")
    return "\n".join(sorted(lines)) + "\n"


def table(plan, done: dict[str, dict]) -> str:
    """Markdown of a study, from the runs that have ended."""
    rows = [found for variant in plan.variants if (found := row(plan, variant, done))]
    if not rows:
        return f"# {plan.study}: no variant has ended its learning rates yet\n"
    runs = [run for variant in plan.variants for run in runs_of(plan, variant, done)]
    runs += [done[key_of(s)] for v in plan.variants for s in plan.grid(v) if key_of(s) in done]
    check_batches(runs)
    spec = plan.grid(plan.variants[0])[0]
    model = spec["model"]
    text = [
        f"# {plan.study.replace('_', ' ')}\n",
        f"Text: {plan.text or 'IMDB reviews'}. LLaMA {plan.size}: hidden {model['hidden']}, {model['layers']} layers, "
        f"vocabulary {model['vocabulary']}; {plan.steps:,} steps of {spec['batch']} x {model['length']} tokens "
        f"({runs[0]['epochs']:.2g} epochs), "
        f"{spec['dtype']}, seeds {', '.join(map(str, plan.seeds))}. Mean ± standard error of the mean over the seeds. Loss "
        "in nats a token, memory in bytes, counted from the tensors of the trained model. The host's bytes are the "
        "original base weights, which LoQT sets aside (`retain_base`), and what `error_feedback` keeps. Updates are "
        "LoQT's, ReLoRA's restarts, GaLore's and APOLLO's new projections. tokens/s depends on what ran beside it.\n",
        markdown_table(HEADER, rows),
    ]
    directions = direction_rows(plan, done)
    if directions:
        text += [
            "Directions of the change of the targeted weights: its effective rank (Σσ²)² / Σσ⁴ as a share of the smaller "
            "side, and the overlap ‖Q_new Q_oldᵀ‖² / r of the subspaces of successive updates (1: the same; of random ones on "
            "average r/n); means over layers, updates and seeds.\n",
            markdown_table(("", "effective rank of the change", "overlap"), directions),
        ]
    differences = difference_rows(plan, done)
    if differences:
        text += [
            "Validation loss less that of LoQT with the paper's recipe, from the same base, at the same learning rate and "
            "with the same seed; mean ± standard error over the seeds.\n",
            markdown_table(("", "difference"), differences),
        ]
    switches = switch_rows(plan, done)
    if switches:
        text += [
            "What a switch (merge, new P, requantization with compensation) adds to the validation loss of 128 blocks right "
            "before it: the first one, and the mean over the later ones; mean ± standard error over the seeds.\n",
            markdown_table(("", "first switch", "later switches"), switches),
        ]
    grid = grid_rows(plan, done)
    if grid:
        text += [
            f"Learning rates tried, seed {plan.seeds[0]} († above: the best is the smallest or largest of them):\n",
            markdown_table(("", "learning rate", "validation loss"), grid),
        ]
    else:
        text.append("All at the learning rate that is best for LoQT.\n")
    return "\n".join([*text, provenance(runs)])
