"""benchmarks.compare: what is measured while a method trains."""

import pytest
import torch
from compare_runs import BY_METHOD, TINY, run_tiny, tiny_model, tiny_spec, tokens, trained_model

from benchmarks.compare import measures, methods, training
from benchmarks.compare.settings import NAMES, Variant
from benchmarks.compare.variants import LOQT, with_feedback
from loqt_peft.layers.find import loqt_layers


def test_bytes_are_those_of_a_hand_count():
    hidden, inner, vocabulary, r = 32, 48, TINY.vocabulary, TINY.rank
    rest = 2 * vocabulary * hidden + 3 * hidden
    shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    n = sum(a * b for a, b in shapes)
    small = sum(r * min(shape) for shape in shapes)
    large = sum(r * max(shape) for shape in shapes)
    # rotary frequencies, which transformers holds twice
    rotary = 2 * (hidden // TINY.heads // 2) * 4
    adam = 2 * 4

    counted = {method: run_tiny(tiny_spec(BY_METHOD[method], steps=2))["bytes"] for method in NAMES}
    full = counted["full"]
    assert full["weights"] == 4 * (rest + n) + rotary and full["gradients"] == 4 * (rest + n)
    # AdamW holds a step of 4 bytes for each of its 12 parameters
    assert full["optimizer"] == adam * (rest + n) + 4 * 12
    assert full["host"] == 0

    lora = counted["lora"]
    assert lora["weights"] == 4 * (rest + n + small + large) + rotary
    assert lora["gradients"] == 4 * (rest + small + large)
    assert lora["optimizer"] == adam * (rest + small + large) + 4 * (5 + 14)

    galore = counted["galore"]
    assert galore["weights"] == full["weights"] and galore["gradients"] == full["gradients"]
    # both moments of the projected gradients, and the projections
    assert galore["optimizer"] == adam * (rest + large) + 4 * small
    # and APOLLO a norm of 4 bytes for each of 7 layers
    assert counted["apollo"]["optimizer"] == galore["optimizer"] + 4 * 7

    for method in ("loqt", "loqt-nq"):
        loqt = counted[method]
        assert loqt["gradients"] == 4 * (rest + large)
        assert loqt["optimizer"] == adam * (rest + large) + 4 * (5 + 7)
        assert loqt["host"] == 4 * n
    # each layer also carries a seal and two counters
    seals = counted["loqt-nq"]["weights"] - (4 * (rest + n + small + large) + rotary)
    assert 0 < seals < 7 * 1024
    # in NF4 half a byte an element and 4 bytes for each block of 64, in place of 4 bytes an element
    blocks = sum(-(-a * b // 64) for a, b in shapes) + sum(-(-r * min(shape) // 64) for shape in shapes)
    saved = counted["loqt-nq"]["weights"] - counted["loqt"]["weights"]
    assert saved == 4 * (n + small) - (n + small) // 2 - 4 * blocks
    # the error of W, in NF4 too, lies where the base weights are
    kept = run_tiny(tiny_spec(with_feedback(BY_METHOD["loqt"]), steps=2))["bytes"]
    error = n // 2 + 4 * sum(-(-a * b // 64) for a, b in shapes)
    assert kept == {**counted["loqt"], "host": 4 * n + error}


def test_bytes_of_one_step_are_those_of_many():
    for variant in (
        LOQT,
        BY_METHOD["galore"],
        Variant("8", "loqt", {"r": 16}, optim="adamw_bnb_8bit", per_layer=True),
    ):
        spec = tiny_spec(variant, steps=4)
        assert training.measure_bytes(spec) == run_tiny(spec)["bytes"]


def test_the_most_gradients_that_lay_there_at_once_are_counted():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 8, bias=False))
    counter = measures.ByteCounter(model)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    # the larger gradient comes first, and is gone when the smaller one is there
    model(torch.ones(1, 2)).sum().backward()
    assert counter.bytes["gradients"] == 4 * 16


def test_losses_around_a_switch_differ_by_what_it_loses(monkeypatch):
    gaps = {"update_interval": 2, "interval_schedule": "constant"}
    found = {}
    for method in ("loqt-nq", "loqt"):
        fields = {**gaps, "compensation_steps": 0, "loqt_alpha": 4.0}
        run = found[method] = run_tiny(tiny_spec(Variant("", method, fields), lr=0.05, steps=6))
        assert len(run["updates"]) == 3 and len({update["loss_before"] for update in run["updates"]}) == 3
    for update in found["loqt-nq"]["updates"]:
        assert update["loss_after"] == pytest.approx(update["loss_before"], abs=1e-5)
    assert all(abs(u["loss_after"] - u["loss_before"]) > 1e-4 for u in found["loqt"]["updates"])
    # to look at it changes nothing
    monkeypatch.setattr(measures.SwitchLosses, "_loss", lambda losses, model: 0.0)
    assert run_tiny(found["loqt"]["spec"])["curve"] == found["loqt"]["curve"]


# of each kind of layer, and with a merge
@pytest.mark.parametrize("method", ["full", "lora", "relora", "loqt"])
def test_effective_weights_are_those_that_the_model_computes_with(method):
    model, found = trained_model(tiny_spec(BY_METHOD[method], lr=0.01))
    names = methods.targeted_modules(tiny_model())
    weights = measures.effective_weights(model, names)
    assert set(weights) == set(names)
    dense, others = tiny_model(), {n.removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    for name, parameter in dense.named_parameters():
        layer = name.removesuffix(".weight")
        parameter.data.copy_(weights[layer] if layer in weights else others[name])
    batch = tokens(4)
    torch.testing.assert_close(dense(batch).logits, model(batch).logits, atol=1e-5, rtol=1e-4)
    start = measures.effective_weights(tiny_model(), names)
    changes = [weights[name] - start[name] for name in weights]
    expected = sum(map(measures.effective_rank, changes)) / len(changes)
    assert found["ranks"]["change"] == pytest.approx(expected, rel=1e-4)
    assert 0 < found["ranks"]["change"] < found["ranks"]["before"] < 1


def test_effective_rank_counts_equal_singular_values():
    basis = torch.linalg.qr(torch.randn(12, 8, generator=torch.Generator().manual_seed(0))).Q
    for count in (1, 5, 8):
        assert measures.effective_rank(3 * basis[:, :count] @ basis[:8, :count].T) <= (count + 1e-3) / 8
        equal = torch.zeros(12, 8)
        equal[range(count), range(count)] = 7.0
        assert measures.effective_rank(equal) == pytest.approx(count / 8)
    assert measures.effective_rank(torch.zeros(3, 4)) == 0


@pytest.mark.parametrize("projection", ["svd", "random"])
def test_overlaps_are_those_of_the_subspaces_of_successive_updates(projection):
    projections = []

    class Watch(measures.StopAtDivergence):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            layers = [layer for _, layer in loqt_layers(model)]
            if layers[0].num_updates("default") > len(projections):
                projections.append([layer.projection("default").double() for layer in layers])

    fields = {"projection": projection, "update_interval": 2, "interval_schedule": "constant"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "StopAtDivergence", Watch)
        found = run_tiny(tiny_spec(Variant("", "loqt", fields), steps=7))
    assert len(projections) == 4 and len(found["overlaps"]) == 3
    for old, new, overlap in zip(projections, projections[1:], found["overlaps"], strict=False):
        shares = []
        for P, Q in zip(old, new, strict=True):
            rows = [X if X.shape[0] == 8 else X.T for X in (P, Q)]
            bases = [torch.linalg.qr(X.T).Q for X in rows]
            shares.append(float((bases[0].T @ bases[1]).square().sum()) / 8)
        assert overlap == pytest.approx(sum(shares) / len(shares), rel=1e-3)
    assert not measures.Directions(tiny_model(), []).overlaps
