"""Every task with every method and seed: `run_glue.py --all`. What is finished is skipped when it is started again.

    python run_glue.py --all --tasks cola rte --methods loqt lora --seeds 0 1 2 --output_dir results \\
        --model_name_or_path microsoft/deberta-v3-base

A run is a process of its own with the folder OUTPUT_DIR/TASK/METHOD/seed_SEED, of which log.txt holds what it said. The table
`results.md`, `results.json` and the figure `results.png` are written anew after every run.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import matplotlib
from glue_tasks import METHODS, TASKS
from script_utils import BadInput
from tqdm import tqdm


matplotlib.use("Agg")
import matplotlib.pyplot as plt


SCRIPT = Path(__file__).with_name("run_glue.py")


def arguments_of(task: str, method: str, seed: int, overrides: dict, others: list[str]) -> list[str]:
    """The arguments of a run but for its folder; what comes last counts."""
    options = {"task_name": task, "method": method, "seed": seed}
    for name in (method, task, f"{task}/{method}"):
        options |= overrides.get(name, {})
    return ["--do_train", "--do_eval", *others, *(part for k, v in options.items() for part in (f"--{k}", str(v)))]


def result_of(folder: Path) -> dict | None:
    """The metrics of a finished run."""
    path = folder / "all_results.json"
    if not path.exists():
        return None
    metrics = json.loads(path.read_text())
    return metrics if "eval_loss" in metrics else None


def run(folder: Path, arguments: list[str]) -> int:
    """Run it, and return the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "arguments.json"
    if record.exists() and json.loads(record.read_text()) != arguments:
        raise BadInput(
            f"{folder} holds a run with other arguments ({record}). Remove it, or use another --output_dir."
        )
    record.write_text(json.dumps(arguments))
    with open(folder / "log.txt", "a") as log:
        return subprocess.run(
            [sys.executable, str(SCRIPT), *arguments, "--output_dir", str(folder), "--disable_tqdm", "True"],
            stdout=log,
            stderr=subprocess.STDOUT,
        ).returncode


