"""benchmarks.compare: the file of results."""

import json
import os
import resource
import subprocess
from pathlib import Path

import pytest
from compare_runs import Inline, made_up, plan_of, tiny_spec

from benchmarks.common import RESULTS
from benchmarks.compare import results
from benchmarks.compare.errors import CompareError
from benchmarks.compare.settings import LEARNING_RATES, SIZES, Variant, key_of, make_spec
from benchmarks.compare.studies.rest import FULL_AT_10
from benchmarks.compare.variants import LOQT, METHODS, eight_bit, fitted, per_layer, rotated, with_feedback
from benchmarks.compare.workers import run_all


@pytest.mark.parametrize("damage", ["cut", "garbage", "no line break", "other json"])
def test_a_bad_line_is_named_and_nothing_dropped(tmp_path, damage):
    path = tmp_path / "runs.jsonl"
    for seed in range(3):
        results.append(path, made_up(tiny_spec(seed=seed)))
    lines = path.read_text().splitlines(keepends=True)
    bad = {"cut": 3, "garbage": 2, "no line break": 3, "other json": 1}[damage]
    lines[bad - 1] = {
        "cut": lines[2][:100],
        "garbage": "\0\0\0\n",
        "no line break": lines[2].rstrip("\n"),
        "other json": '{"spec": 1}\n',
    }[damage]
    path.write_text("".join(lines))
    with pytest.raises(CompareError) as error:
        run_all([plan_of([LOQT])], path, Inline())
    assert f"{path}, line {bad}:" in str(error.value)
    assert path.read_text() == "".join(lines)
    # the repair that it names
    subprocess.run(str(error.value).rsplit("repeated: ", 1)[1], shell=True, check=True)
    assert len(results.read(path)) == 2


def test_a_full_disk_is_told():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    run = made_up(tiny_spec())
    with pytest.raises(CompareError, match="No space left") as error:
        results.append(Path("/dev/full"), run)
    # the result of minutes is not lost
    assert json.loads(str(error.value).splitlines()[-1]) == run
    with pytest.raises(CompareError, match="no file"):
        results.read(Path("/dev/full"))


def test_a_line_that_was_half_written_is_taken_back(tmp_path):
    path = tmp_path / "runs.jsonl"
    results.append(path, made_up(tiny_spec(seed=0)))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # room for 50 bytes of the line
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, hard))
        with pytest.raises(CompareError, match="cannot be written"):
            results.append(path, made_up(tiny_spec(seed=1)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    results.append(path, made_up(tiny_spec(seed=1)))
    assert len(results.read(path)) == 2


def test_the_kept_runs_are_those_of_todays_rows():
    done = results.read(RESULTS / "compare" / "runs.jsonl")
    text = next(iter(done.values()))["spec"]["text"]
    better = rotated(fitted(per_layer(eight_bit(104)), SIZES["1m"]))
    trained = {"base": {"steps": 1000, "lr": 0.003}}
    rows = [
        *((variant, "1m", None) for variant in METHODS),
        (better, "1m", 0.02),
        (FULL_AT_10, "1m", 0.002),
        (with_feedback(Variant("", "loqt", **trained)), "300k", 0.005),
        (Variant("", "loqt", micro_batches=8, projection_micro_batches=4), "300k", 0.02),
    ]
    for variant, size, rate in rows:
        rates = (rate,) if rate else LEARNING_RATES[variant.method]
        for lr in rates:
            assert key_of(make_spec(variant, size, lr, 0, 1000, text, "float32", "cpu")) in done, variant.name
