"""Run by test_snippets.py, in a process that has a Hub on loopback: every Python block of README and site, on tiny models.

Models, configs and texts lie under the names that the pages use; the Trainer stops after three steps. What a page takes for
granted, as `model` or `train_dataset`, is there before its first block.
"""

import contextlib
import io
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
from common import TokenDataset, tiny_llama, token_batch, train_steps
from datasets import Dataset
from pages import PAGES, python_blocks
from peft import AutoPeftModelForCausalLM, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import loqt_peft
from loqt_peft import LoQTConfig, LoQTTrainerCallback


STEPS = 3
# pages whose blocks are alternatives: each of the first ones, with the last one behind it
ALTERNATIVES = {"README.md": (0, 1)}


class Labelled(TokenDataset):
    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": index % 2}


def write_world():
    """The files that pages name."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 64)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tiny_llama().config.save_pretrained("my-config")
    # bitsandbytes computes wrongly with other widths on some processors
    llama = tiny_llama(hidden_size=64, intermediate_size=64)
    for name in ("HuggingFaceTB/SmolLM2-135M",):
        llama.save_pretrained(name)
        tokenizer.save_pretrained(name)
    bert = BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            num_labels=2,
        )
    )
    bert.save_pretrained("microsoft/MiniLM-L12-H384-uncased")
    Path("train.txt").write_text("w3 w4 w5 w6 w7 w8\n" * 50, encoding="utf-8")
    tiny_llama().save_pretrained("base")


def stop_early():
    """Let every Trainer stop after some steps, and write nothing that is not asked for."""
    original = TrainingArguments.__post_init__

    def __post_init__(self):
        self.max_steps = STEPS
        self.warmup_steps = 0
        self.report_to = "none"
        self.disable_tqdm = True
        self.use_cpu = True
        self.per_device_train_batch_size = min(self.per_device_train_batch_size, 4)
        original(self)

    TrainingArguments.__post_init__ = __post_init__


def trained_model():
    model = AutoModelForCausalLM.from_pretrained("base")
    model = get_peft_model(model, LoQTConfig(task_type="CAUSAL_LM", r=8, update_interval=1))
    train_steps(model, 2)
    return model


def names():
    """What the pages take for granted."""
    model, data = trained_model(), TokenDataset()
    arguments = TrainingArguments("out", learning_rate=0.02)
    return {
        "model": model,
        "plain_model": tiny_llama(),
        "train_dataset": data,
        "eval_dataset": data,
        "labelled_dataset": Labelled(),
        "text_dataset": Dataset.from_dict({"text": ["w3 w4 w5 w6 w7 w8 w9"] * 32}),
        "dataloader": torch.utils.data.DataLoader(data, batch_size=16),
        "args": arguments,
        "trainer": Trainer(model, arguments, train_dataset=data, callbacks=[LoQTTrainerCallback()]),
        "Trainer": Trainer,
        "TrainingArguments": TrainingArguments,
        "get_peft_model": get_peft_model,
        "torch": torch,
        "loqt_peft": loqt_peft,
    }


def check_the_end(space):
    """What the page made loads by its name on the Hub, says the same, writes text, and its export is the same model."""
    model = space["model"].eval()
    tokens = token_batch(7, batch=1)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        pulled = AutoPeftModelForCausalLM.from_pretrained("me/my-model").eval()
        torch.testing.assert_close(pulled(input_ids=tokens).logits, logits, rtol=1e-4, atol=1e-6)
        assert pulled.generate(input_ids=tokens, max_new_tokens=4, pad_token_id=0).shape[1] > tokens.shape[1]
        plain = AutoModelForCausalLM.from_pretrained("plain", dtype=torch.float32).eval()
        torch.testing.assert_close(plain(input_ids=tokens).logits, logits, rtol=1e-2, atol=1e-2)


def run(page):
    code = python_blocks(page)
    runs = [code] if page not in ALTERNATIVES else [[code[i], code[-1]] for i in ALTERNATIVES[page]]
    root = Path.cwd()
    for number, sequence in enumerate(runs):
        folder = root / f"{page.replace('/', '_')}_{number}"
        folder.mkdir()
        os.chdir(folder)
        write_world()
        space = names()
        for i, block in enumerate(sequence):
            exec(compile(block, f"{page}, Python block {i + 1}", "exec"), space)
        if page in ALTERNATIVES:
            check_the_end(space)
        os.chdir(root)


def main():
    results = {}
    stop_early()
    warnings.simplefilter("error", loqt_peft.LoQTWarning)
    root = Path.cwd()
    for page in PAGES:
        if not python_blocks(page):
            continue
        os.chdir(root)
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                run(page)
            results[page] = None
        except BaseException:
            results[page] = output.getvalue()[-2000:] + traceback.format_exc()
    (root / "results.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
