"""What some versions of a dependency cannot do, by name; tests that need it are skipped. docs/versions.md tells users."""

import importlib.metadata
import sys
from collections.abc import Iterable
from importlib.util import find_spec

import pytest
import torch
import transformers
from packaging.version import InvalidVersion, Version
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments
from transformers.utils.import_utils import is_schedulefree_available

from loqt_peft.compat import SHARDS_INTEGERS


dynamo_inlines_hooks = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7.dev0"),
    reason="torch.compile of torch 2.6 cannot inline the hooks in PEFT's forward pass",
)

# setup.cfg installs neither TRL nor torchao on an older Python
HAS_TRL_AND_TORCHAO = sys.version_info >= (3, 11)
WITHOUT_TRL = "TRL needs Python 3.11"
needs_trl = pytest.mark.skipif(not HAS_TRL_AND_TORCHAO, reason=WITHOUT_TRL)
needs_torchao = pytest.mark.skipif(not HAS_TRL_AND_TORCHAO, reason="torchao is not installed on Python 3.10")
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
optimi_works_without_triton = pytest.mark.skipif(
    find_spec("triton") is not None and not torch.cuda.is_available(),
    reason="torch-optimi's StableAdamW uses triton where it is installed, also where it finds no GPU",
)


def _schedulefree_is_found() -> bool:
    try:
        return is_schedulefree_available()
    except InvalidVersion:
        return False


transformers_finds_schedulefree = pytest.mark.skipif(
    sys.version_info < (3, 11) and not _schedulefree_is_found(),
    reason="on Python 3.10 transformers cannot tell which version of schedulefree is installed",
)

transformers_loads_into_models_without_a_head = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.1"),
    reason="transformers 5.0 loads nothing of a saved adapter, LoRA's neither, into a model without a head",
)

# only a GPU machine may lack it
needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")

# the comparisons give all methods the same batches in the same order
ARGUMENTS_ORDER_BATCHES = "train_sampling_strategy" in TrainingArguments.__dataclass_fields__
BATCHES_IN_ORDER = "the comparisons need the Trainer's `train_sampling_strategy`, which transformers 5.0 lacks"
trainer_keeps_order = pytest.mark.skipif(not ARGUMENTS_ORDER_BATCHES, reason=BATCHES_IN_ORDER)

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


def optimizers(names: Iterable[str]) -> list:
    """Names of optimizers as a test's parameters; what these versions lack is skipped."""
    needs = {
        "adamw_torch_8bit": needs_torchao,
        "Muon": needs_muon,
        "stable_adamw": optimi_works_without_triton,
        "StableAdamW, 16 bits": optimi_works_without_triton,
        **dict.fromkeys(
            ("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"), transformers_finds_schedulefree
        ),
    }
    return [pytest.param(name, marks=needs.get(name, ())) for name in names]


def skip_where_transformers_cannot_make(model_type: str) -> None:
    if model_type == "zamba2" and Version(transformers.__version__) < Version("5.1"):
        pytest.skip("transformers 5.0 cannot tie the weights of a Zamba2 of few layers")
