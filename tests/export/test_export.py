"""Leaving LoQT: three exports that load without this package, and what each of them loses."""

import gc
import json
import math
import types
import weakref
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit
from common import load_llama, loqt_config, tiny_llama, token_batch, train_steps
from exports import effective_weights, exact, logits, run, trained
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from loqt_peft import LoQTConfig
from loqt_peft.algorithm.quantization import FourBitFormat
from loqt_peft.cli import adapter as cli_adapter
from loqt_peft.cli.adapter import base_class, load_base
from loqt_peft.cli.main import main
from loqt_peft.export import conversion
from loqt_peft.layers.find import loqt_layers


BASES = ["dense", "4bit", "4bit-double"]
TO = ["dense", "bnb-4bit", "lora"]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tied_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tied")
    tiny_llama(hidden_size=64, intermediate_size=128, tie_word_embeddings=True).save_pretrained(path)
    return path


def changes(model):
    return {name: layer.get_delta_weight("default") for name, layer in loqt_layers(model.base_model.model)}


def relative_error(exported, expected, reference=None):
    reference = expected if reference is None else reference
    error = sum((exported[name] - weight).double().square().sum() for name, weight in expected.items())
    return (error / sum(weight.double().square().sum() for weight in reference.values())).sqrt().item()


def weights(model, names):
    found = {}
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, bnb.nn.Linear4bit):
            found[name] = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        else:
            found[name] = (module.weight.T if isinstance(module, Conv1D) else module.weight).detach().float()
    return found


def lora_changes(path):
    saved = load_file(path / "adapter_model.safetensors")
    suffix = ".lora_A.weight"
    return {
        key.removeprefix("base_model.model.").removesuffix(suffix): saved[key.replace("lora_A", "lora_B")] @ A
        for key, A in saved.items()
        if key.endswith(suffix)
    }


