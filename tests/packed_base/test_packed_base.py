"""Bases that are packed as they are read, or layer by layer out of memory."""

import copy
import gc
import os
import shutil
import weakref
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import transformers
from common import load_llama, loqt_config, tiny_llama, token_batch, train_steps
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from loqt_peft import LoQTQuantizationConfig, pack_model
from loqt_peft.layers.find import loqt_layers


SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(**SIZES).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def damaged(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


def load(folder, dtype=torch.float32, **kwargs):
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=LoQTQuantizationConfig(**kwargs))


def assert_same(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


###############################
# What is read
###############################


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_it_is_bit_for_bit_what_is_packed_after_loading_and_what_bitsandbytes_makes(
    checkpoint, quant_type, double_quant, dtype
):
    config = {"quantize_weight": quant_type, "double_quant": double_quant}
    packed = load(checkpoint, dtype, **config)
    loaded = LlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    assert_same(packed, pack_model(loaded, quantization_config=LoQTQuantizationConfig(**config)))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    assert_same(packed, LlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype, quantization_config=quantization))


def test_its_codes_are_those_that_a_layer_would_hold(checkpoint):
    # after a switch with nothing learned, W is the base, quantized
    dense = get_peft_model(load_llama(checkpoint, "dense"), loqt_config(compensation_steps=0))
    packed = get_peft_model(load(checkpoint), loqt_config(compensation_steps=0))
    for model in (dense, packed):
        train_steps(model, 1, lr=0.0)
    own = [dict(loqt_layers(model.base_model.model)) for model in (dense, packed)]
    assert own[0].keys() == own[1].keys()
    for name, layer in own[0].items():
        assert torch.equal(layer.loqt_weight["default"], own[1][name].loqt_weight["default"]), name


def test_the_result_is_a_checkpoint_of_bitsandbytes(checkpoint, tmp_path):
    model = load(checkpoint, double_quant=True, modules_to_not_convert=["k_proj"])
    model.save_pretrained(tmp_path)
    # nothing of this package is needed
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config.quantization_config.quant_method == "bitsandbytes"
    assert_same(model, again)


def test_what_is_left_dense(checkpoint):
    model = load(checkpoint, modules_to_not_convert=["k_proj", "model.layers.1"])
    packed = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    attention, mlp = ("q_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    expected = [f"self_attn.{name}" for name in attention] + [f"mlp.{name}" for name in mlp]
    assert packed == {f"model.layers.0.{name}" for name in expected}


def test_the_defaults_are_what_loqt_trains_by_default(checkpoint):
    model = load(checkpoint)
    packed = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    model = get_peft_model(model, loqt_config())
    assert packed == {name for name, _ in loqt_layers(model.base_model.model)}


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"quantize_weight": "int8"}, "quantize_weight='int8' is not allowed: one of 'nf4', 'fp4'"),
        ({"double_quant": 1}, "double_quant=1 is not allowed"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert='lm_head' is not allowed: a list"),
    ],
)
def test_settings_that_are_not_allowed(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LoQTQuantizationConfig(**kwargs)


def test_nothing_is_offloaded(checkpoint):
    for device_map in ({"model": 0, "lm_head": "cpu"}, {"": "disk"}):
        with pytest.raises(ValueError, match="device_map=.* is not allowed"):
            LlamaForCausalLM.from_pretrained(
                checkpoint, quantization_config=LoQTQuantizationConfig(), device_map=device_map
            )


def test_one_tensor_after_the_other_is_read(checkpoint, monkeypatch):
    # transformers would read ahead in threads
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    seen = []
    original = transformers.core_model_loading.spawn_materialize
    monkeypatch.setattr(
        transformers.core_model_loading,
        "spawn_materialize",
        lambda pool, *args, **kwargs: seen.append(pool) or original(pool, *args, **kwargs),
    )
    load(checkpoint)
    assert len(seen) == 21 and set(seen) == {None}
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


###############################
# Damage
###############################


def shard_of(folder, name):
    return next(file for file in folder.glob("*.safetensors") if name in load_file(file))


@pytest.mark.parametrize("how", ["truncated", "header", "empty"])
def test_a_damaged_file_is_named(damaged, how):
    file = shard_of(damaged, "model.layers.1.mlp.down_proj.weight")
    content = file.read_bytes()
    file.write_bytes({"truncated": content[:-100], "header": b"\xff" * 20 + content[20:], "empty": b""}[how])
    with pytest.raises(ValueError, match=f"{file.name}' is truncated or damaged"):
        load(damaged)
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


def change(file, name, tensor):
    tensors = load_file(file)
    tensors.pop(name)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.full((64, 128), torch.nan), f"{NAME} holds NaN or infinity, in '.*NAME'"),
        (torch.eye(64, 128).mul(torch.inf).nan_to_num(nan=0.0, posinf=torch.inf), f"{NAME} holds NaN.*NAME"),
        (torch.ones(128, 64), rf"{NAME} has shape \(128, 64\), and the model expects \(64, 128\), in '.*NAME'"),
        (
            torch.ones(64, 128, dtype=torch.int8),
            f"{NAME} is of dtype I8, which needs a scale or is not floating, in '.*NAME'",
        ),
        (torch.ones(64, 128).to(torch.float8_e4m3fn), f"{NAME} is of dtype F8_E4M3, which .* in '.*NAME'"),
    ],
)
def test_a_tensor_that_cannot_be_packed_is_named_with_its_file(damaged, tensor, message):
    file = shard_of(damaged, NAME)
    change(file, NAME, tensor)
    with pytest.raises(ValueError, match=message.replace("NAME", file.name)):
        load(damaged)


