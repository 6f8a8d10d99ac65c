"""The export without loss: a base with the adapter's very codes, and a LoRA adapter that holds s·PB."""

import json

import bitsandbytes as bnb
import pytest
import torch
from common import load_llama, loqt_config, tiny_llama, token_batch, train_steps
from exports import effective_weights, exact, logits, run, trained
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from loqt_peft.algorithm.quantization import FourBitFormat
from loqt_peft.cli.main import main
from loqt_peft.layers.find import loqt_layers


VARIANTS = [
    {"double_quant": True, "quantize_weight": "fp4"},
    {"full_rank_modules": "all", "error_feedback": True},
    {"quantize_weight": None, "quantize_projection": None},
    {"modules_to_save": ["norm"], "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 2.0}},
    {"retain_base": "drop"},
]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=128, tie_word_embeddings=True).save_pretrained(path)
    return path


def own_codes(model):
    """Of each layer in 4 bits: codes and absmax, as the adapter holds them."""
    found = {}
    for name, layer in loqt_layers(model.base_model.model):
        storage = layer.weight_format("default")
        if layer.has_switched("default") and isinstance(storage, FourBitFormat):
            found[name] = storage.parts(layer.loqt_weight["default"])
    return found


CASES = [(base, switches, {}) for base in ("dense", "4bit", "4bit-double") for switches in (0, 1, 5)]
CASES += [(base, 2, kwargs) for kwargs in VARIANTS for base in ("dense", "4bit-double")]


@pytest.mark.parametrize(("base", "switches", "kwargs"), CASES)
def test_nothing_is_lost(base_dir, tmp_path, base, switches, kwargs):
    model = trained(base_dir, base, switches, **kwargs)
    expected, codes = logits(model), own_codes(model)
    ranks = {name: layer.r["default"] for name, layer in loqt_layers(model.base_model.model)}
    report = model.export(tmp_path / "out", "qlora")
    assert report.weight_error < 1e-7 and report.ranks == ranks and report.to == "qlora"
    loaded = exact(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.allclose(logits(loaded), expected, atol=2e-6)
    for name, parts in codes.items():
        weight = loaded.base_model.model.get_submodule(name).base_layer.weight
        assert torch.equal(weight.data.flatten(), parts["codes"])
        assert torch.equal(weight.quant_state.absmax, parts["absmax"])
    in_4bit = {name for name, m in loaded.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    if kwargs.get("quantize_weight", "nf4") is None and switches:
        assert not in_4bit
    else:
        assert bool(in_4bit) == (switches > 0 or base != "dense")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_the_live_model_but_for_rounding(base_dir, tmp_path, dtype):
    model = trained(base_dir, "dense", 2, dtype)
    expected, weights = logits(model), effective_weights(model)
    model.export(tmp_path / "out", "qlora")
    loaded = exact(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype))
    assert loaded.base_model.model.get_input_embeddings().weight.dtype == dtype
    assert torch.allclose(logits(loaded), expected, atol=16 * torch.finfo(dtype).eps)
    exact_base = exact(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base", dtype=torch.float32))
    merged = PeftModel.from_pretrained(exact_base, tmp_path / "out")
    for name, weight in weights.items():
        layer = merged.base_model.model.get_submodule(name)
        state = layer.base_layer.weight.quant_state
        own = bnb.functional.dequantize_4bit(layer.base_layer.weight.data, state).float()
        # what the base dequantizes to is rounded to its dtype, as in the live model
        error = (own + layer.get_delta_weight("default").float() - weight).abs().max()
        assert error <= torch.finfo(dtype).eps * weight.abs().max()


@pytest.mark.parametrize("base", ["dense", "4bit"])
def test_conv1d_and_layers_that_are_not_targeted(tmp_path, base):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if base == "4bit" else None
    model = exact(AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization))
    # both sides of P: c_attn has more outputs than inputs, mlp.c_proj fewer
    targets = ["c_attn", "mlp.c_proj"]
    model = get_peft_model(model, loqt_config(target_modules=targets, full_rank_modules="all"))
    train_steps(model, 3)
    expected = logits(model)
    model.export(tmp_path / "out", "qlora")
    loaded = exact(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.allclose(logits(loaded), expected, atol=2e-6)


LOADER = """
import sys
sys.modules["loqt_peft"] = None
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
tokens = load_file(folder + "/tokens.safetensors")["tokens"]
base = AutoModelForCausalLM.from_pretrained(folder + "/out/base")
models = {
    "auto": AutoPeftModelForCausalLM.from_pretrained(folder + "/out"),
    "transformers": AutoModelForCausalLM.from_pretrained(folder + "/out"),
    "peft": PeftModel.from_pretrained(base, folder + "/out"),
}
for module in (m for model in models.values() for m in model.modules()):
    # in eval, on processors with AVX512-BF16, bitsandbytes rounds the absmax to bfloat16
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
with torch.no_grad():
    save_file({k: m.eval()(input_ids=tokens).logits for k, m in models.items()}, folder + "/logits.safetensors")
"""


def test_loads_without_this_package(base_dir, tmp_path):
    model = trained(base_dir, full_rank_modules="all")
    expected = logits(model)
    model.export(tmp_path / "out", "qlora")
    save_file({"tokens": token_batch(99)}, tmp_path / "tokens.safetensors")
    result = run("-c", LOADER, tmp_path)
    assert result.returncode == 0, result.stderr
    for found in load_file(tmp_path / "logits.safetensors").values():
        assert torch.allclose(found, expected, atol=1e-5)


def test_command_and_the_name_of_the_base(base_dir, tmp_path, capsys):
    model = trained(base_dir)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    command = ["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--to", "qlora"]
    assert main([*command, "--base-name", "me/my-4bit-base"]) == 0
    assert "exported as qlora" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/my-4bit-base" and config["peft_type"] == "LORA"
    base = exact(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base"))
    assert torch.allclose(logits(PeftModel.from_pretrained(base, tmp_path / "out")), expected, atol=2e-6)
    assert main([*command, "--overwrite"]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((tmp_path / "out" / "base").resolve())
    # the export that loses names the one that does not
    capsys.readouterr()
    assert main([*command[:2], str(tmp_path / "lossy"), "--to", "bnb-4bit"]) == 0
    assert "--to qlora" in capsys.readouterr().out


def test_what_is_refused(base_dir, tmp_path):
    model = trained(base_dir, switches=1)
    with pytest.raises(ValueError, match="rank=4 is not allowed with to='qlora'"):
        model.export(tmp_path / "out", "qlora", rank=4)
    with pytest.raises(ValueError, match="base_name='x' is not allowed with to='dense'"):
        model.export(tmp_path / "out", "dense", base_name="x")
    assert not (tmp_path / "out").exists()
    # the base that is read must not be overwritten by the one that is written
    load_llama(base_dir, "dense").save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "base", switches=1)
    with pytest.raises(ValueError, match="is read from it"):
        model.export(tmp_path, "qlora", overwrite=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base") is not None
