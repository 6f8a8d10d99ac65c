"""Two processes with DeepSpeed on the CPU, where it is installed."""

import os
import subprocess
import sys

import pytest
from accelerate.utils import is_deepspeed_available
from common import TESTS


@pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")
def test_zero_trains_as_ddp_does_and_resumes(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [*launcher, "deepspeed_worker.py", str(tmp_path)],
        cwd=TESTS,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0 and "all checks passed" in result.stdout, result.stderr[-4000:]
