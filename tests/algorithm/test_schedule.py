import pytest

from loqt_peft.algorithm.schedule import UpdateSchedule, staggered_offsets


def slow_update_steps(interval, kind, growth, cap, stop):
    steps, t, i = [], 0, 0
    while t < stop:
        steps.append(t)
        gap = {"exponential": interval + int(growth**i), "linear": interval + int(growth * i), "constant": interval}[
            kind
        ]
        t += gap if cap is None else min(gap, cap)
        i += 1
    return steps


@pytest.mark.parametrize("kind", ["exponential", "linear", "constant"])
@pytest.mark.parametrize("interval, growth, cap", [(100, 1.2, None), (1, 1.0, None), (7, 2.5, 40), (50, 3.0, 30)])
def test_update_steps(kind, interval, growth, cap):
    schedule = UpdateSchedule(interval, kind, growth, cap)
    expected = slow_update_steps(interval, kind, growth, cap, 2000)
    assert schedule.update_steps(2000) == expected
    assert schedule.update_steps(2000, start=500) == [t for t in expected if t >= 500]
    assert [t for t in range(2000) if schedule.is_update_step(t)] == expected


def test_paper_schedule():
    # τ = 100, ψ = 1.2: gaps 101, 101, 101, 101, 102, ...
    assert UpdateSchedule().update_steps(700) == [0, 101, 202, 303, 404, 506, 608]


def test_gaps_beyond_a_float_do_not_overflow():
    assert UpdateSchedule(growth=10.0).gap(1000) > 10**15
    assert UpdateSchedule(growth=10.0, max_interval=200).gap(1000) == 200


def test_smallest_gap():
    for kind, growth in (
        ("exponential", 1.0),
        ("exponential", 1.2),
        ("linear", 0.0),
        ("linear", 3.0),
        ("constant", 1.0),
    ):
        for cap in (None, 5):
            schedule = UpdateSchedule(10, kind, growth, cap)
            steps = schedule.update_steps(500)
            assert schedule.smallest_gap == min(b - a for a, b in zip(steps, steps[1:], strict=False))


def test_staggered_offsets_follow_the_blocks_of_the_model():
    names = ["embed.proj", *(f"model.layers.{i}.{part}" for i in range(5) for part in ("attn.q", "mlp.up")), "head"]
    assert staggered_offsets(names, 100) == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    # 7 blocks over 3 steps
    assert staggered_offsets(names, 3) == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2]
    assert staggered_offsets(names, 1) == [0] * 12
    assert all(max(staggered_offsets(names, limit)) < limit for limit in range(1, 10))