VARIANTS = [
    {},
    {"full_rank_modules": "all"},
    {"full_rank_modules": ["norm", "embed_tokens"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"modules_to_save": ["lm_head", "norm"]},
]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("switches", [0, 3])
@pytest.mark.parametrize("kwargs", VARIANTS)
def test_dense(base_dir, tmp_path, base, switches, kwargs):
    model = trained(base_dir, base, switches, **kwargs)
    expected, wanted = logits(model), effective_weights(model)
    report = model.export(tmp_path / "out", "dense")
    assert (report.to, report.layers, report.weight_error, report.change_error) == ("dense", len(wanted), 0, 0)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(type(module) is nn.Linear for module in loaded.modules() if isinstance(module, nn.Linear))
    found = weights(loaded, wanted)
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    assert torch.equal(logits(loaded), logits(model.base_model.model))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("switches", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kwargs", [*VARIANTS, {"quantize_weight": "fp4", "double_quant": True}])
def test_4bit(base_dir, tmp_path, base, switches, dtype, kwargs):
    model = trained(base_dir, base, switches, dtype, **kwargs)
    wanted, changed = effective_weights(model), changes(model)
    report = model.export(tmp_path / "out", "bnb-4bit")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    quantized = {name for name, module in loaded.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    live = model.base_model.model
    assert quantized == {name for name, module in live.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert quantized >= set(wanted)
    found = weights(loaded, wanted)
    assert relative_error(found, wanted) == pytest.approx(report.weight_error, rel=1e-6)
    assert relative_error(found, wanted, changed) == pytest.approx(report.change_error, rel=1e-6)
    assert 0.01 < report.weight_error < 0.2
    for name, weight in wanted.items():
        storage = FourBitFormat(tuple(weight.shape), kwargs.get("quantize_weight", "nf4"), "double_quant" in kwargs)
        assert torch.equal(found[name], storage.unpack(storage.pack(weight), dtype).float())
    state = loaded.get_submodule(min(wanted)).weight.quant_state
    assert (state.quant_type, state.nested) == (kwargs.get("quantize_weight", "nf4"), "double_quant" in kwargs)
    assert all(
        torch.equal(p, q) for p, q in zip(live.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert torch.equal(logits(exact(loaded)), logits(exact(live)))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("switches", [0, 3])
@pytest.mark.parametrize("kwargs", VARIANTS)
def test_lora(base_dir, tmp_path, base, switches, kwargs):
    model = trained(base_dir, base, switches, **kwargs)
    expected, wanted = logits(model), changes(model)
    full = model.export(tmp_path / "full", "lora", rank=64)
    assert full.change_error < 1e-5 and set(full.ranks.values()) == {64}
    loaded = exact(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "full")) if base == "dense" else None
    other = exact(PeftModel.from_pretrained(load_llama(base_dir, base), tmp_path / "full"))
    assert torch.allclose(logits(other), expected, atol=1e-4)
    assert loaded is None or torch.allclose(logits(loaded), expected, atol=1e-4)

    low = model.export(tmp_path / "low", "lora", rank=4)
    found = lora_changes(tmp_path / "low")
    assert set(found) == set(wanted) == set(low.ranks) and set(low.ranks.values()) == {4}
    assert low.change_error == pytest.approx(relative_error(found, wanted), rel=1e-5)
    assert low.weight_error == pytest.approx(relative_error(found, wanted, effective_weights(model)), rel=1e-5)
    if switches:
        assert low.change_error > 0.1
    # the live model is as it was
    assert torch.equal(logits(model), expected)


def test_lora_energy_threshold(base_dir, tmp_path):
    model = trained(base_dir)
    wanted = changes(model)
    report = model.export(tmp_path / "out", "lora", rank=0.9)
    assert len(set(report.ranks.values())) > 1
    found = lora_changes(tmp_path / "out")
    for name, rank in report.ranks.items():
        energy = torch.linalg.svdvals(wanted[name]).square()
        assert rank == int((energy.cumsum(0) < 0.9 * energy.sum()).sum()) + 1
        assert (found[name] - wanted[name]).square().sum() <= (0.1 + 1e-4) * energy.sum()
    assert report.change_error < math.sqrt(0.1) + 1e-4
    loaded = PeftModel.from_pretrained(load_llama(base_dir, "dense"), tmp_path / "out")
    for name, rank in report.ranks.items():
        assert loaded.base_model.model.get_submodule(name).r["default"] == rank
    assert model.export(tmp_path / "half", "lora", rank=0.5, dtype=torch.bfloat16).change_error > 0.5
    assert {t.dtype for t in load_file(tmp_path / "half" / "adapter_model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("base", ["dense", "4bit"])
@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize("kwargs", [{}, {"full_rank_modules": "all"}, {"modules_to_save": ["embed_tokens"]}])
def test_tied_embeddings(tied_dir, tmp_path, base, to, kwargs):
    model = trained(tied_dir, base, **kwargs)
    expected = logits(model)
    model.export(tmp_path / "out", to, rank=64 if to == "lora" else None)
    if to == "lora":
        loaded = exact(PeftModel.from_pretrained(load_llama(tied_dir, base), tmp_path / "out"))
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if to == "bnb-4bit":
        assert torch.equal(logits(loaded), logits(model.base_model.model))
    else:
        assert torch.allclose(logits(loaded), expected, atol=1e-4)
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == ("modules_to_save" not in kwargs)


@pytest.mark.parametrize("switches", [0, 2])
def test_an_update_far_below_the_quantization_step_survives_where_it_can(base_dir, tmp_path, switches):
    def tuned(update):
        model = trained(base_dir, switches=0)
        with torch.no_grad():
            for _, layer in loqt_layers(model):
                layer.loqt_B["default"].zero_()
        if switches:
            model = trained(base_dir, switches=switches)
        before, steps = effective_weights(model), []
        for (name, layer), seed in zip(loqt_layers(model.base_model.model), range(100), strict=False):
            B = layer.loqt_B["default"]
            noise = torch.randn(B.shape, generator=torch.Generator().manual_seed(seed))
            kept = B.detach().clone()
            with torch.no_grad():
                B.copy_(noise)
                change = layer.low_rank_weight("default").abs().max()
                # NF4's levels lie 0.08 to 0.3 of a block's largest weight apart
                step = 0.08 * before[name].abs().max()
                B.copy_(kept + update * noise * 1e-3 * step / change)
            steps.append(step)
        return model, before

    torch.manual_seed(1)
    model, before = tuned(1.0)
    wanted = {name: weight - before[name] for name, weight in effective_weights(model).items()}
    assert all(0 < update.abs().max() < 1.1e-3 * 0.08 * before[name].abs().max() for name, update in wanted.items())
    originals = {name: effective_weights(model)[name] - change for name, change in changes(model).items()}

    model.export(tmp_path / "lora", "lora", rank=64)
    found = lora_changes(tmp_path / "lora")
    found = {name: originals[name] + found[name] - before[name] for name in wanted}
    assert relative_error(found, wanted) < 1e-2

    report = model.export(tmp_path / "dense", "dense")
    found = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), wanted)
    assert relative_error({name: found[name] - before[name] for name in wanted}, wanted) < 1e-2
    assert report.change_error == 0

    torch.manual_seed(1)
    report = tuned(1.0)[0].export(tmp_path / "4bit", "bnb-4bit")
    torch.manual_seed(1)
    tuned(0.0)[0].export(tmp_path / "4bit-without", "bnb-4bit")
    found, without = (
        weights(AutoModelForCausalLM.from_pretrained(tmp_path / folder), wanted) for folder in ("4bit", "4bit-without")
    )
    assert relative_error({name: found[name] - without[name] for name in wanted}, wanted) > 0.9
    if not switches:
        # the change is the update alone, and drowns
        assert report.change_error > 10


def test_dense_keeps_what_a_16_bit_base_would_round_away(base_dir, tmp_path):
    wanted = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = trained(base_dir, dtype=torch.bfloat16)
        wanted[dtype] = effective_weights(model)
        report = model.export(tmp_path / str(dtype), "dense", dtype=dtype)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(dtype))
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert report.weight_error == pytest.approx(relative_error(weights(loaded, wanted[dtype]), wanted[dtype]))
        assert (report.weight_error == 0) == (dtype == torch.float32)


@pytest.mark.parametrize("to", ["dense", "bnb-4bit"])
def test_4bit_layers_that_are_not_targeted(base_dir, tmp_path, to):
    model = get_peft_model(load_llama(base_dir, "4bit-double"), loqt_config(target_modules=["q_proj"]))
    v_proj = model.base_model.model.model.layers[0].self_attn.v_proj
    original = weights(model.base_model.model, ["model.layers.0.self_attn.v_proj"])
    train_steps(model, 2)
    wanted = effective_weights(model)
    # as bitsandbytes leaves it after eval where the processor has AVX512-BF16
    if not getattr(v_proj.weight.quant_state, "packing_format_for_cpu", False):
        v_proj.weight.data, v_proj.weight.quant_state = _convert_weight_packed_for_cpu(
            v_proj.weight.data, v_proj.weight.quant_state
        )
    report = model.export(tmp_path / "out", to)
    assert report.layers == len(wanted) == 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative_error(weights(loaded, original), original) < 2**-8
    assert relative_error(weights(loaded, wanted), wanted) == pytest.approx(report.weight_error, abs=1e-7)
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in loaded.modules()) == (to == "bnb-4bit")


@pytest.mark.parametrize("base", ["dense", "4bit"])
@pytest.mark.parametrize("to", TO)
def test_conv1d(tmp_path, base, to):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")

    def load():
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if base == "4bit" else None
        return exact(AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization))

    # c_attn alone, so that others stay 4-bit layers that are not targeted; its bias is trained in place
    model = get_peft_model(load(), loqt_config(target_modules=["c_attn"], full_rank_modules="all"))
    train_steps(model, 3)
    expected, wanted = logits(model), effective_weights(model)
    report = model.export(tmp_path / "out", to, rank=64 if to == "lora" else None)
    if to == "lora":
        loaded = exact(PeftModel.from_pretrained(load(), tmp_path / "out"))
        assert torch.allclose(logits(loaded), expected, atol=1e-4)
        return
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative_error(weights(loaded, wanted), wanted) == pytest.approx(report.weight_error, abs=1e-7)
    if to == "dense":
        assert torch.allclose(logits(loaded), expected, atol=1e-4)
    assert torch.equal(logits(exact(loaded)), logits(exact(model.base_model.model)))


def test_biases_of_targeted_layers_travel(tmp_path):
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
        attention_bias=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "base", full_rank_modules="all")
    expected = logits(model)
    bias = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias
    assert bias.abs().max() > 1e-3
    model.export(tmp_path / "lora", "lora", rank=64)
    loaded = PeftModel.from_pretrained(load_llama(tmp_path / "base", "dense"), tmp_path / "lora")
    assert torch.allclose(logits(loaded), expected, atol=1e-4)
    # it keeps them when PEFT saves it again
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(load_llama(tmp_path / "base", "dense"), tmp_path / "again")
    assert torch.equal(logits(again), logits(loaded))
    model.export(tmp_path / "4bit", "bnb-4bit")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "4bit")), logits(model.base_model.model))


