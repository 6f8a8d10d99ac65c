"""benchmarks.compare: what each method trains."""

from dataclasses import replace

import pytest
import torch
from compare_runs import BY_METHOD, run_tiny, tiny_model, tiny_spec, tokens, trained_model
from peft.tuners.lora import LoraLayer

from benchmarks.compare import methods, training
from benchmarks.compare.relora import merge_and_restart, relora_schedule
from benchmarks.compare.settings import NAMES, Variant
from loqt_peft.layers.find import loqt_layers


@pytest.mark.parametrize("method", NAMES)
def test_every_method_trains_the_layers_and_all_else(method):
    torch.manual_seed(0)
    spec = tiny_spec(BY_METHOD[method])
    model = tiny_model()
    names = {name for name, _ in model.named_parameters()}
    targets = {f"{name}.weight" for name in methods.targeted_modules(model)}
    assert len(targets) == 7
    prepared = methods.prepare(spec, model, tokens(16))
    trained = {n.removeprefix("base_model.model.") for n, p in prepared.model.named_parameters() if p.requires_grad}
    assert names - targets <= trained
    own = trained - names
    if method in ("full", "galore", "apollo"):
        assert trained == names
    else:
        factors = 1 if method.startswith("loqt") else 2
        assert trained & targets == set() and len(own) == 7 * factors
    if "optim_target_modules" in prepared.arguments:
        arguments = training.training_arguments(spec, "unused", prepared.arguments)
        _, kwargs = training.Trainer.get_optimizer_cls_and_kwargs(arguments, prepared.model)
        projected = {id(p) for group in kwargs["params"] if "rank" in group for p in group["params"]}
        # the head is linear, too, and trains at full rank
        assert projected == {id(p) for n, p in prepared.model.named_parameters() if n in targets}


def test_p_is_taken_from_the_last_micro_batches():
    variant = Variant("last", "loqt-nq", {"r": 4}, micro_batches=2, projection_micro_batches=1)
    spec = tiny_spec(variant, steps=1)
    trained, _ = trained_model(spec)
    blocks = tokens(40)[training.batch_order(40, 4, seed=0)]
    energies = {}
    for part, batch in {"last": blocks[2:], "first": blocks[:2], "all": blocks}.items():
        model = tiny_model()
        model(input_ids=batch, labels=batch).loss.backward()
        layer = dict(loqt_layers(trained))["base_model.model.model.layers.0.self_attn.q_proj"]
        G = model.model.layers[0].self_attn.q_proj.weight.grad
        P = layer.loqt_P["default"]
        assert P.shape == (4, 32)
        best = torch.linalg.svdvals(G)[:4].square().sum()
        energies[part] = float((G @ P.T).square().sum() / best)
    assert energies["last"] == pytest.approx(1, abs=1e-4)
    assert energies["first"] < 0.99 and energies["all"] < 0.999


def lora_model():
    model = tiny_model()
    return methods.add_lora(model, {"r": 4, "lora_alpha": 8})


def test_relora_merges_without_changing_the_model_and_forgets_its_states():
    torch.manual_seed(0)
    model, batch = lora_model(), tokens(4)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    for _ in range(3):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = model(input_ids=batch).logits.detach()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    factors = [factor["default"].weight for layer in layers for factor in (layer.lora_A, layer.lora_B)]
    old = [factor.detach().clone() for factor in factors]
    weights = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    assert all(factor in optimizer.state for factor in factors)
    merge_and_restart(model, optimizer)
    torch.testing.assert_close(model(input_ids=batch).logits, before, rtol=1e-4, atol=1e-5)
    assert all(not layer.lora_B["default"].weight.any() for layer in layers)
    assert all(not torch.equal(factor, was) for factor, was in zip(factors, old, strict=True))
    changed = [not torch.equal(layer.get_base_layer().weight, w) for layer, w in zip(layers, weights, strict=True)]
    assert all(changed)
    held = {id(p) for p in optimizer.state}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in set(map(id, factors))]
    assert held == set(map(id, rest))


def test_relora_warms_up_again_after_each_restart():
    def schedule(make):
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        made, rates = make(optimizer), []
        for _ in range(40):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            made.step()
        return rates

    kind, options = "cosine_with_min_lr", {"min_lr_rate": 0.1}
    rates = schedule(lambda o: relora_schedule(o, kind, 4, 40, options, every=10, again=3))
    plain = schedule(lambda o: training_scheduler(o, kind, 4, 40, options))
    assert rates[:10] == plain[:10]
    for restart in (10, 20, 30):
        assert rates[restart] == 0
        assert 0 < rates[restart + 1] < rates[restart + 2] < rates[restart + 3]
        assert rates[restart + 3 : restart + 10] == plain[restart + 3 : restart + 10]
    # and the run uses it
    run = run_tiny(tiny_spec(BY_METHOD["relora"], steps=8))
    assert [update["step"] for update in run["updates"]] == [2, 4, 6]


def training_scheduler(optimizer, kind, warmup, steps, options):
    from transformers import get_scheduler

    return get_scheduler(kind, optimizer, warmup, steps, scheduler_specific_kwargs=options)


@pytest.mark.parametrize("method", ["full", "lora", "loqt"])
def test_the_rest_trains_at_its_factor_of_the_scheduled_rate(method, monkeypatch):
    seen = {}

    class Watch(training.StopAtDivergence):
        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            names = {id(p): name for name, p in model.named_parameters()}
            rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
            seen[state.global_step] = rates, {name for name, p in model.named_parameters() if p.requires_grad}

    monkeypatch.setattr(training, "StopAtDivergence", Watch)
    run_tiny(tiny_spec(replace(BY_METHOD[method], rest_rate=3.0), steps=9))
    for number in (3, 8):
        rates, trainable = seen[number]
        assert set(rates) == trainable
        matrices = {n for n in trainable if {"full": "proj", "lora": "lora_", "loqt": "loqt_B"}[method] in n}
        assert {n for n in rates if rates[n] == max(rates.values())} == trainable - matrices
        assert len(matrices) == (14 if method == "lora" else 7)
        assert min(rates.values()) == pytest.approx(max(rates.values()) / 3)
    assert seen[3][0] != seen[8][0]


def test_the_rest_at_the_rate_itself_is_the_trainers_own_optimizer():
    plain, same, other = (
        run_tiny(tiny_spec(replace(BY_METHOD["full"], rest_rate=rate)))["loss"] for rate in (None, 1.0, 3.0)
    )
    assert plain == same != other
