"""Validation loss, memory and speed of LoQT, its ablations and other methods, on equal models, batches, steps and seeds.

    python -m benchmarks.pretraining.compare                                  # the methods, at 1M parameters
    python -m benchmarks.pretraining.compare --study gaps compensation        # ablations
    python -m benchmarks.pretraining.compare --size 60m --text allenai/c4 --text-config en --documents 3000000

Every method trains with the stock Trainer: full-rank AdamW, LoRA, ReLoRA, GaLore, APOLLO, LoQT-nq and LoQT. A variant that
searches its learning rate runs at each rate of the grid with the first seed, then at the best with the others; the other
variants run at LoQT's best. Embeddings, norms and head train at full rank in all of them.

A run that has ended is one line of the results file, and a restart skips it: interrupt whenever you like. At the end come
Markdown tables and figures, beside the results file. `--report` makes them of what is there, without running anything.

At 1M parameters the methods are 42 runs. Extrapolated from 60 steps of each, a run takes 3.5 to 5 minutes on one thread of a
busy machine, and all of them about 1.5 hours on 2 cores; the ablations are some 150 runs more, `recipe` (settings and
mechanisms, candidates.py, that might do better than the paper's) 180, `rest` 60. `long` is 15 runs of ten times as many
steps, of 33 to 50 minutes each.
Tokenizing the reviews takes half a minute, once.
"""

import argparse
import os
import sys


# before torch is imported: runs side by side on one thread each are faster than one run on many, at these sizes
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import io
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.common import RESULTS
from benchmarks.pretraining import results, text
from benchmarks.pretraining.errors import CompareError
from benchmarks.pretraining.methods import missing_packages
from benchmarks.pretraining.report import write_report
from benchmarks.pretraining.settings import (
    LEARNING_RATES,
    LONG,
    LOQT,
    SIZES,
    STUDIES,
    Variant,
    key_of,
    make_spec,
)
from benchmarks.pretraining.training import measure_bytes, run_in_worker, start_worker


###############################
# Which runs
###############################


@dataclass
class Plan:
    """A study at a size: which runs it needs, as far as the finished ones tell.

    Args:
        study (`str`): Its name.
        variants (`list[Variant]`): Its rows.
        spec (`Callable`): (variant, learning rate, seed) -> spec.
        seeds (`list[int]`): The grid is searched with the first.
        rates (`tuple[float]`, *optional*): Instead of every variant's own grid.
        size (`str`): The size's name.
        steps (`int`): Of each run.
        text (`str`): What it is called in tables and names of files; empty for the reviews.
    """

    study: str
    variants: list[Variant]
    spec: Callable[[Variant, float, int], dict]
    seeds: list[int]
    rates: tuple[float, ...] | None = None
    size: str = ""
    steps: int = 0
    text: str = ""

    def grid(self, variant: Variant) -> list[dict]:
        """The runs that decide on the learning rate of a variant."""
        searched = variant if variant.search else LOQT
        rates = self.rates or searched.rates or LEARNING_RATES[searched.method]
        return [self.spec(searched, rate, self.seeds[0]) for rate in rates]

    def best_rate(self, variant: Variant, done: dict[str, dict]) -> float | None:
        """Of the grid, once all of it is done; `None` before, and if all of it diverged."""
        runs = [done.get(key_of(spec)) for spec in self.grid(variant)]
        if not all(runs):
            return None
        converged = [run for run in runs if not run["diverged"]]
        return min(converged, key=lambda run: run["loss"])["spec"]["lr"] if converged else None

    def at_rate(self, variant: Variant, rate: float) -> list[dict]:
        return [self.spec(variant, rate, seed) for seed in self.seeds]

    def known(self, done: dict[str, dict]) -> list[dict]:
        """All runs that are known to be needed; the repetitions once their learning rate is known."""
        specs = []
        for variant in self.variants:
            specs += self.grid(variant)
            rate = self.best_rate(variant, done)
            if rate is not None:
                specs += self.at_rate(variant, rate)
        return specs

    def expected(self, done: dict[str, dict]) -> set[str]:
        """Keys of all runs, with the first rate of the grid in place of a best one that is not known yet."""
        keys = {key_of(spec) for spec in self.known(done)}
        for variant in self.variants:
            grid = self.grid(variant)
            if not all(key_of(spec) in done for spec in grid):
                keys |= {key_of(spec) for spec in self.at_rate(variant, grid[0]["lr"])}
        return keys


