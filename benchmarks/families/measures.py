"""What is measured of a family: a short training with updates, and all that its result must survive."""

from __future__ import annotations

import copy
import re
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

from benchmarks.families.models import Family
from loqt_peft import LoQTConfig
from loqt_peft.algorithm.quantization import FourBitFormat
from loqt_peft.layers.find import loqt_layers


STEPS, INTERVAL = 12, 4
ADAPTER = "default"


def block_weights(model):
    """Names and sizes of the weights of a model's blocks: what lies in a numbered place and has rows and columns."""
    sizes = {}
    for name, parameter in model.named_parameters():
        if re.search(r"\.\d+\.", name) and parameter.dim() > 1:
            sizes[name] = parameter.numel()
    return sizes


def held_in_four_bits(layers):
    """Elements of W that the layers hold in 4 bits."""
    return sum(
        layer.shape[0] * layer.shape[1]
        for layer in layers
        if layer.has_switched(ADAPTER) and isinstance(layer.weight_format(ADAPTER), FourBitFormat)
    )


def adapt(model):
    return get_peft_model(model, LoQTConfig(r=8, update_interval=INTERVAL, interval_schedule="constant", projection="svd"))


def train(model, batch, steps=STEPS):
    """Losses of the steps; the updates happen after steps 0, 4 and 8."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        model.begin_step(step)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        model.end_step(optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def output(model, batch):
    """The loss and everything floating that the model returns first, flat."""
    result = model(**batch)
    logits = next((result[key] for key in ("logits", "logits_per_text") if key in result), None)
    return torch.cat([result.loss.flatten(), logits.flatten()])


def largest(one, other):
    return (one - other).abs().max().item()


def measure(family: Family) -> dict:
    """Everything of a family.

    Returns:
        `dict`: `trains` (loss fell, every layer has three updates and a projection), `share` of the block weights in 4 bits,
        differences of the output after `reload`, `disable` (to the base), `merge` and `export`, and `without`, the names of
        block weights that are not held, with digits replaced.
    """
    batch = family.batch(0)
    weights = block_weights(family.build())
    model = adapt(family.build())
    base = output(family.build(), batch)
    losses = train(model, batch)
    layers = dict(loqt_layers(model.base_model.model))
    trained = output(model, batch)
    idle = [n for n, x in layers.items() if x.num_updates(ADAPTER) != 3 or not x.projection(ADAPTER).any()]
    result = {
        "trains": losses[-1] < losses[0] and not idle,
        "losses": [losses[0], losses[-1]],
        "idle": idle,
        "layers": len(layers),
        "share": held_in_four_bits(layers.values()) / sum(weights.values()),
        "without": sorted({re.sub(r"\.\d+\.", ".*.", n) for n in weights.keys() - {f"{x}.weight" for x in layers}}),
    }
    with model.disable_adapter():
        result["disable"] = largest(output(model, batch), base)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(family.build(), folder).eval()
        result["reload"] = largest(output(again, batch), trained)
        result["merge"] = largest(output(again.merge_and_unload(), batch), trained)
        model.base_model.export(Path(folder) / "dense", "dense")
        exported = type(family.build()).from_pretrained(Path(folder) / "dense").eval()
        result["export"] = largest(output(exported, batch), trained)
    return result
