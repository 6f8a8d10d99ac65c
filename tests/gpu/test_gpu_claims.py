"""`make gpu` in its small form: everything runs from the folder that is carried, is resumed, and its verdicts can fail."""

import ast
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from common import ROOT

from benchmarks.gpu import correctness, kit, memory, runner
from benchmarks.gpu.claims import Claim, at_least, at_most, equal, within
from benchmarks.gpu.plan import MEASUREMENTS, Measurement, affordable, by_name
from benchmarks.gpu.report import markdown, verdicts
from benchmarks.gpu.results import DONE, FAILED, LATE, RUNNING, Results
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.worker import measure


###############################
# All of it
###############################


@pytest.fixture(scope="module")
def carried(tmp_path_factory):
    """The folder that is carried, without wheels."""
    out = tmp_path_factory.mktemp("carried") / "kit"
    texts = tuple(out.parent / name for name in ("training.txt", "validation.txt"))
    for text in texts:
        text.write_text("Four score and seven years ago, our fathers brought forth a nation.\n" * 400)
    kit.make_kit(out, texts, wheels=False)
    return out


def start(folder, output):
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--output", str(output)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def state(output):
    return json.loads(output.read_text())["measurements"] if output.exists() else {}


def test_every_measurement_runs_from_the_carried_folder_and_is_resumed_after_a_kill(carried, tmp_path):
    output = tmp_path / "tiny.json"
    process, deadline = start(carried, output), time.time() + 600
    # in the middle: one has ended, and another is under way
    while {DONE, RUNNING} - {row["status"] for row in state(output).values()}:
        assert process.poll() is None and time.time() < deadline, process.communicate()[0][-3000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = state(output)
    assert len(before) < len(MEASUREMENTS)

    process = start(carried, output)
    printed = process.communicate(timeout=1200)[0]
    assert process.returncode == 0, printed[-3000:]
    after = state(output)
    assert list(after) == [m.name for m in MEASUREMENTS]
    assert all(row["status"] == DONE for row in after.values()), printed[-3000:]
    # what had ended is as it was, what was interrupted began anew
    ended = [name for name in before if before[name]["status"] == DONE]
    assert ended and all(after[name] == before[name] for name in ended)
    interrupted = next(name for name in before if before[name]["status"] == RUNNING)
    assert after[interrupted]["began"] > before[interrupted]["began"]

    results = Results(output, "tiny")
    claims = {m.name: results.claims(m.name) for m in MEASUREMENTS}
    assert all(claims.values())
    # what has nothing to do with speed holds on the CPU too, and nothing was skipped
    assert all(claim.measured is not None for found in claims.values() for claim in found)
    exact = (
        "operations",
        "late_copy",
        "nccl_resume",
        "memory_7b",
        "memory_7b_long",
        "memory_7b_per_layer",
        "memory_13b",
    )
    broken = [claim for name in exact for claim in claims[name] if not claim.holds]
    assert not broken, printed[-6000:]
    written = output.with_suffix(".md").read_text()
    assert results.data["environment"]["torch"] in written
    assert all(claim.name in written and claim.name in printed for found in claims.values() for claim in found)


# what is on a GPU machine or is carried there, and the tests' own files
AT_HAND = {
    "accelerate",
    "benchmarks",
    "bitsandbytes",
    "loqt_peft",
    "packaging",
    "peft",
    "pytest",
    "safetensors",
    "torch",
}
AT_HAND |= {"transformers", "common", "conditions", "gpu_device", "reference"} | sys.stdlib_module_names


@pytest.mark.parametrize("file", [*correctness.SHORT_SUITE, *correctness.DEVICE_TESTS, "tests/conftest.py"])
def test_what_tests_a_gpu_machine_is_carried_and_imports_only_what_it_has(carried, file):
    tree = ast.parse((carried / file).read_text(encoding="utf-8"))
    imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in imported} <= AT_HAND


