"""Run by test_many_processes.py, once for each of two processes: what DDP has to do right in an update step."""

import os
import sys
import time
import weakref
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from common import loqt_config, tiny_llama, token_batch
from peft import get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loqt_peft.layers.capture import GradientCapture
from loqt_peft.layers.find import loqt_layers
from loqt_peft.training import distributed, reduction
from loqt_peft.training.ownership import owners


RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Recorded:
    """What the captures of this process are given in a `with` block: a copy of each, and how many bytes live on."""

    def __init__(self, model):
        self.names = {layer.capture: name for name, layer in loqt_layers(model)}
        self.local, self.alive, self.peak = {}, [], 0

    def bytes_alive(self):
        return sum(tensor.nbytes for tensor in (reference() for reference in self.alive) if tensor is not None)

    def __enter__(self):
        self.add = GradientCapture.add

        def add(capture, gradient):
            name = self.names[capture]
            self.local[name] = self.local.get(name, 0) + gradient
            self.alive.append(weakref.ref(gradient))
            self.add(capture, gradient)
            self.peak = max(self.peak, self.bytes_alive())

        GradientCapture.add = add
        return self

    def __exit__(self, *_):
        GradientCapture.add = self.add


def update(model, parallel, micro_batches=1, batches=None, tamper=None, **kwargs):
    """One update step; returns its figures, and of each layer what its owner made P of."""
    names, used = {layer: name for name, layer in loqt_layers(model)}, {}
    project_gradient = distributed.project_gradient

    def project(layer, adapter_name, gradient):
        used[names[layer]] = gradient.clone()
        return project_gradient(layer, adapter_name, gradient)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.begin_step(**{"step": 0, **kwargs})
    for index in range(micro_batches):
        inputs = batches(index) if batches else {"input_ids": token_batch(10 * RANK + index)}
        parallel.require_backward_grad_sync = index == micro_batches - 1
        loss = parallel(**inputs, **({} if batches else {"labels": inputs["input_ids"]}))
        (loss if batches else loss.loss).backward()
    if tamper:
        tamper()
    optimizer.step()
    distributed.project_gradient = project
    figures = model.end_step(optimizer)
    distributed.project_gradient = project_gradient
    return figures, used


def same_on_all(model):
    for name, tensor in model.state_dict().items():
        if "loqt_" in name:
            copies = [torch.empty_like(tensor) for _ in range(SIZE)]
            dist.all_gather(copies, tensor.contiguous())
            assert all(torch.equal(copy, tensor) for copy in copies), name


def averages(local, shapes):
    """The mean over the processes of what each has recorded, by layer."""
    found = {}
    for name, shape in shapes.items():
        total = torch.zeros(shape) + local.get(name, 0)
        dist.all_reduce(total)
        found[name] = total / SIZE
    return found


def llama(layers=2, **kwargs):
    model = get_peft_model(tiny_llama(num_hidden_layers=layers), loqt_config(**kwargs)).train()
    return model, DistributedDataParallel(model)


def look(recorded, held):
    held.append(recorded.bytes_alive())


def check_a_process_holds_gradients_of_its_own_layers_only():
    for micro_batches in (1, 3):
        model, parallel = llama(layers=6, projection="randomized")
        shapes = {name: layer.shape for name, layer in loqt_layers(model)}
        own = [
            4 * a * b
            for (a, b), rank in zip(shapes.values(), owners(shapes.values(), SIZE), strict=True)
            if rank == RANK
        ]
        with Recorded(model) as recorded:
            held = []
            figures, used = update(model, parallel, micro_batches, tamper=partial(look, recorded, held))
        assert figures.num_updates == 1 and len(used) == len(own) == 21
        largest = 4 * 32 * 48
        assert sum(own) <= held[0] <= sum(own) + reduction.WINDOW * largest
        # q, k and v may come by in another order than they are sent
        assert recorded.peak <= sum(own) + (reduction.WINDOW + 4) * largest
        expected = averages(recorded.local, shapes)
        assert all(torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-8) for name, gradient in used.items())
        same_on_all(model)


