"""`projection="random"`: an update takes no gradient of a weight, and is otherwise the update of the paper."""

import json
import warnings

import pytest
import torch
from common import loqt_config, make_trainer, tiny_llama, token_batch, train_steps
from peft import get_peft_model
from torch import nn

from loqt_peft import LoQTTrainerCallback
from loqt_peft.algorithm.compensation import compensate
from loqt_peft.algorithm.projection import random_projection
from loqt_peft.layers.capture import GradientCapture
from loqt_peft.layers.find import loqt_layers
from loqt_peft.training import distributed


def random_model(**fields):
    return get_peft_model(tiny_llama(), loqt_config(projection="random", **fields))


def run_step(model, optimizer, number):
    model.train()
    due = model.begin_step(number, lambda: True)
    tokens = token_batch(number)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return due


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "loqt_" in name}


def test_the_update_is_the_papers_with_directions_that_were_drawn():
    model = random_model(update_interval=2)
    optimizer = adamw(model)
    for number in range(5):
        due = run_step(model, optimizer, number)
        expected = {}
        for name, layer in loqt_layers(model) if due else ():
            P = random_projection(layer.shape, layer.r["default"], layer.projection_seed("default"))
            storage = layer.projection_format("default")
            new = compensate(
                layer.effective_weight("default"),
                storage.unpack(storage.pack(P)),
                layer.weight_format("default"),
                layer.scaling["default"],
                5,
                torch.float32,
            )
            expected[name] = new.weight, storage.pack(P), new.B
        update = model.end_step(optimizer)
        optimizer.zero_grad()
        assert (update is not None) == due == (number % 2 == 0)
        for name, layer in loqt_layers(model) if due else ():
            found = layer.loqt_weight["default"], layer.loqt_P["default"], layer.loqt_B["default"]
            assert all(torch.equal(a, b) for a, b in zip(found, expected[name], strict=True)), name


def test_no_gradient_of_a_weight_is_formed_and_nothing_more_is_saved_for_it(monkeypatch):
    def formed(*args):
        raise AssertionError

    monkeypatch.setattr(GradientCapture, "add", formed)
    monkeypatch.setattr(distributed, "project_gradient", formed)
    model = random_model(update_interval=3)
    optimizer = adamw(model)
    saved = {}
    for number in range(5):
        saved[number] = 0

        def pack(tensor, number=number):
            saved[number] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            due = run_step(model, optimizer, number)
        assert due == (number in (0, 3))
        assert (model.end_step(optimizer) is not None) == due
        optimizer.zero_grad()
    # step 0 runs on the base weights
    assert saved[1] == saved[2] == saved[3] == saved[4]


def test_all_ways_to_bound_the_memory_of_gradients_are_the_same():
    def trained(**fields):
        torch.manual_seed(0)
        model = random_model(update_interval=2, **fields)
        train_steps(model, 5)
        return state(model)

    first = trained()
    for fields in (
        {"update_mode": "whole"},
        {"offload_gradients": False},
        {"update_mode": "whole", "offload_gradients": True},
    ):
        assert all(torch.equal(tensor, first[name]) for name, tensor in trained(**fields).items())


def test_b_that_is_not_finite_postpones_the_update_and_changes_nothing():
    model = random_model(update_interval=10)
    optimizer = adamw(model)
    run_step(model, optimizer, 0)
    model.end_step(optimizer)
    optimizer.zero_grad()
    run_step(model, optimizer, 10)
    (_, first), *_ = loqt_layers(model)
    kept = first.loqt_B["default"].detach().clone()
    first.loqt_B["default"].data[0, 0] = float("nan")
    before = state(model)
    with pytest.warns(UserWarning, match="matrix B of 1 of 14 LoQT layers is not finite"):
        assert model.end_step(optimizer) is None
    for name, tensor in state(model).items():
        if "loqt_state" not in name:
            assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name
    first.loqt_B["default"].data.copy_(kept)
    optimizer.zero_grad()
    assert run_step(model, optimizer, 11)
    assert model.end_step(optimizer).num_updates == 2


def test_a_layer_that_did_not_run_is_updated_without_a_warning():
    class TwoPaths(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.expert = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

        def forward(self, x):
            return self.used(x)

    model = get_peft_model(
        TwoPaths(), loqt_config(r=4, task_type=None, target_modules=["used", "expert"], projection="random")
    )
    optimizer = adamw(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.begin_step(0)
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        assert model.end_step(optimizer).gradient_energy is None
    expert = model.base_model.model.expert
    P = expert.projection("default")
    assert torch.linalg.matrix_rank(P) == 4
    error = torch.linalg.norm(expert.effective_weight("default") - expert.base_layer.weight)
    assert error <= 0.15 * torch.linalg.norm(expert.base_layer.weight)


def test_logs_have_no_figure_of_a_gradient_that_was_not_taken(tmp_path):
    trainer = make_trainer(random_model(update_interval=2), tmp_path, [LoQTTrainerCallback()], max_steps=4)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loqt/updates" in entry]
    assert [entry["step"] for entry in entries] == [1, 3]
    assert all("loqt/gradient_energy" not in entry and entry["loqt/seconds"] > 0 for entry in entries)
    json.dumps(trainer.state.log_history, allow_nan=False)