###############################
# The queue
###############################


class Workers:
    """Runs specs side by side, each worker a process of its own that lives until it crashes or the harness ends."""

    def __init__(self, count: int, blocks: Path, logs: Path):
        self.threads = ThreadPoolExecutor(count)
        self.local = threading.local()
        self.blocks, self.logs = blocks, logs
        self.processes: list[ProcessPoolExecutor] = []

    def close(self, now: bool = False) -> None:
        """End the processes, `now` or when their runs have ended."""
        self.threads.shutdown(wait=not now, cancel_futures=True)
        if now:
            for child in multiprocessing.active_children():
                child.terminate()
        for process in self.processes:
            process.shutdown()

    def submit(self, spec: dict) -> Future:
        return self.threads.submit(self._run, spec)

    def log(self, spec: dict) -> Path:
        return self.logs / f"{key_of(spec)}.log"

    def _run(self, spec: dict) -> dict:
        process = getattr(self.local, "process", None)
        if process is None:
            context = multiprocessing.get_context("spawn")
            process = self.local.process = ProcessPoolExecutor(1, context, initializer=start_worker)
            self.processes.append(process)
        try:
            return process.submit(run_in_worker, spec, self.blocks, self.log(spec)).result()
        except Exception:
            # after a crash the pool is broken; after an error it may hold memory
            self.local.process = None
            process.shutdown(wait=False)
            raise


def name_of(spec: dict) -> str:
    return f"{spec['method']} lr {spec['lr']:g} seed {spec['seed']} ({key_of(spec)})"


def report_failure(spec: dict, error: BaseException, log: Path) -> None:
    lines = log.read_text(errors="replace").splitlines()[-20:] if log.exists() else []
    print(
        "\n".join([f"failed: {name_of(spec)}: {type(error).__name__}: {error}", f"the end of {log}:", *lines]),
        file=sys.stderr,
        flush=True,
    )


def run_all(plans: list[Plan], path: Path, workers) -> list[dict]:
    """Run what the plans need and is not done, write each result when it is there, and return the specs that failed.

    Args:
        plans (`list[Plan]`): What is needed.
        path (`Path`): The file of results.
        workers ([`Workers`]): Where runs are submitted.
    """
    done = results.read(path)
    pending: dict[Future, dict] = {}
    asked_for: set[str] = set()
    failed: list[dict] = []

    def submit() -> None:
        for plan in plans:
            for spec in plan.known(done):
                key = key_of(spec)
                if key not in done and key not in asked_for:
                    asked_for.add(key)
                    pending[workers.submit(spec)] = spec

    def expected() -> set[str]:
        return set().union(*(plan.expected(done) for plan in plans))

    keys = expected()
    with tqdm(total=len(keys), initial=len(keys & done.keys()), unit="run", smoothing=0, file=sys.stdout) as bar:
        submit()
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                spec = pending.pop(future)
                try:
                    run = future.result()
                except Exception as error:  # of the run, whatever it was; the others go on
                    failed.append(spec)
                    report_failure(spec, error, workers.log(spec))
                else:
                    results.append(path, run)
                    done[key_of(run["spec"])] = run
                    figure = "diverged" if run["diverged"] else f"loss {run['loss']:.4f}"
                    bar.write(f"{name_of(spec)}: {figure}, {run['seconds']:.0f} s", file=sys.stdout)
                bar.update()
            submit()
            bar.total = len(expected() | asked_for)
            bar.refresh()
    return failed