class Experts(nn.Module):
    """A module that runs some of its parts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x, runs, counts):
        y = x
        for name in runs:
            z = getattr(self, name)(y)
            if name in counts:
                y = z
        return y.square().mean()


def check_modules_that_did_not_run_hang_nobody(monkeypatch):
    every = ["first", "second", "third"]
    # by process and micro-batch: which modules run, and which of these the loss depends on
    for plan in (
        [[(every, every)], [(["second"], every)]],
        [[(["first"], every)], [(["third", "second"], every)]],
        [[(every, every), (every, every)], [(["first"], every), (["third"], every)]],
        [[(["first"], every), (every, every)], [(["second"], every), (["second"], every)]],
        # ran, but no backward pass comes by; the other process sends sums that nobody joins in before its end
        [[(every, every)] * 2, [(every, ["first"]), (every, ["first", "second"])]],
    ):
        monkeypatch.setattr(reduction, "PATIENCE", 0.1)
        monkeypatch.setattr(reduction, "WINDOW", 0)
        config = loqt_config(r=4, target_modules=every, task_type=None)
        model = get_peft_model(Experts(), config).train()
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        shapes = {name: layer.shape for name, layer in loqt_layers(model)}

        def batches(index, plan=plan):
            runs, counts = plan[RANK][index]
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * RANK + index))
            return {"x": x, "runs": runs, "counts": counts}

        with Recorded(model) as recorded:
            figures, used = update(model, parallel, len(plan[0]), batches)
        assert figures.num_updates == 1
        expected = averages(recorded.local, shapes)
        ran_anywhere = {name for name, gradient in expected.items() if gradient.any()}
        owned = {name for name, rank in zip(shapes, owners(shapes.values(), SIZE), strict=True) if rank == RANK}
        assert ran_anywhere & owned <= used.keys()
        assert all(torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-9) for name, gradient in used.items())
        same_on_all(model)


def check_a_gradient_that_is_not_finite_postpones_the_update_everywhere():
    model, parallel = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "loqt_B" not in name}

    def broken(capture, gradient, add=GradientCapture.add):
        add(capture, gradient.mul_(float("nan")) if RANK == 1 and capture is last.capture else gradient)

    last = list(loqt_layers(model))[5][1]
    with pytest.MonkeyPatch.context() as context, pytest.warns(UserWarning, match="1 of 14 LoQT layers is not finite"):
        context.setattr(GradientCapture, "add", broken)
        figures, _ = update(model, parallel)
    assert figures is None
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "loqt_state" not in name)
    assert all(layer.update_pending("default") for _, layer in loqt_layers(model))
    figures, _ = update(model, parallel, step=1)
    assert figures.num_updates == 1
    same_on_all(model)


def check_different_adapters_are_told_everywhere():
    model, parallel = llama()
    update(model, parallel)
    layer = dict(loqt_layers(model))["base_model.model.model.layers.1.mlp.up_proj"]
    if RANK == 1:
        layer.loqt_weight["default"][0] ^= 1
    with pytest.raises(ValueError, match="1 of 14 layers .*layers.1.mlp.up_proj, have another W or P on process 1"):
        model.begin_step(5)
    # as it is asked when a run goes on, and not at every step
    assert model.begin_step(6)
    if RANK == 1:
        layer.loqt_weight["default"][0] ^= 1
    assert model.begin_step(4)
    with pytest.raises(ValueError, match=r"different steps: \[8, 9\]"):
        model.begin_step(8 + RANK)
    model.peft_config["default"].update_interval = 2 + RANK
    with pytest.raises(ValueError, match="another config or other layers on process 1"):
        model.begin_step(20)
    model.cancel_step()


def check_a_killed_process_is_noticed():
    model, parallel = llama()
    broadcasts, broadcast = [], dist.broadcast

    def count(tensor, src):
        broadcasts.append(src)
        if RANK == 1 and len(broadcasts) == 20:
            os._exit(9)
        broadcast(tensor, src)

    start = time.monotonic()
    with pytest.MonkeyPatch.context() as context, pytest.raises(RuntimeError):
        context.setattr(distributed.dist, "broadcast", count)
        update(model, parallel)
    assert time.monotonic() - start < 20
    # layer by layer, all of an update or nothing
    updates = [layer.num_updates("default") for _, layer in loqt_layers(model)]
    assert set(updates) == {0, 1}
    for _, layer in loqt_layers(model):
        assert layer.has_switched("default") == bool(layer.num_updates("default"))


def main():
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    check_a_process_holds_gradients_of_its_own_layers_only()
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_modules_that_did_not_run_hang_nobody(monkeypatch)
    check_a_gradient_that_is_not_finite_postpones_the_update_everywhere()
    check_different_adapters_are_told_everywhere()
    check_a_killed_process_is_noticed()


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    print("all checks passed", flush=True)
    os._exit(0)
