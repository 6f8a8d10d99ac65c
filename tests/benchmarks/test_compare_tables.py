"""benchmarks.compare: tables and figures of finished runs."""

import math

import pytest
from compare_runs import BY_METHOD, Inline, made_up, plan_of

from benchmarks.compare import figures, report, results, tables
from benchmarks.compare.settings import Variant
from benchmarks.compare.variants import LOQT, METHODS
from benchmarks.compare.workers import run_all


def test_tables_hold_mean_and_standard_error(tmp_path):
    path, plan = tmp_path / "runs.jsonl", plan_of([BY_METHOD["full"], LOQT], rates=(0.001, 0.002, 0.004))
    losses = {0: 1.5, 1: 1.25, 2: 1.875}

    def answer(spec):
        diverged = spec["method"] == "loqt" and spec["seed"] == 2
        return made_up(spec, losses[spec["seed"]] + abs(spec["lr"] - 0.002), diverged)

    run_all([plan], path, Inline(answer))
    rows = {line.split(" | ")[0][2:]: line for line in tables.table(plan, results.read(path)).splitlines()[5:9]}

    def slow(figures):
        mean = sum(figures) / len(figures)
        return mean, (sum((f - mean) ** 2 for f in figures) / (len(figures) - 1) / len(figures)) ** 0.5

    mean, error = slow(list(losses.values()))
    assert f"| 0.002 | {mean:.4f} ± {error:.4f} |" in rows["full-rank AdamW"]
    mean, error = slow([math.exp(loss) for loss in losses.values()])
    assert f"| {mean:.2f} ± {error:.2f} |" in rows["full-rank AdamW"]
    assert "| 1,000 | 200 | 30 | 1,230 | 4 |" in rows["full-rank AdamW"]
    mean, error = slow([losses[0], losses[1]])
    assert f"{mean:.4f} ± {error:.4f} (1 of 3 diverged)" in rows["LoQT"]
    # a best rate at the end of its grid is marked
    narrow = plan_of([LOQT], seeds=[0], rates=(0.002, 0.004))
    assert "| 0.002 † |" in tables.table(narrow, results.read(path))


def test_differences_are_to_the_same_seed_rate_and_base_and_switches_before_and_after(tmp_path):
    path, base = tmp_path / "runs.jsonl", {"steps": 3, "lr": 0.1}
    fields = {"compensation_steps": 0}
    variants = [
        LOQT,
        Variant("K = 0", "loqt", fields),
        Variant("base", "loqt", base=base, search=True),
        Variant("base, K = 0", "loqt", fields, base=base, search=True),
    ]
    plan = plan_of(variants, rates=(0.002,), seeds=[0, 1])

    def answer(spec):
        added = (0.5 + spec["seed"]) * (spec["fields"]["compensation_steps"] == 0)
        return made_up(spec, 2.0 + spec["seed"] ** 2 - ("base" in spec) + added)

    run_all([plan], path, Inline(answer))
    found = tables.table(plan, results.read(path))
    # 0.5 and 1.5, and nothing against LoQT itself
    assert tables.difference_rows(plan, results.read(path)) == [
        ("K = 0", "+1.0000 ± 0.5000"),
        ("base, K = 0", "+1.0000 ± 0.5000"),
    ]
    # of two seeds 1/8 and 2/8 at the first, 4/8 and 8/8 on average over the others
    assert found.count("| 0.18750 ± 0.06250 | 0.75000 ± 0.25000 |") == 4


def test_curves_are_means_over_the_seeds_at_the_steps_of_all():
    curves = [[[5, 4.0], [10, 3.0], [15, 2.0]], [[5, 3.0], [10, 2.0]], [[5, 5.0], [10, 4.0], [15, None]]]
    steps, means, errors = figures.mean_curve([{"curve": curve} for curve in curves])
    assert (steps, means) == ([5, 10], [4.0, 3.0])
    # the standard deviation of three figures 1 apart is 1
    assert errors == pytest.approx([3**-0.5] * 2)


def test_figures_are_drawn_of_whatever_there_is(tmp_path):
    path, plan = tmp_path / "runs.jsonl", plan_of(METHODS)
    assert "has ended" in report.write_report(plan, {}, tmp_path)
    assert list(tmp_path.iterdir()) == []
    run_all([plan], path, Inline(lambda spec: made_up(spec, diverged=spec["seed"] == 1)))
    report.write_report(plan, results.read(path), tmp_path)
    parts = ("loss", "memory", "updates")
    assert all((tmp_path / f"methods-tiny-10-{part}.png").stat().st_size > 1000 for part in parts)
