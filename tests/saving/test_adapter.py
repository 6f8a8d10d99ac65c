"""Saving, loading, merging, disabling: an adapter is an exact change of the original base."""

import copy
import json
import shutil

import bitsandbytes as bnb
import pytest
import torch
from common import load_llama, loqt_config, make_trainer, single_linear, tiny_llama, token_batch, train_steps
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from loqt_peft import LoQTConfig
from loqt_peft.layers.find import loqt_layers


BASES = ["dense", "4bit", "4bit-double"]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    # 4-bit loading skips what is too small or looks like a head; 64 columns make whole blocks
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


@torch.no_grad()
def logits(model, seed=99):
    model.eval()
    return model(input_ids=token_batch(seed)).logits


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("switches", [0, 1, 5])
@pytest.mark.parametrize(
    "double_quant, quantize_weight, dtype",
    [
        (False, "nf4", torch.float32),
        (False, "nf4", torch.bfloat16),
        (True, "nf4", torch.bfloat16),
        (False, None, torch.bfloat16),
    ],
)
def test_round_trip_is_exact(base_dir, tmp_path, base, switches, double_quant, quantize_weight, dtype):
    config = loqt_config(
        double_quant=double_quant, quantize_weight=quantize_weight, full_rank_modules=["embed_tokens"]
    )
    model = get_peft_model(load_llama(base_dir, base, dtype), config)
    train_steps(model, switches)
    expected = logits(model)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(load_llama(base_dir, base, dtype), tmp_path)
    assert torch.equal(logits(loaded), expected)
    saved, restored = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(saved[k], restored[k]) for k in saved if "loqt" in k)
    assert loaded.peft_config["default"].num_updates == switches

    low_memory = PeftModel.from_pretrained(load_llama(base_dir, base, dtype), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(low_memory), expected)

    # as the Trainer saves and resumes
    make_trainer(model, tmp_path / "trainer").save_model(tmp_path / "checkpoint")
    resumed = get_peft_model(load_llama(base_dir, base, dtype), config)
    resumed.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)
    assert torch.equal(logits(resumed), expected)

    plain = load_llama(base_dir, base, dtype)
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain), expected)
    assert all(not layer.loqt_seal["default"].any() for _, layer in loqt_layers(plain))
    plain.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(load_llama(base_dir, base, dtype), tmp_path / "again")
    assert torch.equal(logits(again), expected)


def test_auto_scale_goes_with_each_layers_rank_and_width_and_is_saved(base_dir, tmp_path):
    # clamped to 64
    ranks, scales = {"k_proj": 2, "v_proj": 1000}, {"o_proj": 0.25}
    config = loqt_config(loqt_alpha="auto", rank_pattern=ranks, alpha_pattern=scales)
    model = get_peft_model(load_llama(base_dir, "dense"), config)
    for name, layer in loqt_layers(model):
        r = {"k_proj": 2, "v_proj": 64}.get(name.split(".")[-1], 8)
        expected = 0.25 if name.endswith("o_proj") else 16 / (64 * r) ** 0.5
        assert layer.scaling["default"] == pytest.approx(expected)
    train_steps(model, 2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_llama(base_dir, "dense"), tmp_path)
    assert loaded.peft_config["default"].loqt_alpha == "auto"
    assert torch.equal(logits(loaded), logits(model))
    # and it is the same as to say the number
    scales |= {"k_proj": 2**0.5, "v_proj": 0.25, ".*": 2**-0.5}
    same = get_peft_model(load_llama(base_dir, "dense"), loqt_config(rank_pattern=ranks, alpha_pattern=scales))
    train_steps(same, 2)
    torch.testing.assert_close(logits(same), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("load", ["peft", "low memory", "transformers"])
def test_tied_embeddings_stay_tied(tmp_path, load):
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), loqt_config(full_rank_modules="all"))
    train_steps(model, 2)
    model.save_pretrained(tmp_path)
    loaded = tiny_llama(seed=0, tie_word_embeddings=True)
    if load == "transformers":
        loaded.load_adapter(str(tmp_path))
    else:
        loaded = PeftModel.from_pretrained(loaded, tmp_path, low_cpu_mem_usage=load == "low memory")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_unloaded_4bit_conv1d_is_a_conv1d_again(tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=32)).save_pretrained(
        tmp_path
    )
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=quantization)
    model = get_peft_model(base, loqt_config(target_modules=["c_attn", "c_proj", "c_fc"]))
    train_steps(model, 2)
    expected = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(logits(loaded), expected, atol=1e-4)


