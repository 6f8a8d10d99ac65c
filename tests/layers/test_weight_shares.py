"""What share of a model's weights is in 4 bits, stays dense and frozen, or trains at full rank; and that users are told."""

import warnings

import pytest
import torch
from common import load_llama, loqt_config, make_trainer, tiny_llama, train_steps
from peft import PeftModel, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, ViTConfig, ViTForImageClassification

from loqt_peft import LoQTTrainerCallback
from loqt_peft.layers.weight_shares import weight_shares


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MIXTURES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "gpt_oss": {"num_local_experts": 4},
}
# q, k, v, o, and of a dense model gate, up, down
ATTENTION, MLP, EMBEDDINGS = 4 * 32 * 32, 3 * 32 * 48, 64 * 32
EXPERTS = 2 * 4 * MLP


def mixture(model_type):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SIZES, **MIXTURES[model_type]))


def base_weights(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_shares_of_a_llama():
    model = tiny_llama()
    total, norms = base_weights(model), 5 * 32
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(model, loqt_config())
    shares = weight_shares(model, "default")
    assert (shares.low_bit, shares.low_rank_dense, shares.full_rank) == (2 * (ATTENTION + MLP), 0, 0)
    assert shares.dense_frozen == 2 * EMBEDDINGS + norms and shares.total == total
    assert list(shares.largest_dense_frozen)[:2] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert not shares.findings() and not shares.fused_frozen
    assert str(shares).startswith(
        "weights: 80.4% in 4 bits, 19.6% dense and frozen (most in model.embed_tokens.weight)"
    )
    # neither updates nor merging change what is what
    train_steps(model, 1)
    assert weight_shares(model, "default") == shares


def test_shares_of_other_settings():
    model = get_peft_model(tiny_llama(), loqt_config(quantize_weight=None, full_rank_modules="all"))
    shares = weight_shares(model, "default")
    assert (shares.low_bit, shares.low_rank_dense) == (0, 2 * (ATTENTION + MLP))
    assert (shares.dense_frozen, shares.full_rank) == (0, 2 * EMBEDDINGS + 5 * 32)
    assert "trained by LoQT without quantizing" in str(shares)
    model = get_peft_model(tiny_llama(), loqt_config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    shares = weight_shares(model, "default")
    assert (shares.low_bit, shares.full_rank) == (2 * 32 * 32, EMBEDDINGS)
    assert shares.total == base_weights(tiny_llama())
    # tied weights once
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), loqt_config())
    assert weight_shares(model, "default").dense_frozen == EMBEDDINGS + 5 * 32


@pytest.mark.parametrize("retain_base", ["device", "cpu", "drop"])
def test_shares_of_a_4bit_base_and_of_one_that_is_gone(tmp_path, retain_base):
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    model = load_llama(tmp_path, "4bit-double")
    model = get_peft_model(model, loqt_config(target_modules=["q_proj"], retain_base=retain_base))
    before = weight_shares(model, "default")
    # of the other layers too, by their true sizes
    assert before.low_bit == 2 * 7 * 64 * 64
    train_steps(model, 1)
    assert weight_shares(model, "default") == before


@pytest.mark.parametrize("model_type", MIXTURES)
def test_fused_experts_are_told_at_wrapping(tmp_path, model_type):
    with pytest.warns(
        UserWarning, match=r"% of the model's weights stays dense and frozen: .*experts\.gate_up_proj"
    ) as told:
        model = get_peft_model(mixture(model_type), loqt_config())
    assert len([w for w in told if "fused parameter" in str(w.message)]) == 1
    shares = weight_shares(model, "default")
    biases = 2 * 4 * (2 * 48 + 32) if model_type == "gpt_oss" else 0
    assert sum(shares.fused_frozen.values()) == EXPERTS
    assert shares.dense_frozen >= EXPERTS + biases
    assert [finding.code for finding in shares.findings()] == ["fused_weights_frozen"]
    assert list(shares.largest_dense_frozen)[:2] == [
        "model.layers.*.mlp.experts.gate_up_proj",
        "model.layers.*.mlp.experts.down_proj",
    ]
    train_steps(model, 1)
    model.save_pretrained(tmp_path)
    # not when the adapter is used only
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(mixture(model_type), tmp_path)


def test_fused_experts_at_full_rank_are_told():
    with pytest.warns(UserWarning, match="of the model's weights trains at full rank: .*experts"):
        model = get_peft_model(mixture("mixtral"), loqt_config(full_rank_modules="all"))
    assert [finding.code for finding in weight_shares(model, "default").findings()] == ["fused_weights_at_full_rank"]


def test_convolutions_and_tokens_are_no_fused_weights():
    model = ViTForImageClassification(
        ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=64)
    )
    shares = weight_shares(get_peft_model(model, loqt_config(task_type=None)), "default")
    assert shares.dense_frozen > shares.total / 2 and not shares.fused_frozen


def test_the_trainer_prints_them(tmp_path, capsys):
    model = get_peft_model(tiny_llama(), loqt_config(full_rank_modules=["norm"]))
    make_trainer(model, tmp_path, [LoQTTrainerCallback()], max_steps=1).train()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("LoQT: weights"))
    assert line == f"LoQT: {weight_shares(model, 'default')}"
    assert "80.4% in 4 bits" in line and "0.1% trained at full rank (most in model.norm.weight)" in line