def test_a_shard_that_lacks_a_tensor_is_named(damaged):
    file = shard_of(damaged, NAME)
    change(file, NAME, None)
    with pytest.raises(ValueError, match=f"{file.name}' lacks what the index says it holds: {NAME}"):
        load(damaged)


def test_a_checkpoint_without_a_tensor_is_refused(tmp_path):
    # transformers would make one of random values, and warn
    tiny_llama(**SIZES).save_pretrained(tmp_path)
    change(tmp_path / "model.safetensors", NAME, None)
    with pytest.raises(ValueError, match=f"cannot be packed.*\n- {NAME} is missing"):
        load(tmp_path)


def test_only_safetensors_can_be_read_tensor_by_tensor(tmp_path):
    model = tiny_llama(**SIZES)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin' cannot be packed as it is read: only safetensors"):
        load(tmp_path)


###############################
# A model in memory, or without weights
###############################


def make(name, **settings):
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**settings))


MODELS = {
    "LlamaForCausalLM": {**SIZES, "num_attention_heads": 4, "vocab_size": 64, "tie_word_embeddings": True},
    # initialized by the modules above the layers
    "T5ForConditionalGeneration": {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 1, "num_heads": 2}
    | {"vocab_size": 50},
    # a Conv1D is `[in, out]`
    "GPT2LMHeadModel": {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 40}
    | {"bos_token_id": 1, "eos_token_id": 1},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_weights_gets_those_that_transformers_would_give_it(name):
    with torch.device("meta"):
        model = make(name, **MODELS[name])
    reference = copy.deepcopy(model).to_empty(device="cpu")
    torch.manual_seed(3)
    reference.initialize_weights()
    reference.tie_weights()
    pack_model(reference)
    torch.manual_seed(3)
    pack_model(model)
    assert_same(model, reference)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    tied = reference.get_output_embeddings().weight is reference.get_input_embeddings().weight
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize("source", ["cpu", "meta"])
def test_no_more_of_it_is_dense_than_must_be(source, monkeypatch):
    settings = {**MODELS["LlamaForCausalLM"], "num_hidden_layers": 6, "vocab_size": 10}
    with torch.device(source):
        model = make("LlamaForCausalLM", **settings)
    storages, alive = [], []
    if source == "cpu":
        storages += [weakref.ref(p.untyped_storage()) for p in model.model.layers.parameters() if p.dim() == 2]
    empty_like, pack = torch.empty_like, bnb.nn.Params4bit.__new__

    def watched(tensor, **kwargs):
        made = empty_like(tensor, **kwargs)
        if made.dim() == 2 and made.shape[0] > 10:
            storages.append(weakref.ref(made.untyped_storage()))
        return made

    def counted(cls, *args, **kwargs):
        alive.append(sum(storage() is not None for storage in storages))
        return pack(cls, *args, **kwargs)

    monkeypatch.setattr(torch, "empty_like", watched)
    monkeypatch.setattr(bnb.nn.Params4bit, "__new__", counted)
    gc.disable()
    try:
        pack_model(model)
    finally:
        gc.enable()
    assert len(storages) == 42
    if source == "cpu":
        assert alive[0] == 42 and alive[-1] <= 2
    else:
        assert max(alive) == 7


@pytest.mark.parametrize("source", ["cpu", "meta"])
def test_it_trains_from_the_start_in_4_bits(source):
    with torch.device(source):
        model = make("LlamaForCausalLM", **MODELS["LlamaForCausalLM"])
    model = get_peft_model(pack_model(model, "cpu"), loqt_config(full_rank_modules="all"))
    layers = [layer for _, layer in loqt_layers(model.base_model.model)]
    assert len(layers) == 14 and all(layer.quantization_backend is not None for layer in layers)
    tokens = token_batch()
    model.eval()
    before = model(input_ids=tokens, labels=tokens).loss
    assert train_steps(model, 6)[-1].num_updates == 6
    assert model(input_ids=tokens, labels=tokens).loss < before


def test_what_cannot_be_packed():
    model = make("LlamaForCausalLM", **MODELS["LlamaForCausalLM"])
    with pytest.raises(ValueError, match="No layer of this LlamaForCausalLM can be packed beside"):
        pack_model(model, quantization_config=LoQTQuantizationConfig(modules_to_not_convert=["model"]))
    with pytest.raises(ValueError, match="dtype=torch.float64 is not allowed"):
        pack_model(copy.deepcopy(model).double())
    broken = copy.deepcopy(model)
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="'model.layers.1.mlp.up_proj' cannot be packed: it holds NaN"):
        pack_model(broken)
    packed = pack_model(copy.deepcopy(model))
    with pytest.raises(ValueError, match="quantized already"):
        pack_model(packed)
    model.model.norm.to("meta")
    with pytest.raises(ValueError, match="some are not"):
        pack_model(model)
    with pytest.raises(ValueError, match="has an adapter"):
        pack_model(
            get_peft_model(make("LlamaForCausalLM", **MODELS["LlamaForCausalLM"]), loqt_config()).base_model.model
        )


def test_the_bar_is_shown_late_and_obeys_the_switches(monkeypatch):
    import datasets
    from transformers.utils import logging

    from loqt_peft.packed_base import model as packing

    assert packing._progress_bar(3).delay == packing._PATIENCE
    datasets.disable_progress_bars()
    try:
        assert packing._progress_bar(3).disable
    finally:
        datasets.enable_progress_bars()
    logging.disable_progress_bar()
    try:
        assert isinstance(packing._progress_bar(3), logging.EmptyTqdm)
        pack_model(make("LlamaForCausalLM", **MODELS["LlamaForCausalLM"]))
    finally:
        logging.enable_progress_bar()