def test_compiled_model_saves_and_loads(base_dir, tmp_path):
    model = get_peft_model(load_llama(base_dir, "dense"), loqt_config())
    train_steps(model, 2)
    expected = logits(model)
    # traced but not compiled: which keys and hooks there are does not depend on the compiler
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(logits(compiled), expected, atol=1e-5)
    compiled.save_pretrained(tmp_path)
    loaded = load_llama(base_dir, "dense")
    loaded.load_adapter(str(tmp_path))
    assert torch.allclose(logits(torch.compile(loaded, backend="eager")), expected, atol=1e-5)
    assert all(not layer.loqt_seal["default"].any() for _, layer in loqt_layers(loaded))


def test_auto_class(base_dir, tmp_path):
    model = get_peft_model(load_llama(base_dir, "dense"), loqt_config(full_rank_modules="all"))
    train_steps(model, 2)
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("saved_switches, live_switches", [(0, 2), (2, 0), (1, 3)])
def test_loading_into_a_model_that_drifted_otherwise(base_dir, tmp_path, saved_switches, live_switches):
    model = get_peft_model(load_llama(base_dir, "dense"), loqt_config())
    train_steps(model, saved_switches)
    expected = logits(model)
    model.save_pretrained(tmp_path)

    live = get_peft_model(load_llama(base_dir, "dense"), loqt_config())
    train_steps(live, live_switches, seed=50)
    Bs = [layer.loqt_B["default"] for _, layer in loqt_layers(live)]
    live.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(live), expected)
    # an optimizer that holds them goes on holding them
    assert all(B is layer.loqt_B["default"] for B, (_, layer) in zip(Bs, loqt_layers(live), strict=True))

    whole = get_peft_model(load_llama(base_dir, "dense"), loqt_config())
    train_steps(whole, live_switches, seed=50)
    whole.load_state_dict(model.state_dict())
    assert torch.equal(logits(whole), expected)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("retain_base", ["cpu", "device"])
def test_disable_unload_and_delete_give_the_original_back(base_dir, base, retain_base):
    plain = logits(load_llama(base_dir, base))
    reference = load_llama(base_dir, base)
    for module in reference.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # on processors with AVX512-BF16 it rounds in eval; a LoQT layer does not let it
            module.support_avx512bf16_for_cpu = False
    original = logits(reference)
    model = get_peft_model(load_llama(base_dir, base), loqt_config(retain_base=retain_base))
    train_steps(model, 3)
    adapted = logits(model)
    assert not torch.equal(adapted, original)
    with model.disable_adapter():
        assert torch.equal(logits(model), original)
    assert torch.equal(logits(model), adapted)

    deleted = copy.deepcopy(model)
    deleted.add_adapter("other", loqt_config())
    deleted.set_adapter("other")
    deleted.delete_adapter("default")
    assert torch.equal(logits(deleted), original)
    assert torch.equal(logits(model.unload()), plain)


def test_dropped_base_is_dropped_and_refuses(base_dir, tmp_path):
    model = get_peft_model(load_llama(base_dir, "dense"), loqt_config(retain_base="drop"))
    train_steps(model, 2)
    assert all(layer.base_layer.weight.numel() == 0 for _, layer in loqt_layers(model))
    expected = logits(model)
    for refused in (model.disable_adapter_layers, model.unload, lambda: model.delete_adapter("default")):
        with pytest.raises(ValueError, match="retain_base"):
            refused()
    with pytest.raises(ValueError, match="retain_base"):
        model.add_adapter("other", loqt_config())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load_llama(base_dir, "dense"), tmp_path)), expected)
    assert torch.allclose(logits(model.merge_and_unload()), expected, atol=1e-5)


@pytest.mark.parametrize("base", ["4bit", "4bit-double"])
def test_of_a_dropped_4bit_weight_nothing_is_held(base_dir, base):
    model = get_peft_model(load_llama(base_dir, base), loqt_config(retain_base="drop"))
    train_steps(model, 1)
    for _, layer in loqt_layers(model):
        weight = layer.get_base_layer().weight
        assert weight.numel() == weight.quant_state.absmax.numel() == 0


