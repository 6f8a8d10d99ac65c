"""Runs the measurements, each in a process of its own, within a budget, and goes on where it was stopped."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .plan import MEASUREMENTS, TINY_SECONDS, Measurement, affordable, by_name
from .report import markdown, verdicts
from .results import DONE, FAILED, LATE, RUNNING, Results


ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "gpu_output"
# what a measurement may do between two looks at the clock, and a process before it begins to measure
GRACE_SECONDS, START_SECONDS = 60, 600
POLL_SECONDS = 0.2


def _start(output: Path, form: str, names: list[str]) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        # what is left of a hang
        "PYTHONFAULTHANDLER": "1",
    }
    command = [sys.executable, "-m", "benchmarks.gpu.worker", str(output), form, *names]
    # a group of its own, so that what the measurement has started ends with it
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, start_new_session=True)


def _kill(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_batch(output: Path, form: str, batch: list[Measurement]) -> Results:
    """Measure in one process; what it was about when it ended too early, or hung, is marked."""
    seconds = {m.name: TINY_SECONDS if form == "tiny" else m.seconds for m in batch}
    process, changed, status = _start(output, form, list(seconds)), time.time(), FAILED
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            results = Results(output, form)
            name = results.running()
            changed = results.data["measurements"][name]["began"] if name in seconds else changed
            allowed = seconds[name] + GRACE_SECONDS if name in seconds else START_SECONDS
            if time.time() - changed > allowed:
                status = LATE
                break
    finally:
        _kill(process)
    results = Results(output, form)
    for measurement in batch:
        if results.status(measurement.name) == RUNNING:
            results.end(measurement.name, status, f"its process ended with code {process.returncode}")
    return results


def run(output: Path, tiny: bool, names: list[str] | None = None, minutes: float | None = None) -> Results:
    """Run what is not done yet.

    Args:
        output (`Path`): The file of results; may hold some already.
        tiny (`bool`): The small form, on the CPU and in one process.
        names (`list[str]`, *optional*): Which measurements; all if `None`.
        minutes (`float`, *optional*): A measurement is begun only if its budget ends within them.

    Returns:
        [`Results`]

    Raises:
        RuntimeError: If a process could not begin to measure.
    """
    form = "tiny" if tiny else "full"
    deadline = float("inf") if minutes is None else time.time() + 60 * minutes
    results = Results(output, form)
    todo = [m for m in by_name(names) if results.status(m.name) != DONE]
    # what was never tried, or interrupted, comes before what did not end by itself
    todo.sort(key=lambda m: results.status(m.name) in (FAILED, LATE))
    while batch := affordable(todo, deadline - time.time(), tiny):
        batch = batch if tiny else batch[:1]
        before = {m.name: results.data["measurements"].get(m.name) for m in batch}
        results = run_batch(output, form, batch)
        tried = [m for m in batch if results.data["measurements"].get(m.name) != before[m.name]]
        if not tried:
            raise RuntimeError(f"{batch[0].name} could not begin: see what its process has printed above.")
        todo = [m for m in todo if m not in tried]
    for measurement in todo:
        print(f"{measurement.name}: not begun, its budget of {measurement.seconds} s is more than is left")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="make gpu", description="Measure the claims about GPUs; see docs/gpu.md.")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU: whether everything runs")
    parser.add_argument("--minutes", type=float, help="begin only what ends within so many minutes")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=", ".join(m.name for m in MEASUREMENTS))
    parser.add_argument("--output", type=Path, help="the file of results (default: gpu_output/results.json)")
    options = parser.parse_args()
    output = (options.output or OUTPUT / ("tiny.json" if options.tiny else "results.json")).resolve()
    try:
        results = run(output, options.tiny, options.only, options.minutes)
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
    output.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(f"\n{verdicts(results)}\nWritten: {output} and {output.with_suffix('.md')}")
    names = [m.name for m in by_name(options.only)]
    ended = all(results.status(name) in (DONE, None) for name in names)
    # in the small form values mean nothing
    held = options.tiny or all(claim.holds is not False for name in names for claim in results.claims(name))
    sys.exit(0 if ended and held else 1)
