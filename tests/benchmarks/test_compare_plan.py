"""benchmarks.compare: which runs a study needs, and the queue that works them off."""

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace as Namespace

import pytest
from compare_runs import BY_METHOD, Inline, made_up, plan_of, tokens
from conditions import trainer_keeps_order
from safetensors.torch import save_file

from benchmarks.compare import results, tables
from benchmarks.compare.errors import CompareError
from benchmarks.compare.plan import only_rows
from benchmarks.compare.settings import Variant, key_of
from benchmarks.compare.variants import LOQT, METHODS
from benchmarks.compare.workers import Workers, name_of, run_all


def test_interrupted_anywhere_it_goes_on_where_it_was(tmp_path, monkeypatch):
    whole = Inline()
    run_all([plan_of(METHODS)], tmp_path / "whole.jsonl", whole)
    expected = {key_of(spec) for spec in whole.specs}
    # 3 rates with the first seed, the best with two more
    assert len(expected) == len(whole.specs) == len(METHODS) * (3 + 2)
    # what the progress bar counts, before any rate is known and after
    assert len(plan_of(METHODS).expected({})) == len(expected)
    assert plan_of(METHODS).expected(results.read(tmp_path / "whole.jsonl")) == expected

    path, written = tmp_path / "cut.jsonl", []

    def append(path, run):
        if len(written) % 5 == 4:
            written.append(None)
            raise KeyboardInterrupt
        written.append(key_of(run["spec"]))
        results.append(path, run)

    monkeypatch.setattr("benchmarks.compare.workers.results", Namespace(append=append, read=results.read))
    interrupts = 0
    while True:
        workers, before = Inline(), set(results.read(path))
        try:
            assert run_all([plan_of(METHODS)], path, workers) == []
            break
        except KeyboardInterrupt:
            interrupts += 1
        assert not before & {key_of(spec) for spec in workers.specs}
    assert interrupts > 5
    assert results.read(path).keys() == expected
    assert sorted(filter(None, written)) == sorted(expected)
    again = Inline()
    run_all([plan_of(METHODS)], path, again)
    assert again.specs == []


def test_the_best_rate_is_repeated_and_no_diverged_one(tmp_path):
    losses = {0.001: 3.0, 0.002: 2.0, 0.004: 1.0}

    def answer(spec):
        return made_up(spec, losses[spec["lr"]], diverged=spec["lr"] == 0.004)

    workers = Inline(answer)
    compensated = Variant("K = 0", "loqt", {"compensation_steps": 0})
    plan = plan_of([BY_METHOD["full"], compensated])
    run_all([plan], tmp_path / "runs.jsonl", workers)
    by_kind = {}
    for spec in workers.specs:
        kind = spec["method"] if spec["fields"].get("compensation_steps") != 0 else "ablation"
        by_kind.setdefault(kind, set()).add((spec["lr"], spec["seed"]))
    grid = {(0.001, 0), (0.002, 0), (0.004, 0)}
    assert by_kind["full"] == grid | {(0.002, 1), (0.002, 2)}
    # an ablation runs at LoQT's best rate, for which LoQT's grid is run
    assert by_kind["loqt"] == grid
    assert by_kind["ablation"] == {(0.002, 0), (0.002, 1), (0.002, 2)}


def test_a_method_that_always_diverges_is_told_so(tmp_path):
    path = tmp_path / "runs.jsonl"
    plan = plan_of([BY_METHOD["full"], LOQT])
    run_all([plan], path, Inline(lambda spec: made_up(spec, diverged=spec["method"] == "full")))
    lines = tables.table(plan, results.read(path)).splitlines()
    assert "diverged at every rate" in next(line for line in lines if line.startswith("| full-rank"))
    assert [line for line in lines if line.startswith("| full-rank") and line.endswith("diverged |")]
    assert len(results.read(path)) == 3 + 5


def test_only_the_rows_asked_for_are_run_with_what_decides_on_their_rate(tmp_path):
    compensated = Variant("K = 0", "loqt", {"compensation_steps": 0})
    plans = [plan_of([BY_METHOD["full"], compensated]), plan_of([LOQT])]
    workers = Inline()
    run_all(only_rows(plans, ["K = 0"]), tmp_path / "runs.jsonl", workers)
    specs = [spec for spec in workers.specs if spec["fields"].get("compensation_steps") != 0]
    assert {spec["method"] for spec in workers.specs} == {"loqt"}
    assert len(specs) == 3 and len(workers.specs) == 6
    with pytest.raises(CompareError, match=r"--rows \['K = 1'\]: .*'K = 0', 'LoQT'"):
        only_rows(plans, ["LoQT", "K = 1"])


def test_a_row_with_rates_of_its_own_is_searched_at_these(tmp_path):
    workers = Inline()
    plan = plan_of([replace(LOQT, rates=(0.5, 0.25))])
    plan.rates = None
    run_all([plan], tmp_path / "runs.jsonl", workers)
    assert {spec["lr"] for spec in workers.specs if spec["seed"] == 0} == {0.5, 0.25}
    plan.rates = (0.125,)
    assert [spec["lr"] for spec in plan.grid(plan.variants[0])] == [0.125]


def test_a_result_that_cannot_be_written_ends_the_harness(tmp_path, monkeypatch):
    def full(path, run):
        raise CompareError("No space left on device")

    monkeypatch.setattr(results, "append", full)
    workers = Inline()
    with pytest.raises(CompareError, match="No space left"):
        run_all([plan_of([LOQT])], tmp_path / "runs.jsonl", workers)
    # the repetitions were not begun
    assert len(workers.specs) == 3


@trainer_keeps_order
def test_a_worker_that_dies_is_told_and_the_others_go_on(tmp_path, capsys):
    save_file({"training": tokens(40).int(), "validation": tokens(16).int()}, tmp_path / "blocks")
    workers = Workers(1, tmp_path / "blocks", tmp_path)
    plan = plan_of([BY_METHOD["full"]], seeds=[0], rates=(0.001, 0.002), steps=2)
    first, second = plan.known({})

    def kill():
        while not workers.log(first).exists():
            time.sleep(0.05)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    assert run_all([plan], tmp_path / "runs.jsonl", workers) == [first]
    assert results.read(tmp_path / "runs.jsonl").keys() == {key_of(second)}
    said = capsys.readouterr().err
    assert f"failed: {name_of(first)}" in said and str(workers.log(first)) in said
    workers.close()
