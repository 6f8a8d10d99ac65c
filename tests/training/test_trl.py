"""TRL's own trainers: the reference model of preference training, and chat templates that bring new tokens."""

import copy

import pytest
import torch
from common import VOCABULARY, load_llama, loqt_config, tiny_llama, token_batch, train_steps
from conditions import HAS_TRL_AND_TORCHAO, WITHOUT_TRL
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loqt_peft import LoQTTrainerCallback
from loqt_peft.layers.find import loqt_layers


if not HAS_TRL_AND_TORCHAO:
    pytest.skip(WITHOUT_TRL, allow_module_level=True)

from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.trainer.callbacks import SyncRefModelCallback


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


def test_an_average_of_parameters_is_refused(base_dir, adapter_dir, tokenizer, tmp_path):
    model = trained(base_dir, adapter_dir)
    trainer = preference_trainer("DPO", model, tokenizer, tmp_path)
    trainer.add_callback(SyncRefModelCallback(ref_model=model, accelerator=None))
    with pytest.raises(ValueError, match="SyncRefModelCallback averages the parameters of two models"):
        trainer.train()


@pytest.mark.parametrize("full_rank_modules", [None, "all"])
def test_tokens_of_a_new_chat_template_are_trained(base_dir, tokenizer, tmp_path, full_rank_modules):
    source = copy.deepcopy(tokenizer)
    source.add_special_tokens({"eos_token": "<|end|>", "extra_special_tokens": ["<|user|>"]})
    source.chat_template = "{% for m in messages %}<|user|> {{ m['content'] }} <|end|> {% endfor %}"
    source.save_pretrained(tmp_path / "source")
    roles = ("user", "assistant")
    chats = [{"messages": [{"role": r, "content": words(i + j, 4)} for j, r in enumerate(roles)]} for i in range(8)]
    trainer = SFTTrainer(
        load_llama(base_dir, "dense"),
        args=SFTConfig(
            output_dir=str(tmp_path / "run"),
            chat_template_path=str(tmp_path / "source"),
            max_steps=2,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(chats),
        processing_class=copy.deepcopy(tokenizer),
        peft_config=loqt_config(full_rank_modules=full_rank_modules),
        callbacks=[LoQTTrainerCallback()],
    )
    model, new = trainer.model, trainer.processing_class.convert_tokens_to_ids("<|end|>")
    embeddings = model.get_input_embeddings()
    before = embeddings(torch.arange(new + 1)).detach().clone()
    trainer.train()
    change = (embeddings(torch.arange(new + 1)) - before).detach().norm(dim=1)
    # all rows train at full rank, or the new ones alone
    assert change[new] > 0 and bool(change[:VOCABULARY].any()) == (full_rank_modules == "all")
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    for load in ("peft", "transformers"):
        loaded = load_llama(base_dir, "dense")
        loaded.resize_token_embeddings(model.get_output_embeddings().weight.shape[0])
        if load == "peft":
            loaded = PeftModel.from_pretrained(loaded, tmp_path / "adapter")
        else:
            loaded.load_adapter(str(tmp_path / "adapter"))
        loaded.eval()
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=token_batch(99)).logits, expected), load