def test_without_a_device_the_full_form_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is visible")
    with pytest.raises(RuntimeError, match="No CUDA device is visible.*--tiny"):
        Settings()


###############################
# Verdicts
###############################


@pytest.mark.parametrize("factor, holds", [(1.0, True), (0.5, False), (1.5, False)])
def test_a_wrong_prediction_does_not_hold(tmp_path, monkeypatch, factor, holds):
    predict = memory.predict

    def wrong(*args):
        estimate, sizes = predict(*args)
        return estimate, {name: factor * size for name, size in sizes.items()}

    monkeypatch.setattr(memory, "predict", wrong)
    results = Results(tmp_path / "results.json", "tiny")
    measure(by_name(["memory_7b"])[0], results, Settings(tiny=True))
    found = {claim.name: claim for claim in results.claims("memory_7b")}
    assert found["allocated in an update step"].holds is holds
    line = next(line for line in verdicts(results).split("\n") if "memory_7b, allocated in an update step" in line)
    assert line.split("memory_7b")[0].strip() == ("holds" if holds else "DOES NOT HOLD")
    assert ("DOES NOT HOLD" in markdown(results)) is not holds


@pytest.mark.parametrize(
    "claim, holds",
    [
        (equal("a", 0.0, 0.0), True),
        (equal("a", 0.0, 1e-30), False),
        (equal("a", True, False), False),
        (within("a", 100.0, 104.9, 0.05), True),
        (within("a", 100.0, 94.9, 0.05), False),
        (at_most("a", 100.0, 100.0), True),
        (at_most("a", 100.0, 100.1), False),
        (at_most("a", 100.0, 149.0, 0.5), True),
        (at_least("a", 100.0, 99.9), False),
        (at_least("a", 100.0, 51.0, 0.5), True),
        (at_most("a", 100.0, math.nan), False),
        (within("a", math.nan, 1.0, 0.05), False),
        (at_most("a", 100.0, None), None),
        (equal("a", 0, None), None),
    ],
)
def test_verdicts(claim, holds):
    assert claim.holds is holds
    assert claim.verdict == {True: "holds", False: "DOES NOT HOLD", None: "not measured"}[holds]


###############################
# Budgets and results
###############################


def test_ten_minutes_are_enough_for_the_first_half():
    first = affordable(list(MEASUREMENTS), 600)
    assert first == list(MEASUREMENTS[: len(first)]) and 2 * len(first) >= len(MEASUREMENTS)
    # what is too long is passed over
    assert affordable([Measurement("a", "", 50, ""), Measurement("b", "", 20, "")], 30)[0].name == "b"
    with pytest.raises(ValueError, match="'memory_9b' is not a measurement: operations, "):
        by_name(["memory_9b"])


@pytest.mark.parametrize("fault, status, error", [(time.sleep, LATE, "stopped after"), (None, FAILED, "TypeError")])
def test_what_is_late_or_fails_is_written_down_with_what_it_had_found(tmp_path, monkeypatch, fault, status, error):
    def measured(recorder):
        recorder.claim(equal("found in time", 1, 1))
        fault(60)

    monkeypatch.setattr(memory, "memory_7b", measured)
    monkeypatch.setattr("benchmarks.gpu.worker.TINY_SECONDS", 0.3)
    results = Results(tmp_path / "results.json", "tiny")
    measure(by_name(["memory_7b"])[0], results, Settings(tiny=True))
    results = Results(tmp_path / "results.json", "tiny")
    assert results.status("memory_7b") == status and error in results.data["measurements"]["memory_7b"]["error"]
    assert results.claims("memory_7b") == [Claim("found in time", 1, 1, "equal", "", "", True)]
    assert status.upper() in verdicts(results) and error in markdown(results)


STUB = """
import os, signal, sys, time
from pathlib import Path
from benchmarks.gpu.results import Results
for name in sys.argv[3:]:
    results = Results(Path(sys.argv[1]), sys.argv[2])
    results.begin(name)
    if name == "kernels":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "speed_1b":
        time.sleep(600)
    results.end(name, "done")
"""


