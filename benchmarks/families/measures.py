"""What is measured of a family: a short training with updates, and all that its result must survive."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

from benchmarks.families.models import Family
from loqt_peft import LoQTConfig, pack_model
from loqt_peft.algorithm.quantization import DenseFormat
from loqt_peft.layers.find import loqt_layers


STEPS, INTERVAL, UPDATES = 12, 4, 3
# of the block weights, in 4 bits
SHARE = 0.9
# largest difference of a merged model's output
EXACT = 1e-5
ADAPTER = "default"


def block_weights(model):
    """Names and sizes of the weights of a model's blocks: what lies in a numbered place and has rows and columns."""
    sizes = {}
    for name, parameter in model.named_parameters():
        if re.search(r"\.\d+\.", name) and parameter.dim() > 1:
            sizes[name] = parameter.numel()
    return sizes


def held_in_four_bits(layers, weights):
    """Elements of a model's block weights that its LoQT layers hold in 4 bits.

    Args:
        layers (`dict[str, LoQTLayer]`): By name.
        weights (`dict[str, int]`): Of [`block_weights`]; of a layer outside the blocks nothing is counted.
    """
    return sum(
        weights.get(_weight_of(name, weights), 0)
        for name, layer in layers.items()
        if layer.has_switched(ADAPTER) and not isinstance(layer.weight_format(ADAPTER), DenseFormat)
    )


def _weight_of(name, weights):
    """The parameter that a layer holds: experts' layers have the name of theirs."""
    return name if name in weights else f"{name}.weight"


def adapt(model):
    return get_peft_model(
        model, LoQTConfig(r=8, update_interval=INTERVAL, interval_schedule="constant", projection="svd")
    )


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


def measure(family: Family, packed: bool = False) -> dict:
    """Everything of a family.

    Args:
        family ([`Family`]): The family.
        packed (`bool`): Whether the base is in 4 bits from the start.

    Returns:
        `dict`: `losses`, the first and the last; `idle`, the layers without three updates or without a projection; `layers`,
        their number; `share` of the block weights in 4 bits; the largest differences of the output from that of the base
        (`disable`), and from that of the trained model (`reload`, `merge`, `export`); `without`, the names of block weights
        that no layer holds, with stars for numbers.
    """

    def build():
        return pack_model(family.build()) if packed else family.build()

    batch, weights = family.batch(0), block_weights(family.build())
    model = adapt(build())
    # disabled: in eval, on processors with AVX512-BF16, bitsandbytes by itself would round the absmax of a packed base
    with model.disable_adapter():
        base = output(model.eval(), batch) if packed else output(family.build(), batch)
    losses = train(model, batch)
    layers = dict(loqt_layers(model.base_model.model))
    trained = output(model, batch)
    names = {re.sub(r"\.\d+\.", ".*.", name) for name in weights.keys() - {_weight_of(n, weights) for n in layers}}
    result = {
        "losses": [losses[0], losses[-1]],
        "idle": [n for n, x in layers.items() if x.num_updates(ADAPTER) != UPDATES or not x.projection(ADAPTER).any()],
        "layers": len(layers),
        "share": held_in_four_bits(layers, weights) / sum(weights.values()),
        "without": sorted(names),
    }
    with model.disable_adapter():
        result["disable"] = largest(output(model, batch), base)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(build(), folder).eval()
        result["reload"] = largest(output(again, batch), trained)
        result["merge"] = largest(output(again.merge_and_unload(), batch), trained)
        model.base_model.export(Path(folder) / "dense", "dense")
        exported = type(family.build()).from_pretrained(Path(folder) / "dense").eval()
        result["export"] = largest(output(exported, batch), trained)
    return result


def failures(result: dict, share: float = SHARE) -> list[str]:
    """What of a family is not as it must be."""
    wrong = []
    if not result["losses"][1] < result["losses"][0]:
        wrong.append(f"the loss went from {result['losses'][0]:.3f} to {result['losses'][1]:.3f}")
    if result["idle"]:
        wrong.append(f"without updates: {', '.join(result['idle'])}")
    if result["share"] < share:
        wrong.append(f"{result['share']:.1%} of the block weights in 4 bits, without {', '.join(result['without'])}")
    wrong += [f"{name}: {result[name]:.1e}" for name in ("disable", "reload") if result[name] != 0]
    return wrong + [f"{name}: {result[name]:.1e}" for name in ("merge", "export") if result[name] > EXACT]
