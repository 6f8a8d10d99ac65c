"""Small models and data that several tests share."""

from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from loqt_peft import LoQTConfig


TESTS = Path(__file__).parent
ROOT = TESTS.parent
VOCABULARY = 64


def tiny_llama(seed=0, **kwargs):
    torch.manual_seed(seed)
    config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **kwargs}))


def load_llama(path, base, dtype=torch.float32):
    """The saved model at `path` as a `base` of "dense", "4bit" or "4bit-double"."""
    quantization = None
    if base != "dense":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=base == "4bit-double",
            bnb_4bit_compute_dtype=dtype,
        )
    return LlamaForCausalLM.from_pretrained(path, quantization_config=quantization, dtype=dtype)


def loqt_config(**kwargs):
    """Every step is an update step, unless told otherwise."""
    defaults = {
        "r": 8,
        "update_interval": 1,
        "interval_schedule": "constant",
        "projection": "svd",
        "task_type": "CAUSAL_LM",
    }
    return LoQTConfig(**{**defaults, **kwargs})


def token_batch(seed=0, batch=4, length=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


class TokenDataset(torch.utils.data.Dataset):
    def __init__(self, size=64, length=16, seed=0):
        self.tokens = token_batch(seed, size, length)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def train_steps(model, steps, lr=1e-2, start=0, seed=0):
    """A hand-written loop with LoQT's two calls; returns the updates."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    updates = []
    for step in range(start, start + steps):
        model.begin_step(step)
        tokens = token_batch(seed + step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        updates.append(model.end_step(optimizer))
        optimizer.zero_grad()
    model.eval()
    return [update for update in updates if update is not None]


def make_trainer(model, output_dir, callbacks=(), dataset=None, eval_dataset=None, **kwargs):
    defaults = {
        "output_dir": str(output_dir),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(**{**defaults, **kwargs})
    return Trainer(
        model, args, train_dataset=dataset or TokenDataset(), eval_dataset=eval_dataset, callbacks=list(callbacks)
    )


def single_linear(W, bias=None, **kwargs):
    """A PEFT model around one `nn.Linear` with weight W `[out, in]`, and its LoQT layer."""
    linear = nn.Linear(W.shape[1], W.shape[0], bias=bias is not None)
    with torch.no_grad():
        linear.weight.copy_(W)
        if bias is not None:
            linear.bias.copy_(bias)
    config = {"target_modules": ["0"], "task_type": None, **kwargs}
    model = get_peft_model(nn.Sequential(linear), loqt_config(**config))
    return model, model.base_model.model[0]
