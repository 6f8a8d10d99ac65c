"""Two processes with gloo, started as a user would start them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from common import loqt_config, tiny_llama, token_batch
from peft import get_peft_model
from safetensors.torch import load_file

from loqt_peft import update
from loqt_peft.layer import LoQTLayer


def run(output_dir, processes, batch_size, accumulation, update_mode, projection):
    output_dir.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    if processes == 1:
        launcher = [sys.executable]
    settings = [str(batch_size), str(accumulation), update_mode, projection]
    command = [*launcher, "ddp_worker.py", str(output_dir), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=300
    )
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
    assert all(torch.equal(first[key], second[key]) for key in first)

    # the other modes of a process by itself leave no gradient to look at
    (alone,) = run(tmp_path / "one", 1, 8, accumulation, "whole", projection)
    gradients = [key for key in first if key.startswith("gradient.")]
    assert len(gradients) == captured
    for key in gradients:
        assert torch.linalg.norm(first[key] - alone[key]) <= 1e-5 * torch.linalg.norm(alone[key])
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

    def reduce(self, tensor, dst, op):
        self.log.append(f"reduce to {dst}")

    def broadcast(self, tensor, src):
        if self.log[-1] != f"broadcast from {src}":
            self.log.append(f"broadcast from {src}")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("projection", ["randomized", "random"])
def test_processes_work_on_layers_at_the_same_time(monkeypatch, rank, projection):
    processes = Processes(rank)
    monkeypatch.setattr(update, "dist", processes)
    compute_switch = LoQTLayer.compute_switch

    def compute(layer, *args):
        processes.log.append("work")
        return compute_switch(layer, *args)

    monkeypatch.setattr(LoQTLayer, "compute_switch", compute)
    model = get_peft_model(tiny_llama(num_hidden_layers=1), loqt_config(projection=projection)).train()
    model.begin_step(0)
    model(input_ids=token_batch(), labels=token_batch()).loss.backward()
    assert model.end_step().num_updates == 1

    # 7 layers; the last one has nobody to share the time with
    reduces = [] if projection == "random" else ["reduce to 0", "reduce to 1"]
    group = [*reduces, "work", "broadcast from 0", "broadcast from 1"]
    last = [*reduces[:1], *(["work"] if rank == 0 else []), "broadcast from 0"]
    assert processes.log == group * 3 + last
