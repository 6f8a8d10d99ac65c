"""Two processes with gloo, started as a user would start them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


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
