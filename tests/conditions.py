"""What some versions of a dependency cannot do, by name; tests that need it are skipped. docs/versions.md tells users."""

import importlib.metadata

import pytest
import torch
from packaging.version import Version
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

from loqt_peft.compat import SHARDS_INTEGERS


dynamo_inlines_hooks = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7.dev0"),
    reason="torch.compile of torch 2.6 cannot inline the hooks in PEFT's forward pass",
)

fsdp_shards_integers = pytest.mark.skipif(
    not SHARDS_INTEGERS, reason="FSDP2 of torch before 2.13 does not shard W and P in 4 bits"
)
fsdp_reduces_unused_parameters = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"),
    reason="FSDP2 of torch before 2.13 wants a gradient of the same parameters in all processes",
)

# that of transformers 5.0 logs no `grad_norm` with max_grad_norm=0
TRAINER_LOGS_NORMS_WITHOUT_CLIPPING = hasattr(Trainer, "_get_grad_norm")


def transformers_takes_this_peft(min_version: str) -> None:
    """In place of transformers' own check before `model.add_adapter` and `model.load_adapter`."""
    installed = importlib.metadata.version("peft")
    if Version(installed) < Version(min_version):
        pytest.skip(f"add_adapter and load_adapter of this transformers need peft {min_version}, not {installed}")