def mean_and_error(figures: list[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean; `None` for a single figure."""
    if len(figures) < 2:
        return figures[0], None
    return statistics.mean(figures), statistics.stdev(figures) / math.sqrt(len(figures))


def summarize(results: dict, tasks: list[str], methods: list[str]) -> dict:
    """(method, task) -> mean and standard error, in percent; the task "average" is that of the seeds' averages."""
    summary = {}
    for method in methods:
        by_seed: dict[int, dict[str, float]] = {}
        for task in tasks:
            scores = {
                seed: 100 * metrics[f"eval_{TASKS[task].score}"]
                for (t, m, seed), metrics in results.items()
                if (t, m) == (task, method)
            }
            if scores:
                summary[method, task] = mean_and_error(list(scores.values()))
            for seed, score in scores.items():
                by_seed.setdefault(seed, {})[task] = score
        averages = [statistics.mean(scores.values()) for scores in by_seed.values() if len(scores) == len(tasks)]
        if averages:
            summary[method, "average"] = mean_and_error(averages)
    return summary


def table(summary: dict, results: dict, tasks: list[str], methods: list[str], failed: list[str]) -> str:
    """Markdown, in percent."""

    def cell(method: str, column: str) -> str:
        if (method, column) not in summary:
            return ""
        mean, error = summary[method, column]
        return f"{mean:.2f}" if error is None else f"{mean:.2f} ± {error:.2f}"

    columns = [*tasks, "average"]
    titles = [f"{task} ({TASKS[task].score.replace('_', ' ')})" for task in tasks]
    lines = [f"| method | {' | '.join([*titles, 'average'])} |", "|" + "---|" * (len(columns) + 1)]
    lines += [f"| {method} | {' | '.join(cell(method, column) for column in columns)} |" for method in methods]
    seeds = sorted({seed for _, _, seed in results})
    sources = sorted({metrics["metric_source"] for metrics in results.values()})
    lines.append(
        f"\nIn percent, after the last epoch; mean ± standard error of the mean over the seeds "
        f"{', '.join(map(str, seeds))}. Metrics by {', '.join(sources)}."
    )
    lines += [f"\nFailed: {name}." for name in failed]
    return "\n".join(lines)


def plot(summary: dict, tasks: list[str], methods: list[str], path: Path) -> None:
    columns = [*tasks, *(["average"] if len(tasks) > 1 else [])]
    figure, axes = plt.subplots(figsize=(2 + 2 * len(columns), 4), layout="constrained")
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        found = [(x, *summary[method, column]) for x, column in enumerate(columns) if (method, column) in summary]
        axes.bar(
            [x + (i - (len(methods) - 1) / 2) * width for x, _, _ in found],
            [mean for _, mean, _ in found],
            width,
            yerr=[error or 0 for _, _, error in found],
            capsize=2,
            label=method,
        )
    names = [TASKS[task].score.replace("_", " ") for task in tasks] + ["of the tasks"] * (len(columns) - len(tasks))
    axes.set_xticks(range(len(columns)), [f"{column}\n{name}" for column, name in zip(columns, names, strict=True)])
    lowest = min((mean for mean, _ in summary.values()), default=0)
    axes.set_ylim(bottom=max(0, lowest - 10) if lowest > 0 else None)
    axes.set_ylabel("score after the last epoch (%)")
    axes.set_title("GLUE validation, mean and standard error over seeds")
    axes.legend(ncols=len(methods), fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.08))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_results(output: Path, specs: list[tuple], tasks: list[str], methods: list[str], failed: list[str]) -> str:
    results = {}
    for task, method, seed in specs:
        metrics = result_of(folder_of(output, task, method, seed))
        if metrics is not None:
            results[task, method, seed] = metrics
    if not results:
        return "No run has ended well."
    summary = summarize(results, tasks, methods)
    text = table(summary, results, tasks, methods, failed)
    (output / "results.md").write_text(text + "\n")
    runs = [{"task": t, "method": m, "seed": s, **metrics} for (t, m, s), metrics in results.items()]
    (output / "results.json").write_text(json.dumps(runs, indent=2) + "\n")
    plot(summary, tasks, methods, output / "results.png")
    return text


def folder_of(output: Path, task: str, method: str, seed: int) -> Path:
    return output / task / method / f"seed_{seed}"


def parse_arguments(argv: list[str]):
    parser = argparse.ArgumentParser(
        "run_glue.py --all",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other arguments are those of run_glue.py, for every run.",
        allow_abbrev=False,
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1, help="runs side by side")
    parser.add_argument(
        "--overrides",
        type=Path,
        help='JSON: {"METHOD": {argument: value}, "TASK": {...}, "TASK/METHOD": {...}}, the later ones count',
    )
    options, others = parser.parse_known_args(argv)
    overrides = {}
    if options.overrides is not None:
        try:
            overrides = json.loads(options.overrides.read_text())
        except (OSError, ValueError) as error:
            raise BadInput(f"--overrides {options.overrides}: {error}") from error
        known = {*METHODS, *TASKS, *(f"{task}/{method}" for task in TASKS for method in METHODS)}
        for name in overrides:
            if name not in known:
                raise BadInput(f"--overrides {options.overrides}: {name!r} is no method, task or TASK/METHOD")
    return options, overrides, others


def main(argv: list[str]) -> None:
    options, overrides, others = parse_arguments(argv)
    output, failed = options.output_dir, []
    # all methods of a task and seed first: a table that is cut off is still fair
    specs = [(t, m, s) for s in options.seeds for t in options.tasks for m in options.methods]
    missing = [spec for spec in specs if result_of(folder_of(output, *spec)) is None]
    with (
        ThreadPoolExecutor(options.workers) as pool,
        tqdm(total=len(specs), initial=len(specs) - len(missing), unit="run") as bar,
    ):
        futures = {
            pool.submit(run, folder_of(output, *spec), arguments_of(*spec, overrides, others)): spec
            for spec in missing
        }
        try:
            for future in as_completed(futures):
                spec = futures[future]
                if future.result() != 0 or result_of(folder_of(output, *spec)) is None:
                    failed.append("{}/{}/seed_{}".format(*spec))
                    tqdm.write(f"failed: {failed[-1]}, see {folder_of(output, *spec) / 'log.txt'}")
                bar.update()
                write_results(output, specs, options.tasks, options.methods, failed)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print("\n" + write_results(output, specs, options.tasks, options.methods, failed))
    if failed:
        raise BadInput(f"{len(failed)} of {len(specs)} runs failed: {', '.join(failed)}")
