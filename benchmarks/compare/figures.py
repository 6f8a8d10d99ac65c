"""Figures of finished runs."""

from pathlib import Path

from benchmarks.compare.tables import PARTS, mean_and_error
from loqt_peft.plots import CATEGORY_COLOURS, GREY, name_lines, save, style


def mean_curve(runs: list[dict]) -> tuple[list[int], list[float], list[float]]:
    """Steps, mean validation losses and their standard errors, at the steps that all runs have reached."""
    curves = [{step: loss for step, loss in run["curve"] if loss is not None} for run in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    points = [mean_and_error([curve[step] for curve in curves]) for step in steps]
    return steps, [mean for mean, _ in points], [error or 0.0 for _, error in points]


@style(white=True)
def plot_losses(plan, found: dict, path: Path) -> None:
    """Validation loss over steps, mean and standard error over the seeds; updates of the first LoQT variant marked."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    marked = next((runs[0] for v, runs in found.items() if v.method == "loqt" and runs[0]["updates"]), None)
    if marked is not None:
        for update in marked["updates"]:
            axes.axvline(update["step"], color="0.8", linewidth=0.8, linestyle="--", zorder=0)
    ends, late = [], []
    for i, (variant, runs) in enumerate(found.items()):
        converged = [run for run in runs if not run["diverged"]]
        if not converged:
            continue
        steps, means, errors = mean_curve(converged)
        # more lines than colours
        style = ("-", "--")[i // 10 % 2]
        (line,) = axes.plot(steps, means, style, linewidth=1.5, label=f"{variant.name}, {means[-1]:.3f}")
        low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        ends.append(min(means))
        late += [mean for step, mean in zip(steps, means, strict=True) if step >= plan.steps / 5]
    if late:
        # the first steps would leave no room for what differs
        margin = 0.05 * (max(late) - min(ends)) or 0.1
        axes.set_ylim(min(ends) - margin, max(late) + margin)
    spec = plan.grid(plan.variants[0])[0]
    axes.set_xlabel(
        f"optimizer step ({spec['batch'] * spec['model']['length']:,} tokens each); dashed: updates of LoQT"
    )
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title(
        f"{plan.study.replace('_', ' ').capitalize()}, LLaMA {plan.size}: mean and standard error over the seeds"
    )
    name_lines(axes)
    save(figure, path)


@style(white=True)
def plot_memory(plan, found: dict, path: Path) -> None:
    """Bytes on the device by method, stacked."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(2 + 1.1 * len(found), 4.5))
    names = [variant.name.replace(", ", ",\n") for variant in found]
    below = [0.0] * len(found)
    for part in PARTS:
        heights = [runs[0]["bytes"].get(part, 0) / 1e6 for runs in found.values()]
        shade = CATEGORY_COLOURS.get({"optimizer": "optimizer state"}.get(part, part), GREY)[0]
        axes.bar(range(len(found)), heights, 0.7, bottom=below, label=part, color=shade)
        below = [b + h for b, h in zip(below, heights, strict=True)]
    axes.set_xticks(range(len(found)), names, rotation=30, ha="right", fontsize="small")
    axes.set_ylabel("memory at the end of training (MB = 10⁶ bytes)")
    axes.set_title(f"Memory, {plan.study.replace('_', ' ')}, LLaMA {plan.size}")
    axes.set_ylim(0, 1.1 * max(below))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def points(updates: list[dict], name: str) -> tuple[list[int], list[float]]:
    return [u["step"] for u in updates], [u[name] or 0.0 for u in updates]


@style(white=True)
def plot_updates(plan, found: dict, path: Path) -> None:
    """What each update merged beside the error that quantizing left, over the steps; nothing if there was one update only."""
    import matplotlib.pyplot as plt

    loqt = {v: runs for v, runs in found.items() if v.method.startswith("loqt") and len(runs[0]["updates"]) > 1}
    if not loqt:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for i, (variant, runs) in enumerate(loqt.items()):
        # nothing has been learned before update 0
        updates, colour = runs[0]["updates"][1:], f"C{i}"
        left.plot(*points(updates, "merged_change"), "o-", ms=3, color=colour, label=f"{variant.name}: change")
        steps, errors = points(updates, "quantization_error_after")
        if any(errors):
            left.plot(steps, errors, "--", color=colour, label=f"{variant.name}: quantization")
        ratios = [u["merged_change"] / e for u, e in zip(updates, errors, strict=True) if e]
        if len(ratios) == len(updates):
            right.plot(steps, ratios, "o-", ms=3, color=colour, label=variant.name)
    left.set_yscale("log")
    left.set_ylabel("‖sPB‖ / ‖W‖ and ‖W − Q − sPB‖ / ‖W‖")
    left.set_title(f"What an update merges, and what 4 bits lose, LLaMA {plan.size}, seed {plan.seeds[0]}")
    right.set_ylabel("‖sPB‖ / ‖W − Q − sPB‖")
    right.set_title("The first over the second")
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.legend(fontsize="small")
    save(figure, path)
