"""Run by test_deepspeed.py under torchrun: the same training with DDP and with DeepSpeed's ZeRO 1 and 2."""

import os
import sys
import warnings

import deepspeed
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from common import TokenDataset, loqt_config, make_trainer, tiny_llama
from deepspeed.utils import safe_get_full_fp32_param
from peft import get_peft_model

from loqt_peft import LoQTTrainerCallback
from loqt_peft.layers.find import loqt_layers
from loqt_peft.saving.checkpoints import get_last_checkpoint


# it would be compiled when a group of processes is made
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None

OUTPUT = sys.argv[1]


def settings(stage):
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }


def trainer_of(name, stage, config=None, **kwargs):
    AcceleratorState._reset_state()
    defaults = {"update_interval": 6, "full_rank_modules": "all", "optimizer_state": "rotate"}
    defaults["projection"] = "randomized"
    model = get_peft_model(tiny_llama(), loqt_config(**{**defaults, **(config or {})}))
    arguments = {"deepspeed": settings(stage)} if stage is not None else {"ddp_find_unused_parameters": False}
    arguments |= {"max_steps": 24, "logging_steps": 1, "optim": "adamw_torch"}
    return make_trainer(
        model, f"{OUTPUT}/{name}", [LoQTTrainerCallback()], dataset=TokenDataset(size=256), **{**arguments, **kwargs}
    )


def train(name, stage, resume=None, **kwargs):
    """The losses of all steps, and the state at the end."""
    trainer = trainer_of(name, stage, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len([entry for entry in trainer.state.log_history if "loqt/updates" in entry]) == 4
    return losses, {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def check_same_as_ddp_and_resumes():
    expected, state = train("ddp", None)
    for stage in (1, 2):
        losses, other = train(f"zero{stage}", stage, save_strategy="steps", save_steps=6)
        assert len(losses) == 24
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= 1e-6
        for name, tensor in state.items():
            if tensor.is_floating_point():
                assert torch.allclose(tensor, other[name], rtol=1e-5, atol=1e-6), name
        assert get_last_checkpoint(f"{OUTPUT}/zero{stage}").endswith("checkpoint-24")
        # an update follows at once, or comes later
        for step in (12, 18)[:stage]:
            again, resumed = train("resumed", stage, f"{OUTPUT}/zero{stage}/checkpoint-{step}")
            assert again == losses and all(torch.equal(tensor, resumed[name]) for name, tensor in other.items())


def check_16_bits_and_accumulation():
    trainer = trainer_of("bf16", 2, bf16=True, gradient_accumulation_steps=2, max_steps=8)
    trainer.train()
    for _, layer in loqt_layers(trainer.model):
        B = layer.loqt_B["default"]
        assert B.dtype == torch.bfloat16 and B.any() and layer.num_updates("default") == 2
        assert torch.equal(safe_get_full_fp32_param(B).bfloat16(), B)


def check_what_is_refused():
    for stage, config, message in (
        (3, {}, "Stage 3 of DeepSpeed's ZeRO is not supported"),
        (0, {}, "Stage 0 of DeepSpeed's ZeRO is not supported"),
        (2, {"optimizer_state": "reset"}, "corrects the bias of moments by that count"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of("refused", stage, config).train()


def main():
    warnings.simplefilter("ignore")
    check_same_as_ddp_and_resumes()
    check_16_bits_and_accumulation()
    check_what_is_refused()
    assert deepspeed.comm.is_initialized() and dist.get_world_size() == 2
    print("all checks passed", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