def test_a_crash_and_a_hang_cost_one_measurement_and_are_tried_again_at_the_end(tmp_path, monkeypatch):
    started = []

    def start(output, form, names):
        started.extend(names)
        return subprocess.Popen(
            [sys.executable, "-c", STUB, str(output), form, *names],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    monkeypatch.setattr(runner, "_start", start)
    monkeypatch.setattr(runner, "GRACE_SECONDS", 2)
    names = ["operations", "kernels", "speed_1b", "suite"]
    monkeypatch.setattr(runner, "by_name", lambda _: [Measurement(name, "", 1, "") for name in names])
    for expected in (names, ["kernels", "speed_1b"]):
        started.clear()
        results = runner.run(tmp_path / "results.json", tiny=False)
        assert started == expected
        assert [results.status(name) for name in names] == [DONE, FAILED, LATE, DONE]
    assert "ended with code -11" in results.data["measurements"]["kernels"]["error"]
    started.clear()
    # no time for any
    runner.run(tmp_path / "results.json", tiny=False, minutes=0.01)
    assert started == []


def test_results_of_another_form_or_machine_are_not_mixed(tmp_path):
    results = Results(tmp_path / "results.json", "tiny")
    results.set_environment({"device": "NVIDIA H100", "torch": "2.11.0", "cores": 16})
    with pytest.raises(ValueError, match="results of the tiny form, and this is the full one"):
        Results(tmp_path / "results.json", "full")
    results.set_environment({"device": "NVIDIA H100", "torch": "2.11.0", "cores": 8})
    with pytest.raises(ValueError, match="device 'NVIDIA H100', now 'NVIDIA H200'"):
        results.set_environment({"device": "NVIDIA H200", "torch": "2.11.0"})


###############################
# The folder to carry
###############################


def test_a_wheel_keeps_the_libraries_that_are_wanted_and_its_record(tmp_path):
    wheel, out = tmp_path / "bitsandbytes-1.whl", tmp_path / "stripped.whl"
    libraries = [
        f"bitsandbytes/libbitsandbytes_{name}.so" for name in ("cpu", "cuda118", "cuda130", "rocm70", "xpu2025")
    ]
    with zipfile.ZipFile(wheel, "w") as file:
        for name in ("bitsandbytes/__init__.py", *libraries, "bitsandbytes-1.dist-info/METADATA"):
            file.writestr(name, name)
        file.writestr("bitsandbytes-1.dist-info/RECORD", "bitsandbytes/__init__.py,,\n")
    kit.strip_wheel(wheel, out, "130")
    with zipfile.ZipFile(out) as file:
        names, record = file.namelist(), file.read("bitsandbytes-1.dist-info/RECORD").decode()
    assert [name for name in names if name.endswith(".so")] == [libraries[0], libraries[2]]
    assert [line.split(",")[0] for line in record.splitlines()] == names
    with pytest.raises(ValueError, match="holds no libbitsandbytes_cuda999.so: it has .*cuda118"):
        kit.strip_wheel(wheel, out, "999")


def test_the_folder_is_complete_small_and_replaces_only_its_like(carried, tmp_path):
    assert kit.check_size(carried) < 10 * 1024**2
    with pytest.raises(ValueError, match="more than the 1000 allowed; largest: "):
        kit.check_size(carried, 1000)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty, and no kit"):
        kit.make_kit(tmp_path, wheels=False)
    assert (tmp_path / "thesis.txt").exists()
    assert kit.pinned("bitsandbytes").startswith("bitsandbytes==")
    subprocess.run(["bash", "-n", str(carried / "run.sh")], check=True)
    about = json.loads((carried / "kit.json").read_text())
    assert about["blocks"]["training"] > 0 and about["texts"] == ["training.txt", "validation.txt"]