def test_full_rank_modules_refuse_what_needs_the_original(base_dir):
    model = get_peft_model(load_llama(base_dir, "dense"), loqt_config(full_rank_modules="all"))
    for refused in (model.disable_adapter_layers, model.unload, lambda: model.delete_adapter("default")):
        with pytest.raises(ValueError, match="full_rank_modules"):
            refused()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("switches", [0, 3])
@pytest.mark.parametrize("retain_base", ["cpu", "drop"])
def test_merge_and_unload_is_a_dense_model_for_plain_transformers(base_dir, tmp_path, base, switches, retain_base):
    model = get_peft_model(
        load_llama(base_dir, base), loqt_config(full_rank_modules=["norm"], retain_base=retain_base)
    )
    train_steps(model, switches)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(type(module) is nn.Linear for module in loaded.modules() if isinstance(module, nn.Linear))
    assert torch.allclose(logits(loaded), expected, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_merge_and_unmerge(base_dir, base):
    model = get_peft_model(load_llama(base_dir, base), loqt_config())
    train_steps(model, 3)
    expected = logits(model)
    with model.disable_adapter():
        original = logits(model)
    model.merge_adapter()
    if base == "dense":
        assert torch.allclose(logits(model), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), original)


def test_several_adapters_are_changes_of_the_same_base(base_dir):
    model = get_peft_model(load_llama(base_dir, "dense"), loqt_config())
    train_steps(model, 2)
    first = logits(model)
    model.add_adapter("second", loqt_config(quantize_weight=None, r=4))
    model.set_adapter("second")
    train_steps(model, 2, seed=70)
    second = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)

    deltas = {
        name: [layer.get_delta_weight(name) for _, layer in loqt_layers(model)] for name in ("default", "second")
    }
    dense = load_llama(base_dir, "dense")
    with torch.no_grad():
        for (name, _), a, b in zip(
            loqt_layers(model.base_model.model), deltas["default"], deltas["second"], strict=True
        ):
            dense.get_submodule(name).weight += a + b
    model.base_model.set_adapter(["default", "second"])
    assert torch.allclose(logits(model), logits(dense), atol=1e-4)
    model.merge_adapter()
    assert torch.allclose(logits(model), logits(dense), atol=1e-4)
    model.unmerge_adapter()
    model.set_adapter("second")
    assert torch.equal(logits(model), second)


def test_adapters_merged_one_after_the_other():
    W = torch.randn(8, 6)
    model, layer = single_linear(W, init_weights=False)
    model.add_adapter("second", loqt_config(target_modules=["0"], task_type=None, init_weights=False))
    names = ["default", "second"]
    deltas = [layer.get_delta_weight(name) for name in names]
    effective = [layer.effective_weight(name) for name in names]
    code, sample = layer.base_sample()
    for name in names:
        layer.merge(adapter_names=[name])
        # what is asked of the original is answered of the original
        assert all(torch.equal(layer.effective_weight(n), e) for n, e in zip(names, effective, strict=True))
        assert layer.base_sample()[0] == code and torch.equal(layer.base_sample()[1], sample)
    assert torch.allclose(layer.base_layer.weight, W + sum(deltas), atol=1e-6)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, W)


def test_only_one_adapter_trains_at_a_time(base_dir):
    model = get_peft_model(load_llama(base_dir, "dense"), loqt_config())
    model.add_adapter("second", loqt_config())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="Only one LoQT adapter"):
        model.begin_step(0)


def test_the_users_config_is_not_changed_by_training(base_dir):
    config = loqt_config()
    train_steps(get_peft_model(load_llama(base_dir, "dense"), config), 2)
    assert config.num_updates == 0
    fresh = get_peft_model(load_llama(base_dir, "dense"), config)
    assert torch.equal(logits(fresh), logits(load_llama(base_dir, "dense")))


