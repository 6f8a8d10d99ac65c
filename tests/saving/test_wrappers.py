"""A LoQT model inside another module: what is saved of it says what it has been through."""

import json

import pytest
import torch
from common import TokenDataset, load_llama, loqt_config, make_trainer, tiny_llama, token_batch, train_steps
from conditions import transformers_loads_into_models_without_a_head
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from loqt_peft import LoQTTrainerCallback
from loqt_peft.layers.find import loqt_layers
from loqt_peft.training.update import begin_step, end_step


class WithValueHead(nn.Module):
    """As TRL's `AutoModelForCausalLMWithValueHead`: the loss is that of the model within."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model = model
        self.v_head = nn.Linear(32, 1)

    def forward(self, input_ids, labels=None):
        output = self.pretrained_model(input_ids=input_ids, labels=labels, output_hidden_states=True)
        return output.loss + self.v_head(output.hidden_states[-1]).square().mean(), output.logits


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    return path


@torch.no_grad()
def logits(model):
    model.eval()
    return model(input_ids=token_batch(99)).logits


def train(model, trained, forward, steps=2):
    """Two steps with the optimizer of `model`; LoQT is asked through `trained`."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        begin_step(trained, step)
        forward(step).backward()
        optimizer.step()
        end_step(trained, optimizer)
        optimizer.zero_grad()


def assert_saved(model, base_dir, folder):
    expected = logits(model)
    model.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["num_updates"] == 2
    assert torch.equal(logits(PeftModel.from_pretrained(load_llama(base_dir, "dense"), folder)), expected)
    # makes room for what the config speaks of
    loaded = load_llama(base_dir, "dense")
    loaded.load_adapter(str(folder))
    assert torch.equal(logits(loaded), expected)


def test_model_in_a_wrapper_under_the_trainer(base_dir, tmp_path):
    model = get_peft_model(load_llama(base_dir, "dense"), loqt_config())
    make_trainer(WithValueHead(model), tmp_path / "run", [LoQTTrainerCallback()], TokenDataset(8), max_steps=2).train()
    assert model.peft_config["default"].num_updates == 2
    assert_saved(model, base_dir, tmp_path / "adapter")


@pytest.mark.parametrize("door", ["PeftModel", "transformers"])
def test_updates_asked_for_through_a_module_within(base_dir, tmp_path, door):
    model = load_llama(base_dir, "dense")
    if door == "PeftModel":
        model = get_peft_model(model, loqt_config())
    else:
        model.add_adapter(loqt_config(task_type=None))
    inner = model.get_base_model().model if door == "PeftModel" else model.model
    train(model, inner, lambda step: model(input_ids=token_batch(step), labels=token_batch(step)).loss)
    assert_saved(model, base_dir, tmp_path / "adapter")


@transformers_loads_into_models_without_a_head
def test_sentence_transformer(tmp_path):
    tokens = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3, "c": 4}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path / "base"
    )
    config = BertConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path / "base")
    transformer = Transformer(str(tmp_path / "base"))
    model = SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu")
    model.add_adapter(loqt_config(task_type=None))
    texts = ["a b c", "c a", "b"]
    features = model.tokenize(texts)
    train(model, model, lambda step: model(dict(features))["sentence_embedding"].square().mean())
    (config,) = {id(layer.config["default"]): layer.config["default"] for _, layer in loqt_layers(model)}.values()
    assert config.num_updates == 2
    expected = model.encode(texts, convert_to_tensor=True)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(loaded.encode(texts, convert_to_tensor=True), expected)


def test_wrappers_of_activation_checkpointing_are_not_in_the_names_of_an_adapter(tmp_path):
    model = get_peft_model(tiny_llama(), loqt_config(full_rank_modules=["lm_head"]))
    train_steps(model, 2)
    model.save_pretrained(tmp_path / "plain")

    def wrapped(model):
        blocks = model.get_base_model().model.layers
        for index, block in enumerate(blocks):
            blocks[index] = checkpoint_wrapper(block)
        return model

    wrapped(model).save_pretrained(tmp_path / "wrapped")
    plain, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "wrapped"))
    assert plain.keys() == other.keys() and all(torch.equal(plain[key], other[key]) for key in plain)
    # into wrapped blocks as well
    again = wrapped(get_peft_model(tiny_llama(), loqt_config(full_rank_modules=["lm_head"])))
    again.load_adapter(tmp_path / "plain", "default", is_trainable=True)
    with torch.no_grad():
        assert torch.equal(again(input_ids=token_batch()).logits, model(input_ids=token_batch()).logits)
