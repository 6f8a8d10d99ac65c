"""Every family of models trains, reloads, merges and exports with the targets that LoQT takes by default."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import transformers
from common import loqt_config
from peft import get_peft_model
from torch import nn

from benchmarks.families.measures import failures, measure
from benchmarks.families.models import FAMILIES, MIXTURES
from loqt_peft.layers.find import loqt_layers


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name):
    assert failures(measure(FAMILIES[name])) == []


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_but_for_its_experts(name):
    assert failures(measure(MIXTURES[name]), share=0.0) == []


@pytest.mark.parametrize("name", ["Llama", "Mamba2", "T5", "ViT"])
def test_a_family_on_a_packed_base(name):
    assert failures(measure(FAMILIES[name], packed=True)) == []


###############################
# A weight that is read
###############################


class MambaMixer(nn.Module):
    """By its name one of those whose `out_proj` may be read."""

    def __init__(self, reads):
        super().__init__()
        self.out_proj = nn.Linear(24, 16)
        self.reads = reads

    def forward(self, x):
        return F.linear(x, self.out_proj.weight, self.out_proj.bias) if self.reads else self.out_proj(x)


def trained(reads, quantize_weight="nf4", accumulate=1):
    torch.manual_seed(0)
    config = loqt_config(target_modules=["out_proj"], task_type=None, quantize_weight=quantize_weight, loqt_alpha=1.0)
    model = get_peft_model(nn.Sequential(MambaMixer(reads)), config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    backward_passes = itertools.count(1)
    for step in range(3):
        # asked once in each
        model.begin_step(step, lambda: next(backward_passes) % accumulate == 0)
        for number in range(accumulate):
            x = torch.randn(8, 24, generator=torch.Generator().manual_seed(10 * step + number))
            (model(x).square().mean() / accumulate).backward()
        optimizer.step()
        model.end_step(optimizer)
        optimizer.zero_grad()
    return model, next(layer for _, layer in loqt_layers(model.base_model.model))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("quantize_weight", ["nf4", None])
def test_a_weight_that_is_read_trains_as_one_that_is_called(quantize_weight, accumulate):
    (_, read), (_, called) = (trained(reads, quantize_weight, accumulate) for reads in (True, False))
    assert read.num_updates("default") == called.num_updates("default") == 3
    torch.testing.assert_close(
        read.effective_weight("default"), called.effective_weight("default"), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(read.loqt_B["default"], called.loqt_B["default"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read.projection("default"), called.projection("default"), rtol=1e-4, atol=1e-5)
    base = read.get_base_layer().weight
    assert not torch.allclose(read.effective_weight("default"), base, atol=1e-3)


def test_what_is_read_without_the_adapter_is_the_base():
    model, layer = trained(reads=True)
    base = layer.get_base_layer().weight
    x = torch.randn(2, 24)
    assert not torch.equal(model(x), F.linear(x, base, layer.get_base_layer().bias))
    with model.disable_adapter():
        assert torch.equal(model(x), F.linear(x, base, layer.get_base_layer().bias))
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_a_weight_cannot_be_read_of_several_adapters():
    model, layer = trained(reads=True)
    model.add_adapter("second", loqt_config(target_modules=["out_proj"], task_type=None))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="Several adapters are active"):
        model(torch.randn(2, 24))


###############################
# RWKV, Zamba2
###############################


def rwkv(**changes):
    settings = {**FAMILIES["RWKV"].settings, **changes}
    return transformers.RwkvForCausalLM(transformers.RwkvConfig(**settings))


def test_what_rwkv_rescales_is_passed_over_and_refused_by_name():
    model = get_peft_model(rwkv(rescale_every=6), loqt_config())
    names = {name.partition(".0.")[2] for name, _ in loqt_layers(model.base_model.model)} - {""}
    attention = {f"attention.{name}" for name in ("key", "receptance", "value")}
    assert names == attention | {"feed_forward.key", "feed_forward.receptance"}
    with pytest.raises(ValueError, match="rescale_every=0"):
        get_peft_model(rwkv(rescale_every=6), loqt_config(target_modules=["output"]))


def test_zamba2_trains_its_shared_block_once():
    model = FAMILIES["Zamba2"].build()
    blocks = [m for m in model.modules() if type(m).__name__ == "Zamba2AttentionDecoderLayer"]
    assert len(blocks) == 2
    parameters = sum(p.numel() for p in model.parameters())
    model = get_peft_model(model, loqt_config(full_rank_modules="all")).base_model.model
    layers = [name for name, _ in loqt_layers(model) if "shared_transformer" in name and "adapter" not in name]
    assert len(layers) == 6 and all(".1." in name for name in layers)
    assert sum(p.numel() for n, p in model.named_parameters() if ".loqt_" not in n) == parameters
    model.tie_weights()
