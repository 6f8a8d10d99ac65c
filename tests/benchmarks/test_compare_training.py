"""benchmarks.compare: a run, from its spec to its result."""

import hashlib
from dataclasses import replace

import pytest
import torch
from compare_runs import BY_METHOD, TINY, run_tiny, tiny_spec, tokens, trained_model

from benchmarks.compare import measures, results, tables, training
from benchmarks.compare.errors import CompareError
from benchmarks.compare.settings import Variant
from benchmarks.compare.variants import LOQT, METHODS


def test_all_methods_see_the_same_batches():
    spec, blocks = tiny_spec(seed=3), 7
    # 3 steps of 4 blocks are more than the 7 that there are
    order = training.batch_order(blocks, 12, seed=3)
    assert sorted(order[:7].tolist()) == list(range(7))
    expected = hashlib.sha256(tokens(blocks)[order].numpy().tobytes()).hexdigest()[:16]
    # each way to prepare a model; LoQT-nq goes LoQT's
    ways = [variant for variant in METHODS if variant.method != "loqt-nq"]
    for variant in [*ways, Variant("halves", "loqt", micro_batches=2, projection_micro_batches=1)]:
        run = run_tiny(tiny_spec(variant, seed=3), blocks)
        assert run["batches"] == expected, variant.name
    other = run_tiny(tiny_spec(seed=4), blocks)
    assert other["batches"] != expected
    same = {**other, "spec": spec}
    with pytest.raises(CompareError, match="different batches"):
        tables.check_batches([run, same])


def test_a_run_that_diverges_is_recorded(tmp_path):
    # GaLore's decomposition of a gradient that is not finite raises an error
    decomposes = Variant("every step", "galore", {"update_proj_gap": 1})
    for variant, steps in ((BY_METHOD["full"], 6), (BY_METHOD["galore"], 6), (LOQT, 6), (decomposes, 60)):
        run = run_tiny(tiny_spec(variant, lr=1e30, steps=steps))
        assert run["diverged"] and run["loss"] is None and run["steps"] < steps
        results.append(tmp_path / "runs.jsonl", run)
    assert len(results.read(tmp_path / "runs.jsonl")) == 4
    assert run_tiny(tiny_spec(lr=1e-4))["loss"] is not None


@pytest.mark.parametrize("method, rest_rate", [("full", None), ("full", 3.0), ("loqt", None)])
def test_per_layer_updates_hold_one_gradient_and_train_the_same_without_clipping(method, rest_rate, monkeypatch):
    spec = tiny_spec(replace(BY_METHOD[method], rest_rate=rest_rate, per_layer=True), lr=0.01)
    model, freeing = trained_model(spec)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    # with the ordinary optimizer in its place
    monkeypatch.setattr(training, "per_layer_optimizer", training.Trainer.get_optimizer_cls_and_kwargs)
    holding = run_tiny(spec)
    assert freeing["loss"] == holding["loss"]
    assert freeing["bytes"]["gradients"] == 4 * max(sizes) and holding["bytes"]["gradients"] == 4 * sum(sizes)
    del freeing["bytes"]["gradients"], holding["bytes"]["gradients"]
    assert freeing["bytes"] == holding["bytes"]
    assert run_tiny({name: value for name, value in spec.items() if name != "per_layer"})["loss"] != holding["loss"]


def test_a_base_is_trained_at_full_rank_on_text_in_another_order(monkeypatch):
    spec = tiny_spec(Variant("", "loqt-nq", base={"steps": 5, "lr": 0.01}))
    full, _ = trained_model(tiny_spec(BY_METHOD["full"], lr=0.01, steps=5))
    other = training.base_model(spec, tokens(40)).state_dict()
    monkeypatch.setattr(training, "BASE_ORDER", 0)
    same = training.base_model(spec, tokens(40)).state_dict()
    for name, weight in full.state_dict().items():
        assert torch.equal(same[name], weight) and not torch.equal(other[name], weight)
    # and it is what the run starts from
    without = {name: value for name, value in spec.items() if name != "base"}
    assert run_tiny(spec)["curve"] != run_tiny(without)["curve"]


def test_tokens_per_second_are_those_of_all_steps():
    history = [
        {"loss": 1.0, "step": 10, "loqt/tokens_per_second": 100.0},
        {"eval_loss": 1.0, "step": 10},
        {"loss": 1.0, "step": 15, "loqt/tokens_per_second": 50.0},
    ]
    # with 10 tokens a step: 1 second for 100 tokens, and 1 second for 50
    assert training.tokens_per_second(history, 10) == pytest.approx(150 / 2)
    assert training.tokens_per_second(history, 10, excluded=0.5) == pytest.approx(150 / 1.5)


def test_looking_at_switches_is_no_part_of_the_speed(monkeypatch):
    told = []

    def look(losses, model):
        losses.seconds += 100.0
        return 0.0

    monkeypatch.setattr(measures.SwitchLosses, "_loss", look)
    monkeypatch.setattr(training, "tokens_per_second", lambda history, *others: told.append(others))
    run_tiny(tiny_spec(Variant("", "loqt", {"update_interval": 2, "interval_schedule": "constant"}), steps=8))
    # two looks at each of 4 updates
    assert told == [(TINY.batch * TINY.length, 800.0)]
