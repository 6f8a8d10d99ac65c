"""Validation loss, memory and speed of LoQT, its ablations and other methods, on equal models, batches, steps and seeds.

    python -m benchmarks.compare                                  # the methods, at 1M parameters
    python -m benchmarks.compare --study gaps compensation        # ablations
    python -m benchmarks.compare --size 60m --text allenai/c4 --text-config en --documents 3000000

Every method trains with the stock Trainer: full-rank AdamW, LoRA, ReLoRA, GaLore, APOLLO, LoQT-nq and LoQT. A variant that
searches its learning rate runs at each rate of the grid with the first seed, then at the best with the others; the other
variants run at LoQT's best. Embeddings, norms and head train at full rank in all of them.

A run that has ended is one line of the results file, and a restart skips it: interrupt whenever you like. At the end come
Markdown tables and figures, beside the results file. `--report` makes them of what is there, without running anything.

At 1M parameters the methods are 42 runs. Extrapolated from 60 steps of each, a run takes 3.5 to 5 minutes on one thread of a
busy machine, and all of them about 1.5 hours on 2 cores. The other studies, each a file of studies/, are ablations, settings
that might do better than the paper's (`recipe`, 116 runs) and what full-rank AdamW lacks (`rest`, 78); `long` is 21 runs of
ten times as many steps, of 33 to 50 minutes each. Tokenizing the reviews takes half a minute, once.
"""

import argparse
import io
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path


# before torch is imported: runs side by side on one thread each are faster than one run on many, at these sizes
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from benchmarks.common import RESULTS
from benchmarks.compare import results, text
from benchmarks.compare.errors import CompareError
from benchmarks.compare.methods import missing_packages
from benchmarks.compare.plan import Plan, only_rows
from benchmarks.compare.report import write_report
from benchmarks.compare.settings import LEARNING_RATES, SIZES, Variant, make_spec
from benchmarks.compare.studies import STUDIES
from benchmarks.compare.training import measure_bytes
from benchmarks.compare.workers import Workers, name_of, run_all


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        "python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    parser.add_argument("--results", type=Path, default=RESULTS / "compare" / "runs.jsonl")
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
        steps = options.steps or size.steps * getattr(STUDIES[study], "STEPS", 1)

        def spec(variant: Variant, rate: float, seed: int, steps=steps) -> dict:
            return make_spec(variant, options.size, rate, seed, steps, fingerprint, options.dtype, options.device)

        def device_bytes(variant: Variant, spec=spec) -> int:
            # the Trainer's callbacks print, and this is no run of which anybody asked
            with redirect_stdout(io.StringIO()):
                counted = measure_bytes(spec(variant, 0.001, 0))
            return sum(counted[part] for part in ("weights", "gradients", "optimizer"))

        variants = STUDIES[study].variants(size, device_bytes)
        if options.methods:
            variants = [variant for variant in variants if variant.method in options.methods]
        rates = tuple(options.lrs) if options.lrs else None
        plans.append(Plan(study, variants, spec, options.seeds, rates, options.size, steps, label))
    return plans


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
        print(f"compare: error: {error}", file=sys.stderr, flush=True)
        status = 1
    except KeyboardInterrupt:
        print("\ninterrupted; what has ended is kept: start again to go on", file=sys.stderr, flush=True)
        status = 130
    sys.exit(status)