def test_skipped_layers_whose_name_ends_another(tmp_path):
    torch.manual_seed(0)
    config = DistilBertConfig(dim=64, hidden_dim=128, n_layers=1, n_heads=2, vocab_size=64)
    model = DistilBertForSequenceClassification(config)
    targets = ["pre_classifier", "q_lin"]
    model = get_peft_model(model, loqt_config(target_modules=targets, task_type=None, init_weights=False))
    model.export(tmp_path / "out", "bnb-4bit")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(loaded.classifier) is nn.Linear and isinstance(loaded.pre_classifier, bnb.nn.Linear4bit)
    assert torch.equal(logits(loaded), logits(model.base_model.model))


def test_dropped_base(base_dir, tmp_path):
    model = trained(base_dir, retain_base="drop")
    with pytest.raises(ValueError, match="retain_base='drop'"):
        model.export(tmp_path / "lora", "lora", rank=4)
    expected = logits(model)
    report = model.export(tmp_path / "dense", "dense")
    assert report.weight_error == 0 and report.change_error is None
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected, atol=1e-5)


def test_generation_config_is_kept(base_dir, tmp_path):
    for to in ("dense", "bnb-4bit"):
        model = trained(base_dir, switches=1)
        model.base_model.model.generation_config.max_new_tokens = 7
        model.export(tmp_path / to, to)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / to).generation_config.max_new_tokens == 7


