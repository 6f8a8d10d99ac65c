"""benchmarks/pretraining/candidates.py: each candidate against its definition."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace as Namespace
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.functional import get_4bit_type
from peft import get_peft_model
from torch import nn
from transformers import TrainerCallback


sys.path.insert(0, str(Path(__file__).parents[1]))
import loqt_peft.layer
from benchmarks.pretraining import training
from benchmarks.pretraining.candidates import (
    CANDIDATES,
    AlignedBasis,
    Candidate,
    Mixed,
    MuonWithAdamW,
    RandomBasis,
    RunningAverage,
    Sweep,
    WhenItPays,
    make_candidate,
    stochastically_rounded,
)
from benchmarks.pretraining.settings import SIZES, Variant, key_of, make_spec, recipe, rest
from loqt_peft import LoQTConfig
from loqt_peft.layer import LoQTLayer
from loqt_peft.projection import project, random_projection
from loqt_peft.quantization import FourBitFormat
from loqt_peft.update import begin_step, end_step


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def adapted(**fields):
    torch.manual_seed(0)
    fields = {"r": 8, "update_interval": 1, "interval_schedule": "constant", **fields}
    return get_peft_model(TwoLayers(), LoQTConfig(target_modules=["up", "down"], **fields))


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, LoQTLayer)]


def step(model, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    x, y = (torch.randn(32, 64, generator=generator) for _ in range(2))
    begin_step(model, number)
    (model(x) - y).square().mean().backward()
    optimizer.step()
    update = end_step(model, optimizer)
    optimizer.zero_grad()
    return update


def trained(candidate, steps=4, **fields):
    model = adapted(**fields)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    with candidate.applied():
        for number in range(steps):
            step(model, optimizer, number)
    return model


def state(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "loqt" in name}


def test_the_plain_candidate_changes_nothing_and_nothing_stays_patched():
    before = loqt_peft.layer.project, loqt_peft.layer.compensate, LoQTLayer.compute_switch
    plain, patched = state(trained(Candidate())), state(trained(make_candidate(None)))
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for number in range(4):
        step(model, optimizer, number)
    without = state(model)
    for other in (plain, patched):
        assert all(torch.equal(other[name], tensor) for name, tensor in without.items())
    with pytest.raises(RuntimeError), Mixed().applied():
        raise RuntimeError
    assert before == (loqt_peft.layer.project, loqt_peft.layer.compensate, LoQTLayer.compute_switch)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_stochastic_rounding_gives_a_neighbour_and_the_weight_on_average(quant_type):
    torch.manual_seed(0)
    block = torch.randn(64)
    W = block.repeat(40_000, 1)
    rounded = stochastically_rounded(W, quant_type, torch.Generator().manual_seed(0))
    levels = get_4bit_type(quant_type, device="cpu").float().sort().values * block.abs().max()
    above = torch.searchsorted(levels, block.contiguous()).clamp(1, 15)
    low, high = levels[above - 1], levels[above]
    assert bool(((rounded == low) | (rounded == high)).all())
    # five standard errors at most
    spread = ((high - block) * (block - low)).clamp_min(0).sqrt() / len(W) ** 0.5
    assert bool(((rounded.mean(0) - block).abs() <= 5 * spread + 1e-5).all())
    storage = FourBitFormat((64, 64), quant_type)
    some = rounded[:64].contiguous()
    torch.testing.assert_close(storage.unpack(storage.pack(some)), some, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
@pytest.mark.parametrize("share, leading", [(0.0, 0), (0.5, 8), (1.0, 16)])
def test_a_mixed_projection_spans_the_leading_vectors_and_random_ones(shape, share, leading):
    torch.manual_seed(0)
    G = torch.randn(shape)
    layer = Namespace(loqt_B={"default": None}, projection_seed=lambda adapter_name: 3)
    P = Mixed(share).project(layer, G, 16, "svd")
    rows = P if shape[1] <= shape[0] else P.T
    torch.testing.assert_close(rows @ rows.T, torch.eye(16), atol=1e-5, rtol=0)
    sources = [*([project(G, leading, "svd")] if leading else []), random_projection(shape, 16, 3)]
    basis = torch.cat([X if shape[1] <= shape[0] else X.T for X in sources])
    if leading:
        torch.testing.assert_close(basis[:leading] @ rows.T @ rows, basis[:leading], atol=1e-4, rtol=0)
    # the others lie in the span of both
    both = torch.linalg.qr(basis.T).Q
    torch.testing.assert_close(rows @ both @ both.T, rows, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_random_basis_spans_the_same_with_no_singular_vector_of_its_own(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    layer = Namespace(loqt_B={"default": None}, projection_seed=lambda adapter_name: 3)
    vectors, P = project(G, 8, "svd"), RandomBasis().project(layer, G.clone(), 8, "svd")
    if shape[0] < shape[1]:
        vectors, P = vectors.T, P.T
    inner = P @ vectors.T
    torch.testing.assert_close(P @ P.T, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(inner @ vectors, P, atol=1e-5, rtol=0)
    # none of the new directions is an old one
    assert inner.abs().max() < 0.9


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_an_aligned_basis_spans_random_directions_and_sees_an_orthogonal_gradient(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    layer = Namespace(loqt_B={"default": None}, projection_seed=lambda adapter_name: 3)
    random, P = random_projection(shape, 8, 3), AlignedBasis().project(layer, G.clone(), 8, "svd")
    if shape[0] < shape[1]:
        random, P, G = random.T, P.T, G.T
    torch.testing.assert_close(P @ P.T, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(P @ random.T @ random, P, atol=1e-5, rtol=0)
    seen = G @ P.T
    torch.testing.assert_close(seen.T @ seen, torch.diag(seen.square().sum(0)), atol=1e-4, rtol=0)


def test_a_sweep_has_trained_every_direction_before_one_comes_back():
    candidate, layers = Sweep(), layers_of(adapted())
    for number, layer in enumerate(layers):
        drawn = [candidate.draw(layer, layer.shape, 24, 10 * number + update, "cpu") for update in range(8)]
        rows = torch.cat([P if layer.right else P.T for P in drawn])
        # 8 times 24 directions are 3 times all 64
        for turn in rows.split(64):
            torch.testing.assert_close(turn @ turn.T, torch.eye(64), atol=1e-5, rtol=0)
    first, second = (candidate.directions[layer] for layer in layers)
    assert not torch.allclose(first.abs(), second.abs(), atol=0.1)


def test_random_directions_are_drawn_by_the_candidate():
    with mock.patch.object(Sweep, "draw", autospec=True, side_effect=Sweep.draw) as draw:
        trained(Sweep(), projection="random")
    assert draw.call_count == 2 * 4


def test_the_running_average_is_that_of_its_definition():
    torch.manual_seed(0)
    layers, gradients = layers_of(adapted()), torch.randn(3, 128, 64)
    candidate, average = RunningAverage(0.5), torch.zeros(128, 64)
    for G in gradients:
        average = 0.5 * average + G
        for layer in layers:
            given = G.clone()
            assert torch.equal(candidate.project(layer, given, 8, "svd"), project(average, 8, "svd"))
            assert torch.equal(given, G)


def test_power_iterations_from_the_old_projection_find_the_singular_vectors():
    candidate, model = make_candidate({"name": "warm_start"}), adapted(quantize_projection=None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    gradients = []
    for layer in layers_of(model):
        U, S, V = torch.linalg.svd(torch.randn(layer.shape), full_matrices=False)
        S[8:] *= 0.25 * S[7] / S[8]
        gradients.append(U @ torch.diag(S) @ V)
        # there are no old directions before the first update
        assert torch.equal(candidate.project(layer, gradients[-1], 8, "svd"), project(gradients[-1], 8, "svd"))
    step(model, optimizer, 0)
    for layer, G in zip(layers_of(model), gradients, strict=True):
        exact, wrong = project(G, 8, "svd"), []
        for _ in range(4):
            P = candidate.project(layer, G, 8, "svd")
            inner, overlap = (P @ P.T, P @ exact.T) if layer.right else (P.T @ P, P.T @ exact)
            assert torch.allclose(inner, torch.eye(8), atol=1e-5)
            wrong.append(8 - float(overlap.square().sum()))
            layer.loqt_P["default"] = layer.projection_format("default").pack(P)
        # squared sines of the angles, whose tangents become a sixteenth
        assert all(new < old for old, new in pairwise(wrong)) and wrong[2] < wrong[1] / 50 and wrong[3] < 1e-4, wrong


def test_an_update_pays_from_the_ratio_on_that_was_asked_for():
    candidate, model = WhenItPays(), adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    assert candidate.pays(model)
    with candidate.applied():
        step(model, optimizer, 0)
        before = [layer.effective_weight("default") for layer in layers_of(model)]
        left = [start[1] for start in (candidate.start[layer] for layer in layers_of(model))]
    generator = torch.Generator().manual_seed(0)
    for layer in layers_of(model):
        B = layer.loqt_B["default"]
        B.data += 0.1 * torch.randn(B.shape, generator=generator)
    learned = sum(
        float((layer.effective_weight("default") - W).square().sum())
        for layer, W in zip(layers_of(model), before, strict=True)
    )
    ratio = (learned / float(sum(left))) ** 0.5
    for factor, pays in ((0.99, True), (1.01, False)):
        candidate.ratio = factor * ratio
        assert candidate.pays(model) is pays


def spec_of(variant, steps=9, lr=0.005):
    return make_spec(variant, "tiny", lr, 0, steps, "text", "float32", "cpu")


def run(spec):
    size = SIZES["tiny"]
    tokens = torch.randint(size.vocabulary, (52, size.length), generator=torch.Generator().manual_seed(0))
    return training.run(spec, tokens[:36], tokens[36:])


GAPS = {"update_interval": 2, "interval_schedule": "constant"}


@pytest.mark.parametrize("ratio, steps", [(0.0, [1, 3, 5, 7]), (1e9, [1])])
def test_an_update_that_does_not_pay_does_not_take_place(ratio, steps):
    description = {"name": "when_it_pays", "ratio": ratio}
    found = run(spec_of(Variant("", "loqt", GAPS, candidate=description), steps=8))
    assert [update["step"] for update in found["updates"]] == steps


def test_muon_and_adamw_are_torchs_own_at_the_scheduled_rate():
    def parameters():
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((16, 8), (8, 16), (10,))]

    ours, reference = parameters(), parameters()
    combined = MuonWithAdamW(ours[:2], ours[2:], 0.01, (0.9, 0.99), 1e-8)
    # it loads the optimizer's own state into it
    prepared = Accelerator(cpu=True).prepare(combined)
    schedule = torch.optim.lr_scheduler.LambdaLR(combined, lambda n: 1 / (n + 1))
    muon = torch.optim.Muon(reference[:2], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(reference[2:], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    for number in range(4):
        for both in (ours, reference):
            generator = torch.Generator().manual_seed(number)
            for parameter in both:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        prepared.step()
        schedule.step()
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = 0.01 / (number + 1)
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))
    states = [len(combined.state[p]) for p in ours]
    assert states == [1, 1, 3]


@pytest.mark.parametrize("method", ["full", "lora", "loqt"])
def test_the_rest_trains_at_its_factor_of_the_scheduled_rate(method):
    def loss(candidate):
        return run(spec_of(Variant("", method, candidate=candidate), lr=0.002))["loss"]

    plain = loss(None)
    assert loss({"name": "rate_of_the_rest", "factor": 1.0}) == plain
    assert loss({"name": "rate_of_the_rest", "factor": 3.0}) != plain
    seen = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            names = {id(p): name for name, p in model.named_parameters()}
            rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
            seen[state.global_step] = {name for name, rate in rates.items() if rate == max(rates.values())}, rates

    spec = spec_of(Variant("", method, candidate={"name": "rate_of_the_rest", "factor": 3.0}))
    prepared = training.prepare(spec, training.llama(32, 1, 48, 320, heads=2, positions=16))
    prepared.callbacks.append(Watch())
    with mock.patch.object(training, "prepare", lambda *_: prepared):
        run(spec)
    trainable = {name for name, p in prepared.model.named_parameters() if p.requires_grad}
    for number in (3, 8):
        highest, rates = seen[number]
        assert set(rates) == trainable
        matrices = {n for n in trainable if {"full": "proj", "lora": "lora_", "loqt": "loqt_B"}[method] in n}
        assert highest == trainable - matrices and len(matrices) == (14 if method == "lora" else 7)
        assert min(rates.values()) == pytest.approx(max(rates.values()) / 3)
    assert seen[3][1] != seen[8][1]


def test_every_row_of_the_studies_is_another_run_and_trains():
    size = SIZES["tiny"]

    def device_bytes(variant):
        # no more than the paper's rank: at the largest there is, the s that fits would be the paper's
        return variant.fields.get("r", size.rank)

    variants = list({v.name: v for study in (recipe, rest) for v in study(size, device_bytes)}.values())
    assert {v.candidate["name"] for v in variants if v.candidate} == set(CANDIDATES)
    assert len({key_of(spec_of(variant)) for variant in variants}) == len(variants)
    losses = {}
    for variant in variants:
        if variant.candidate:
            fields = {**variant.fields, **(GAPS if variant.method == "loqt" else {})}
            found = run(spec_of(replace(variant, fields=fields, optim=None)))
            assert found["steps"] == 9 and bool(found["updates"]) == (variant.method == "loqt")
            losses[variant.name] = found["loss"]
    # none of them is the same as another, or as what it is compared with
    losses["LoQT"] = run(spec_of(Variant("", "loqt", GAPS)))["loss"]
    assert len(set(losses.values())) == len(losses)