def test_a_trained_config_asks_for_a_trained_adapter(base_dir, tmp_path):
    model = get_peft_model(load_llama(base_dir, "dense"), loqt_config())
    train_steps(model, 2)
    first = logits(model)
    model.save_pretrained(tmp_path)

    # the very config of another adapter: a copy, which goes its own way
    model.add_adapter("twin", model.peft_config["default"])
    model.set_adapter("twin")
    assert torch.equal(logits(model), first)
    train_steps(model, 1, seed=30)
    assert model.peft_config["twin"].num_updates == 3 and model.peft_config["default"].num_updates == 2
    model.set_adapter("default")
    assert torch.equal(logits(model), first)

    plain = load_llama(base_dir, "dense")
    plain.load_adapter(str(tmp_path))
    plain.add_adapter(plain.peft_config["default"], "twin")
    assert plain.active_adapters() == ["twin"] and torch.equal(logits(plain), first)

    # one that was read, or written by hand, and nothing that was loaded
    message = "'other' was made with a config of num_updates=2, .* nothing was loaded into it"
    for use in (logits, lambda m: m.save_pretrained(tmp_path / "no"), lambda m: m.merge_adapter(), train_steps_once):
        config = LoQTConfig.from_pretrained(tmp_path)
        config.inference_mode = False
        fresh = get_peft_model(load_llama(base_dir, "dense"), config, "other")
        with pytest.raises(ValueError, match=message):
            use(fresh)
    assert not (tmp_path / "no" / "other" / "adapter_model.safetensors").exists()
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(fresh, state, "other")
    assert torch.equal(logits(fresh), first)
    # where loading fails, the others go on working
    shutil.copytree(tmp_path, tmp_path / "broken")
    file = tmp_path / "broken" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "loqt_alpha": 2.0}))
    with pytest.raises(ValueError, match="Another scale"):
        model.load_adapter(tmp_path / "broken", "broken")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_adapter("broken")
    with pytest.raises(ValueError, match="nothing was loaded into it"):
        logits(model)
    # a second one is loaded beside the first
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), first)


def train_steps_once(model):
    train_steps(model, 1)


def test_no_copy_where_the_base_is_dropped(base_dir):
    model = get_peft_model(load_llama(base_dir, "dense"), loqt_config(retain_base="drop"))
    train_steps(model, 2)
    with pytest.raises(
        ValueError, match="retain_base='drop' of adapter 'default' is not allowed with several adapters"
    ):
        model.add_adapter("ref", model.peft_config["default"])
    assert list(model.peft_config) == ["default"]


def test_full_rank_modules_train_in_place_and_are_saved_once(base_dir, tmp_path):
    base = tiny_llama(tie_word_embeddings=True)
    embedding = base.get_input_embeddings().weight
    model = get_peft_model(base, loqt_config(full_rank_modules="all"))
    assert base.get_input_embeddings().weight is embedding and embedding.requires_grad
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert all(n.endswith("base_layer.weight") for n in frozen)
    train_steps(model, 2)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.model.embed_tokens.weight"], embedding)
    assert not any("lm_head" in key for key in saved)


def test_gradient_of_a_4bit_base_that_was_repacked_for_the_cpu(base_dir):
    # what bitsandbytes does in eval where the processor has AVX512-BF16
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = get_peft_model(load_llama(base_dir, "4bit", torch.bfloat16), loqt_config())
    layers = [layer for _, layer in loqt_layers(model)]
    assert not any(layer.base_layer.support_avx512bf16_for_cpu for layer in layers)
    expected = [layer.effective_weight("default") for layer in layers]
    for layer in layers:
        weight = layer.base_layer.weight
        weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    for layer, weight in zip(layers, expected, strict=True):
        # it rounds the absmax to bfloat16 on the way
        assert torch.allclose(layer.effective_weight("default"), weight, rtol=2**-8)
    train_steps(model, 1)
    assert all(layer.num_updates("default") == 1 for layer in layers)


@pytest.mark.parametrize(
    "module, target, match",
    [
        (nn.Sequential(nn.Embedding(4, 4)), "0", "Embedding, which LoQT does not support"),
        (nn.Sequential(nn.Conv2d(4, 4, 1)), "0", "Conv2d, which LoQT does not support"),
        (nn.Sequential(nn.MultiheadAttention(8, 2)), "out_proj", "inside nn.MultiheadAttention"),
    ],
)
def test_unsupported_targets_are_refused(module, target, match):
    with pytest.raises(ValueError, match=match):
        get_peft_model(module, loqt_config(target_modules=[target], task_type=None))


def test_tied_head_is_refused():
    with pytest.raises(ValueError, match="shares its weight"):
        get_peft_model(tiny_llama(tie_word_embeddings=True), loqt_config(target_modules=["lm_head"]))


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"full_rank_modules": ["nowhere"]}, "no module of that name"),
        ({"full_rank_modules": ["q_proj"]}, "target_modules"),
    ],
)
def test_full_rank_modules_that_cannot_be(kwargs, match):
    with pytest.raises(ValueError, match=match):
        get_peft_model(tiny_llama(), loqt_config(**kwargs))