@pytest.mark.parametrize("base", ["dense", "4bit"])
@pytest.mark.parametrize("to", ["dense", "bnb-4bit"])
def test_a_layer_is_freed_once_it_is_converted(base_dir, tmp_path, monkeypatch, base, to):
    model = trained(base_dir, base)
    layers = [layer for _, layer in loqt_layers(model)]
    tensors = [weakref.ref(layer.loqt_B["default"]) for layer in layers]
    tensors += [weakref.ref(layer.base_layer.weight) for layer in layers] if base == "4bit" else []
    count = len(layers)
    del layers
    alive = []
    original = conversion.exported_weight

    def counted(layer):
        alive.append(sum(reference() is not None for reference in tensors))
        return original(layer)

    monkeypatch.setattr(conversion, "exported_weight", counted)
    gc.collect()
    gc.disable()
    try:
        model.export(tmp_path / "out", to)
    finally:
        gc.enable()
    # one layer of slack
    assert all(n <= len(tensors) * (count - i + 1) / count for i, n in enumerate(alive)) and len(alive) == count


###############################
# Without this package
###############################

LOADER = """
import json, sys
sys.modules["loqt_peft"] = None
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
base, folder = sys.argv[1:]
tokens = load_file(folder + "/tokens.safetensors")["tokens"]
dense = AutoModelForCausalLM.from_pretrained(folder + "/dense")
four = AutoModelForCausalLM.from_pretrained(folder + "/bnb-4bit")
lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder + "/lora")
models = {"dense": dense, "bnb-4bit": four, "lora": lora}
with torch.no_grad():
    logits = {to: model.eval()(input_ids=tokens).logits for to, model in models.items()}
save_file(logits, folder + "/logits.safetensors")
"""


