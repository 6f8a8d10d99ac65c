"""Two processes with gloo, started as a user would start them."""

import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from common import TESTS, loqt_config, make_trainer, tiny_llama, token_batch, train_steps
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

from loqt_peft import LoQTTrainerCallback
from loqt_peft.layers.find import loqt_layers
from loqt_peft.training import distributed
from loqt_peft.training.distributed import ignored_by_ddp, tell_ddp


def run(output_dir, processes, batch_size, accumulation, update_mode, projection):
    output_dir.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    if processes == 1:
        launcher = [sys.executable]
    settings = [str(batch_size), str(accumulation), update_mode, projection]
    command = [*launcher, "ddp_worker.py", str(output_dir), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return [load_file(output_dir / f"rank{rank}.safetensors") for rank in range(processes)]


@pytest.mark.parametrize(
    "accumulation, update_mode, projection, captured",
    [(1, "stagger", "randomized", 7), (2, "backward", "randomized", 14), (1, "backward", "random", 0)],
)
def test_processes_end_with_the_same_bits_and_the_global_gradient(
    tmp_path, accumulation, update_mode, projection, captured
):
    first, second = run(tmp_path / "two", 2, 4, accumulation, update_mode, projection)
    assert all(sum(name in key for key in first) == 14 for name in ("loqt_weight", "loqt_error"))
    gradients = {key: run.pop(key) for run in (first, second) for key in list(run) if key.startswith("gradient.")}
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)

    # the other modes of a process by itself leave no gradient to look at
    (alone,) = run(tmp_path / "one", 1, 8, accumulation, "whole", projection)
    assert len(gradients) == captured
    for key, gradient in gradients.items():
        assert torch.linalg.norm(gradient - alone[key]) <= 1e-5 * torch.linalg.norm(alone[key])
    assert first["tokens_per_second"].tolist() == alone["tokens_per_second"].tolist() != []
    if projection == "random":
        projections = [key for key in first if "loqt_P" in key]
        assert len(projections) == 14
        assert all(torch.equal(first[key], alone[key]) for key in projections)


class Processes:
    """Stands in for torch.distributed, as process `rank` of 2 sees it; writes down what happens in which order."""

    ReduceOp = dist.ReduceOp

    def __init__(self, rank):
        self.rank, self.log = rank, []

    is_available = is_initialized = staticmethod(lambda: True)
    get_world_size = staticmethod(lambda: 2)

    def get_rank(self):
        return self.rank

    def all_reduce(self, tensor, op):
        pass

    def broadcast(self, tensor, src):
        if self.log[-1] != f"broadcast from {src}":
            self.log.append(f"broadcast from {src}")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("projection", ["randomized", "random"])
def test_processes_work_on_layers_at_the_same_time(monkeypatch, rank, projection):
    processes = Processes(rank)
    compute_switch = distributed.compute_switch

    def compute(layer, *args):
        processes.log.append("work")
        return compute_switch(layer, *args)

    model = get_peft_model(tiny_llama(num_hidden_layers=1), loqt_config(projection=projection)).train()
    model.begin_step(0)
    model(input_ids=token_batch(), labels=token_batch()).loss.backward()
    monkeypatch.setattr(distributed, "dist", processes)
    monkeypatch.setattr(distributed, "compute_switch", compute)
    layers = [layer for _, layer in loqt_layers(model)]
    assert {layer for layer, _ in distributed.switches(layers, "default")} == set(layers)

    # 7 layers, 3 of which are larger; process 0 has two of these, and process 1 one layer more
    a_round = ["work", "broadcast from 0", "broadcast from 1"]
    assert processes.log == a_round * 3 + (["work", "broadcast from 1"] if rank == 1 else [])


def test_a_layer_that_is_broken_on_several_processes_counts_once(monkeypatch):
    class Equals(Processes):
        """The other process has the same values."""

        def all_reduce(self, tensor, op):
            tensor.copy_(torch.stack([tensor, tensor]).sum(0) if op == dist.ReduceOp.SUM else tensor)

    model = get_peft_model(tiny_llama(num_hidden_layers=1), loqt_config()).train()
    model.begin_step(0)
    (model(input_ids=token_batch(), labels=token_batch()).loss * float("inf")).backward()
    monkeypatch.setattr(distributed, "dist", Equals(0))
    assert distributed.not_finite(list(loqt_layers(model)), "default") == 7


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def drifted():
    model = get_peft_model(tiny_llama(), loqt_config(retain_base="cpu", error_feedback=True))
    train_steps(model, 1)
    return model


def offload(model):
    """Put what is on the host of a model on a device on `meta`, which stands for a second type of device."""
    for _, layer in loqt_layers(model):
        base_layer = layer.get_base_layer()
        base_layer.weight = nn.Parameter(base_layer.weight.to("meta"), requires_grad=False)
        layer.loqt_error["default"] = layer.loqt_error["default"].to("meta")


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, **kwargs):
        return self.inner(**kwargs)


def as_peft_model(model):
    return model


def inside_another_module(model):
    return Wrapper(model)


def injected(model):
    # what transformers' `add_adapter` leaves: LoQT layers in a model that is none of PEFT's
    return model.get_base_model()


@pytest.mark.parametrize("build", [as_peft_model, inside_another_module, injected])
def test_ddp_takes_a_model_with_an_offloaded_base(one_process, tmp_path, build):
    model = build(drifted())
    # as the Trainer does it: before a checkpoint is loaded
    make_trainer(model, tmp_path, [LoQTTrainerCallback()])
    offload(model)

    parallel = nn.parallel.DistributedDataParallel(model)
    elsewhere = {
        name
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
        if tensor.device.type == "meta"
    }
    buffers = {name for name, _ in model.named_buffers() if ".loqt_" in name}
    assert len(elsewhere) == 28 and parallel.parameters_to_ignore == elsewhere | buffers
    parallel.train()(input_ids=token_batch(), labels=token_batch()).loss.backward()
    gradients = [layer.loqt_B["default"].grad for _, layer in loqt_layers(model)]
    assert all(gradient.any() for gradient in gradients)


def test_ddp_makes_a_base_on_the_device_equal_on_all_processes():
    model = drifted()
    assert not any(name.endswith("base_layer.weight") for name in ignored_by_ddp(model))
    assert set(model._ddp_params_and_buffers_to_ignore) == set(ignored_by_ddp(model))


def test_ddp_leaves_alone_what_a_module_has_named_itself():
    module = Wrapper(get_peft_model(tiny_llama(), loqt_config()))
    module._ddp_params_and_buffers_to_ignore = ["another"]
    for _ in range(2):
        tell_ddp(module)
    assert list(copy.deepcopy(module)._ddp_params_and_buffers_to_ignore) == ["another", *ignored_by_ddp(module)]
