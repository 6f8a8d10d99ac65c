"""The three scripts that a newcomer runs first, on tiny models."""

import runpy
import sys

import pytest
from common import ROOT, tiny_llama
from peft import PeftConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast


pytestmark = pytest.mark.filterwarnings("error::loqt_peft.LoQTWarning")

TEXT = "The people of the union are strong and the union of the people is strong .\n"


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(set(TEXT.split()))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    # of a width with which bitsandbytes computes rightly on every processor
    tiny_llama(hidden_size=64, intermediate_size=64, max_position_embeddings=128).save_pretrained("llama")
    bert = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    BertForSequenceClassification(bert).save_pretrained("bert")
    for name in ("llama", "bert"):
        tokenizer.save_pretrained(name)
    (tmp_path / "text.txt").write_text(TEXT * 40, encoding="utf-8")
    (tmp_path / "other.txt").write_text("the union is the people\n" * 40, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("from_scratch", ["text.txt", "3"]),
        ("continue_4bit", ["llama", "text.txt", "3"]),
        ("fine_tune", ["bert", "text.txt", "other.txt", "0.5"]),
    ],
)
def test_script(world, monkeypatch, capsys, script, arguments):
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(ROOT / "examples" / f"{script}.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert output.startswith("loqt_peft:")
    assert "What next" in output
    config = PeftConfig.from_pretrained(world / "out" / "adapter")
    assert config.peft_type.value == "LOQT" and config.num_updates == 1


@pytest.mark.parametrize("script", ["from_scratch", "continue_4bit", "fine_tune"])
def test_is_about_forty_lines(script):
    lines = (ROOT / "examples" / f"{script}.py").read_text(encoding="utf-8").splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 50
