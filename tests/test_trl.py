"""TRL's own trainers: the reference model of preference training, and chat templates that bring new tokens."""

import pytest
import torch
from common import VOCABULARY, load_llama, loqt_config, tiny_llama, token_batch, train_steps
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

from loqt_peft import LoQTTrainerCallback
from loqt_peft.update import loqt_layers


STEPS = 3


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter_dir(base_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(load_llama(base_dir, "dense"), loqt_config())
    train_steps(model, 2)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def words(seed, n):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(3, VOCABULARY, (n,), generator=generator).tolist())


def trained(base_dir, adapter_dir, **kwargs):
    return PeftModel.from_pretrained(load_llama(base_dir, "dense"), adapter_dir, is_trainable=True, **kwargs)


@torch.no_grad()
def logits(model, adapter_name="default"):
    active, training = model.active_adapter, model.training
    model.eval()
    model.set_adapter(adapter_name)
    result = model(input_ids=token_batch(99)).logits
    model.set_adapter(active)
    model.train(training)
    return result


def preference_trainer(method, model, tokenizer, folder, **kwargs):
    pairs = [{"prompt": words(i, 4), "chosen": words(i + 50, 6), "rejected": words(i + 90, 6)} for i in range(8)]
    config, trainer, rows, more = {
        "DPO": (DPOConfig, DPOTrainer, pairs, {}),
        "KTO": (
            KTOConfig,
            KTOTrainer,
            [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(pairs)],
            {},
        ),
        "GRPO": (
            GRPOConfig,
            GRPOTrainer,
            [{"prompt": p["prompt"]} for p in pairs],
            {"beta": 0.1, "num_generations": 2, "max_completion_length": 6},
        ),
    }[method]
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **more,
        **kwargs,
    }
    rewards = {"reward_funcs": lambda completions, **_: [float(len(set(c))) for c in completions]}
    return trainer(
        model,
        args=config(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[LoQTTrainerCallback()],
        **(rewards if method == "GRPO" else {}),
    )


@pytest.mark.parametrize("method", ["DPO", "KTO", "GRPO"])
def test_the_reference_is_the_model_at_the_start_of_training(base_dir, adapter_dir, tokenizer, tmp_path, method):
    model = trained(base_dir, adapter_dir)
    start = logits(model)
    trainer = preference_trainer(method, model, tokenizer, tmp_path, learning_rate=1e-2)
    assert torch.equal(logits(model, "ref"), start)
    trainer.train()
    # three updates of the adapter that trains leave the other as it is
    layers = [layer for _, layer in loqt_layers(model)]
    assert all(layer.num_updates("default") == 2 + STEPS and layer.num_updates("ref") == 2 for layer in layers)
    assert model.peft_config["default"].num_updates == 5 and model.peft_config["ref"].num_updates == 2
    assert not torch.equal(logits(model), start)
    assert torch.equal(logits(model, "ref"), start)


def test_first_loss_of_preference_training(base_dir, adapter_dir, tokenizer, tmp_path):
    trainer = preference_trainer("DPO", trained(base_dir, adapter_dir), tokenizer, tmp_path, learning_rate=1e-9)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # ln 2, as policy and reference are one
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
