"""Trained models to be exported, and what they compute."""

import os
import subprocess
import sys

import bitsandbytes as bnb
import torch
from common import ROOT, load_llama, loqt_config, token_batch, train_steps
from peft import get_peft_model

from loqt_peft.layers.find import loqt_layers


def trained(path, base="dense", switches=3, dtype=torch.float32, **kwargs):
    model = get_peft_model(exact(load_llama(path, base, dtype)), loqt_config(**kwargs))
    train_steps(model, switches)
    if not switches:
        # P is empty before the first switch
        randomize(model)
    return model


@torch.no_grad()
def randomize(model, size=0.02):
    for _, layer in loqt_layers(model):
        layer.loqt_P["default"] = layer.projection_format("default").pack(
            torch.randn_like(layer.projection("default"))
        )
        layer.loqt_B["default"].normal_(std=size)


def exact(model):
    # in eval, on processors with AVX512-BF16, bitsandbytes would round the absmax of a 4-bit base to bfloat16
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def logits(model, seed=99):
    model.eval()
    return model(input_ids=token_batch(seed)).logits


def effective_weights(model):
    return {name: layer.effective_weight("default") for name, layer in loqt_layers(model.base_model.model)}


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment)