###############################
# The command line
###############################


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        "compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", nargs="+", choices=[*STUDIES, "all"], default=["methods"])
    parser.add_argument("--size", choices=list(SIZES), default="1m")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run (by default the size's; long: ten times)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the grid runs with the first")
    parser.add_argument("--lrs", type=float, nargs="+", help="instead of each method's own grid")
    parser.add_argument("--methods", nargs="+", choices=list(LEARNING_RATES), help="only these methods of the studies")
    parser.add_argument(
        "--rows", nargs="+", help="run only these rows of the studies; the tables have all that is there"
    )
    parser.add_argument("--workers", type=int, default=1 if cuda else os.cpu_count(), help="runs side by side")
    parser.add_argument("--text", help="a file, or a data set's name; by default IMDB reviews")
    parser.add_argument("--text-config", help="configuration of the data set")
    parser.add_argument("--documents", type=int, help="take only the first so many documents")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and states")
    parser.add_argument("--results", type=Path, default=RESULTS / "pretraining" / "runs.jsonl")
    parser.add_argument(
        "--cache", type=Path, help="folder of token blocks and logs (by default .cache by the results)"
    )
    parser.add_argument("--report", action="store_true", help="only write tables and figures")
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps {options.steps} must be at least 1")
    if options.workers < 1:
        parser.error(f"--workers {options.workers} must be at least 1")
    if len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds {options.seeds}: each once")
    options.device = "cuda" if cuda else "cpu"
    options.studies = list(STUDIES) if "all" in options.study else list(dict.fromkeys(options.study))
    options.cache = options.cache or options.results.parent / ".cache"
    return options


def make_plans(options: argparse.Namespace, fingerprint: str) -> list[Plan]:
    """The studies asked for, as plans."""
    size = SIZES[options.size]
    label = text.label(options.text, options.text_config)
    plans = []
    for study in options.studies:
        steps = options.steps or size.steps * (LONG if study == "long" else 1)

        def spec(variant: Variant, rate: float, seed: int, steps=steps) -> dict:
            return make_spec(variant, options.size, rate, seed, steps, fingerprint, options.dtype, options.device)

        def device_bytes(variant: Variant, spec=spec) -> int:
            # the Trainer's callbacks print, and this is no run of which anybody asked
            with redirect_stdout(io.StringIO()):
                counted = measure_bytes(spec(variant, 0.001, 0))
            return sum(counted[part] for part in ("weights", "gradients", "optimizer"))

        variants = STUDIES[study](size, device_bytes)
        if options.methods:
            variants = [variant for variant in variants if variant.method in options.methods]
        rates = tuple(options.lrs) if options.lrs else None
        plans.append(Plan(study, variants, spec, options.seeds, rates, options.size, steps, label))
    return plans


def only_rows(plans: list[Plan], names: list[str]) -> list[Plan]:
    """The plans with the variants of these names. Raises CompareError if no study has one of them."""
    there = {variant.name for plan in plans for variant in plan.variants}
    unknown = [name for name in names if name not in there]
    if unknown:
        raise CompareError(f"--rows {unknown}: the rows are {sorted(there)}")
    return [replace(plan, variants=[v for v in plan.variants if v.name in names]) for plan in plans]


def check_packages(studies: list[str], methods: list[str] | None) -> None:
    """Raises CompareError, with what to install, before anything has run."""
    needed = set(methods or LEARNING_RATES)
    if "methods" not in studies:
        needed &= {"loqt", "loqt-nq", *(["galore"] if "equal_bytes" in studies else [])}
    missing = missing_packages(needed)
    if missing:
        raise CompareError(f"missing: pip install {' '.join(missing)} (or leave the methods out with --methods)")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a run failed.

    Raises:
        CompareError: For anything that the user has to see to.
    """
    options = parse_arguments(argv)
    check_packages(options.studies, options.methods)
    results.read(options.results)
    size = SIZES[options.size]
    parts = text.documents(options.text, options.text_config, options.documents)
    blocks, fingerprint = text.token_blocks(parts, size.vocabulary, size.length, options.cache / "blocks")
    plans = make_plans(options, fingerprint)
    wanted = only_rows(plans, options.rows) if options.rows else plans
    failed = []
    if not options.report:
        logs = options.cache / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        workers = Workers(options.workers, blocks, logs)
        try:
            failed = run_all(wanted, options.results, workers)
        except BaseException:
            workers.close(now=True)
            raise
        workers.close()
    for plan in plans:
        print("\n" + write_report(plan, results.read(options.results), options.results.parent), flush=True)
    if failed:
        print(f"{len(failed)} runs failed: {', '.join(map(name_of, failed))}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        status = main()
    except CompareError as error:
        print(f"compare.py: error: {error}", file=sys.stderr, flush=True)
        status = 1
    except KeyboardInterrupt:
        print("\ninterrupted; what has ended is kept: start again to go on", file=sys.stderr, flush=True)
        status = 130
    sys.exit(status)
