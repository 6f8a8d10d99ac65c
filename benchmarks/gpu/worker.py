"""The process that measures: runs the named measurements one after the other and writes down what each finds.

    python -m benchmarks.gpu.worker OUTPUT FORM NAME...

Started by runner.py, in the full form once for each measurement, so that nothing is left on the device by the last one and a
crash costs one measurement.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .plan import TINY_SECONDS, Measurement, by_name
from .results import DONE, FAILED, LATE, Recorder, Results
from .settings import Settings, versions


class OutOfTime(Exception):
    """A measurement has used up its budget."""


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver and versions."""
    found = {"device": platform.processor() or platform.machine(), "driver": None, "memory_bytes": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = {"device": properties.name, "driver": _driver(), "memory_bytes": properties.total_memory}
    return {**found, "cuda": torch.version.cuda, "cores": os.cpu_count(), **versions()}


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.split("\n")[0].strip()


@contextmanager
def _budget(seconds: float) -> Iterator[None]:
    def stop(*_):
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def measure(measurement: Measurement, results: Results, settings: Settings) -> None:
    """Run one measurement; whatever goes wrong in it is written down with the rest."""
    results.begin(measurement.name)
    print(f"{measurement.name}: {measurement.what}", flush=True)
    module, function = measurement.place.split(":")
    status, error = DONE, ""
    try:
        with _budget(TINY_SECONDS if settings.tiny else measurement.seconds):
            getattr(importlib.import_module(f".{module}", __package__), function)(
                Recorder(results, measurement.name, settings)
            )
    except OutOfTime as late:
        status, error = LATE, str(late)
    except Exception:
        status, error = FAILED, traceback.format_exc()
        print(error, file=sys.stderr, flush=True)
    results.end(measurement.name, status, error)


def _end_with_parent(pipe: int) -> None:
    # the runner holds the other end: where it was killed, nobody may go on writing to its file
    os.read(pipe, 1)
    if os.getpgrp() == os.getpid():
        # with what it has started
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("form", choices=("full", "tiny"))
    parser.add_argument("names", nargs="+")
    options = parser.parse_args()
    # what is started from here must not hold it
    pipe = os.dup(sys.stdin.fileno())
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    try:
        settings = Settings(tiny=options.form == "tiny")
        results = Results(options.output, options.form)
        results.set_environment(environment(settings.device))
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))
    for measurement in by_name(options.names):
        measure(measurement, results, settings)


if __name__ == "__main__":
    main()
