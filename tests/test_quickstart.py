"""The README's first example, as it stands there."""

import re
import warnings

import torch
from common import ROOT, TokenDataset, token_batch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from loqt_peft.findings import LoQTWarning


def quickstart() -> str:
    """The example as a program: what it adds, and what was there."""
    (example,) = re.findall(r"^```diff\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    return "\n".join(line[1:] for line in example.splitlines())


def test_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4}
    names = {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "Trainer": Trainer,
        "config": LlamaConfig(vocab_size=64, **sizes),
        "args": TrainingArguments("output", max_steps=2, use_cpu=True, report_to="none", save_strategy="no"),
        "train_dataset": TokenDataset(16),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoQTWarning)
        exec(quickstart(), names)
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "output")
    tokens = token_batch()
    with torch.no_grad():
        expected = names["model"].eval()(input_ids=tokens).logits
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)
    assert names["model"].peft_config["default"].num_updates == 1