def test_all_load_without_this_package(tied_dir, tmp_path):
    for to in ("lora", "dense", "bnb-4bit"):
        model = trained(tied_dir, full_rank_modules="all")
        expected = logits(model)
        model.export(tmp_path / to, to, rank=64 if to == "lora" else None)
    save_file({"tokens": token_batch(99)}, tmp_path / "tokens.safetensors")
    result = run("-c", LOADER, tied_dir, tmp_path)
    assert result.returncode == 0, result.stderr
    loaded = load_file(tmp_path / "logits.safetensors")
    assert torch.allclose(loaded["dense"], expected, atol=1e-5)
    assert torch.equal(loaded["bnb-4bit"], logits(model.base_model.model))
    assert torch.allclose(loaded["lora"], expected, atol=1e-4)


###############################
# Command line
###############################


@pytest.fixture(scope="module")
def adapter_dir(base_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    model = trained(base_dir, full_rank_modules=["norm"])
    model.save_pretrained(path)
    tokenizer = Tokenizer(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    save_file({"logits": logits(model)}, path / "logits.safetensors")
    return path


@pytest.mark.parametrize("to", TO)
def test_command(base_dir, adapter_dir, tmp_path, capsys, to):
    out = tmp_path / "out"
    rank = ["--rank", "64"] if to == "lora" else []
    assert main(["export", str(adapter_dir), str(out), "--to", to, *rank]) == 0
    printed = capsys.readouterr().out
    assert f"14 LoQT layers exported as {to}" in printed and "error relative to the weights: " in printed
    assert (out / "tokenizer.json").exists()
    if to == "lora":
        loaded = PeftModel.from_pretrained(load_llama(base_dir, "dense"), out)
        assert "rank: 64" in printed
    else:
        loaded = AutoModelForCausalLM.from_pretrained(out)
    atol = 1.0 if to == "bnb-4bit" else 1e-4
    assert torch.allclose(logits(loaded), load_file(adapter_dir / "logits.safetensors")["logits"], atol=atol)


@pytest.mark.parametrize("base", BASES)
def test_command_loads_the_base_as_the_adapter_was_trained_on_it(base_dir, tmp_path, base):
    # most layers are not targeted, so the base's own storage is most of the model
    model = trained(base_dir, base, target_modules=["q_proj"])
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--to", "dense"]) == 0
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, atol=1e-4)


def test_command_options(base_dir, adapter_dir, tmp_path):
    out = tmp_path / "out"
    arguments = ["export", adapter_dir, out, "--to", "dense", "--dtype", "bfloat16", "--base-model", base_dir]
    result = run("-m", "loqt_peft", *arguments)
    assert result.returncode == 0, result.stderr
    assert "Converting layers: 100%" in result.stderr
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(out).parameters()} == {torch.bfloat16}
    # a LoRA adapter there would be loaded on top of the dense model
    assert main(["export", str(adapter_dir), str(out), "--to", "lora", "--rank", "0.5", "--overwrite"]) == 0
    assert not (out / "model.safetensors").exists() and not (out / "config.json").exists()
    assert (out / "adapter_model.safetensors").exists()


