"""Tests, run on the device and, without one, with the versions of its machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from .claims import equal
from .results import Recorder
from .settings import ROOT


DEVICE_TESTS = ["tests/gpu/test_gpu_correctness.py", "tests/gpu/test_cuda.py"]
# what a change of versions breaks first, and needs no package that such a machine lacks; seconds each
SHORT_SUITE = (
    "tests/test_config.py",
    "tests/algorithm/test_schedule.py",
    "tests/test_compat.py",
    "tests/algorithm/test_linear_map.py",
    "tests/algorithm/test_matrices.py",
    "tests/algorithm/test_reference.py",
    "tests/layers/test_capture.py",
    "tests/saving/test_adapter.py",
    "tests/training/test_per_layer.py",
    "tests/training/test_trainer.py",
)


def run_tests(arguments: list[str], **environment: str) -> dict[str, Counter]:
    """Run pytest, and count the outcomes of each test function: "passed", "failed" and "skipped".

    Raises:
        RuntimeError: If no test could be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        surroundings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        ended = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(
                f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}"
            )
        # without what passed
        print(ended.stdout[-6000:] if ended.returncode else ended.stdout.strip().split("\n")[-1], flush=True)
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    outcomes: dict[str, Counter] = {}
    for case in cases:
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes.setdefault(case.get("name").split("[")[0], Counter())[outcome] += 1
    if not outcomes:
        raise RuntimeError(f"No tests were found: {' '.join(command)}\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    return outcomes


def _report(recorder: Recorder, outcomes: dict[str, Counter]) -> None:
    for name, found in outcomes.items():
        recorder.figure(name, dict(found))
        # a test that was skipped shows nothing
        failed = found["failed"] if found["passed"] or found["failed"] else None
        claim = name.removeprefix("test_").replace("_", " ")
        recorder.claim(equal(claim, 0, failed, unit="failures", source=f"{name}: the CPU's result"))


def operations(recorder: Recorder) -> None:
    _report(recorder, run_tests([*DEVICE_TESTS, "-k", "not late"], LOQT_TEST_DEVICE=recorder.settings.device.type))


def late_copy(recorder: Recorder) -> None:
    _report(recorder, run_tests([*DEVICE_TESTS, "-k", "late"], LOQT_TEST_DEVICE=recorder.settings.device.type))


def suite(recorder: Recorder) -> None:
    arguments = list(recorder.settings.pick(SHORT_SUITE, SHORT_SUITE[:2]))
    if find_spec("xdist") and not recorder.settings.tiny:
        arguments += ["-n", "8"]
    outcomes = run_tests(arguments, CUDA_VISIBLE_DEVICES="")
    total = sum(outcomes.values(), Counter())
    failed = [name for name, found in outcomes.items() if found["failed"]]
    recorder.figure("tests", dict(total))
    recorder.figure("failed", failed)
    measured = total["failed"] if total["passed"] or total["failed"] else None
    claim = "the short test suite with this machine's versions, on the CPU"
    recorder.claim(equal(claim, 0, measured, unit="failures", source="the suite with the pinned versions"))