def test_command_refuses_in_one_line(base_dir, adapter_dir, tmp_path, capsys):
    get_peft_model(load_llama(base_dir, "dense"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    tiny_llama().save_pretrained(tmp_path / "other")
    out = str(tmp_path / "out")
    for arguments, message in [
        ([str(tmp_path / "nowhere"), out, "--to", "dense"], "nowhere"),
        ([str(tmp_path / "lora"), out, "--to", "dense"], "type LORA, not LoQT"),
        ([str(adapter_dir), out, "--to", "lora"], "rank=None"),
        ([str(adapter_dir), out, "--to", "dense", "--rank", "3"], "only with 'lora' is it chosen"),
        ([str(adapter_dir), str(adapter_dir), "--to", "dense", "--overwrite"], "is read from it"),
        ([str(adapter_dir), str(base_dir), "--to", "dense", "--overwrite"], "is read from it"),
        ([str(adapter_dir), str(tmp_path / "lora"), "--to", "dense"], "holds a model already"),
        ([str(adapter_dir), out, "--to", "dense", "--base-model", str(tmp_path / "other")], "cannot be loaded"),
    ]:
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error
    assert not Path(out).exists()
    with pytest.raises(SystemExit) as caught:
        main(["export", str(adapter_dir), out, "--to", "gguf"])
    assert caught.value.code == 2


def test_base_is_loaded_as_the_adapter_says(base_dir):
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    model = load_base(loqt_config(), str(base_dir), quantization_config=quantization)
    assert isinstance(model, LlamaForCausalLM) and isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    mapping = {"base_model_class": "LlamaModel", "parent_library": "transformers.models.llama.modeling_llama"}
    config = loqt_config(task_type=None, auto_mapping=mapping)
    model = load_base(config, str(base_dir), dtype="bfloat16")
    assert type(model) is LlamaModel and model.dtype == torch.bfloat16
    assert base_class(loqt_config(task_type="SEQ_CLS")) is AutoModelForSequenceClassification
    with pytest.raises(ValueError, match="not imported from a config"):
        base_class(loqt_config(task_type=None, auto_mapping={**mapping, "parent_library": "os"}))


###############################
# Bad input
###############################


@pytest.mark.parametrize(
    "to, rank, match",
    [
        ("gguf", None, "to='gguf' is not allowed"),
        ("dense", 8, "only with 'lora' is it chosen"),
        ("lora", None, "rank=None is not allowed"),
        ("lora", 0, "rank=0 is not allowed"),
        ("lora", True, "rank=True is not allowed"),
        ("lora", -0.5, "rank=-0.5 is not allowed"),
        ("lora", 1.5, "rank=1.5 is not allowed"),
        ("lora", float("nan"), "rank=nan is not allowed"),
        ("lora", 65, "has at most rank 64"),
    ],
)
def test_bad_arguments(base_dir, tmp_path, to, rank, match):
    model = trained(base_dir, switches=1)
    expected = logits(model)
    with pytest.raises(ValueError, match=match):
        model.export(tmp_path / "out", to, rank=rank)
    assert not (tmp_path / "out").exists() and torch.equal(logits(model), expected)


def test_output_folder(base_dir, tmp_path):
    model = trained(base_dir, switches=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="it is a file"):
        model.export(tmp_path / "file", "dense")
    with pytest.raises(ValueError, match="is read from it"):
        model.export(base_dir, "dense", overwrite=True)
    model.export(tmp_path / "out", "lora", rank=4)
    with pytest.raises(ValueError, match="holds a model already"):
        model.export(tmp_path / "out", "lora", rank=8)
    assert set(model.export(tmp_path / "out", "lora", rank=8, overwrite=True).ranks.values()) == {8}
    model.export(tmp_path / "out", "dense", overwrite=True)
    assert not list((tmp_path / "out").glob("adapter*"))


def test_states_that_are_refused(base_dir, tmp_path):
    model = trained(base_dir, switches=1)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.export(tmp_path / "out", "dense")
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        model.export(tmp_path / "out", "dense")
    model.add_adapter("other", loqt_config())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="One adapter must be active"):
        model.export(tmp_path / "out", "dense")
    model.base_model.set_adapter("default")
    with torch.no_grad():
        next(loqt_layers(model))[1].loqt_B["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.export(tmp_path / "out", "dense")
    assert not (tmp_path / "out").exists()

    model = trained(base_dir, switches=1)
    model.export(tmp_path / "out", "dense")
    with pytest.raises(ValueError, match="exported already"):
        model.export(tmp_path / "again", "dense")

    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), loqt_config(target_modules=["0"], task_type=None))
    with pytest.raises(ValueError, match="Only transformers models"):
        model.export(tmp_path / "plain", "dense")


def test_one_of_several_adapters(base_dir, tmp_path):
    model = trained(base_dir, switches=2)
    expected = logits(model)
    model.add_adapter("other", loqt_config(target_modules=["q_proj", "lm_head"], init_weights=False))
    assert model.export(tmp_path / "out", "dense").layers == 14
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(loaded), expected, atol=1e-5)


HEAD_OF_LAYERS = {
    "roberta": {},
    "xlm-roberta": {},
    "electra": {"embedding_size": 16},
    "mpnet": {},
}


def sequence_classifier(model_type):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
        max_position_embeddings=40,
        pad_token_id=0,
        num_labels=3,
        **HEAD_OF_LAYERS[model_type],
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


def trained_classifier(model_type):
    # PEFT trains a copy of the head, which is a module of several layers
    model = get_peft_model(sequence_classifier(model_type), loqt_config(r=4, task_type="SEQ_CLS")).train()
    tokens = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        model.begin_step(step)
        model(input_ids=tokens, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        model.end_step(optimizer)
        optimizer.zero_grad()
    return model.eval(), tokens


@pytest.mark.parametrize("model_type", HEAD_OF_LAYERS)
def test_a_head_of_several_layers_is_merged_and_unloaded(tmp_path, model_type):
    model, tokens = trained_classifier(model_type)
    head = {n: p.clone() for n, p in model.base_model.model.classifier.modules_to_save["default"].named_parameters()}
    weights = {n: layer.effective_weight("default") for n, layer in loqt_layers(model.base_model.model)}
    with torch.no_grad():
        logits = model(tokens).logits
        merged = model.merge_and_unload()
        assert torch.allclose(merged(tokens).logits, logits, atol=1e-6)
    assert type(merged.classifier).__name__.endswith("ClassificationHead")
    assert {n: torch.equal(p, head[n]) for n, p in merged.classifier.named_parameters()} == dict.fromkeys(head, True)
    assert all(torch.equal(merged.get_submodule(n).weight, weight) for n, weight in weights.items())

    merged.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(tokens).logits, merged(tokens).logits)
    base = trained_classifier(model_type)[0].unload()
    with torch.no_grad():
        hidden = [m.base_model(tokens)[0] for m in (base, sequence_classifier(model_type))]
    assert torch.equal(*hidden)


@pytest.mark.parametrize("to", ["dense", "bnb-4bit"])
def test_a_head_of_several_layers_is_exported(tmp_path, to):
    model, tokens = trained_classifier("roberta")
    model.export(tmp_path, to=to)
    with torch.no_grad():
        expected = exact(model.base_model.model)(tokens).logits
        loaded = exact(AutoModelForSequenceClassification.from_pretrained(tmp_path)).eval()
        assert torch.equal(loaded(tokens).logits, expected)


def test_a_revision_is_asked_for_only_of_what_it_is_of(monkeypatch, tmp_path):
    asked = []

    def from_pretrained(name, **kwargs):
        asked.append((name, kwargs.get("revision")))
        if name == "adapter":
            raise OSError("no tokenizer")
        return types.SimpleNamespace(save_pretrained=lambda folder: None)

    # the adapter's own is none of the base's
    monkeypatch.setattr(cli_adapter.AutoTokenizer, "from_pretrained", from_pretrained)
    assert cli_adapter.copy_tokenizer(tmp_path, "adapter", "base", revision="v2") == "base"
    assert asked == [("adapter", "v2"), ("base", None)]
    # and the base's is none of another base
    asked.clear()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    config = LoQTConfig(task_type="CAUSAL_LM", base_model_name_or_path="base", revision="v1")
    for name in ("base", "other"):
        cli_adapter.load_base(config, name)
    assert asked == [("base", "v1"), ("other", None)]
