"""`target_modules=None`: the linear layers of the blocks, for every listed type of model."""

import re

import pytest
import torch
from common import loqt_config
from peft import get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

from loqt_peft.target_modules import TARGET_MODULES_MAPPING
from loqt_peft.update import loqt_layers


BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
    "pad_token_id": 0,
    "max_position_embeddings": 40,
}
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
T5 = {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 50,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
CONFIGS = {
    **dict.fromkeys(TARGET_MODULES_MAPPING, BERT),
    "albert": {**BERT, "embedding_size": 16},
    "deberta": DEBERTA,
    # as in DeBERTaV3, but for its sizes
    "deberta-v2": {**DEBERTA, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 50},
    "electra": {**BERT, "embedding_size": 16},
    "modernbert": {**BERT, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "t5": T5,
    "mt5": T5,
}
CASES = [(model_type, {}) for model_type in CONFIGS] + [
    ("deberta-v2", {"share_att_key": False}),
    ("t5", {"feed_forward_proj": "gated-gelu"}),
]


def build(model_type, changes):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**CONFIGS[model_type], **changes, "num_labels": 3})
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("model_type, changes", CASES)
def test_all_linear_layers_of_the_blocks_and_no_others(model_type, changes):
    model = build(model_type, changes)
    # blocks are numbered
    expected = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(r"\.\d+\.", n)}
    model = get_peft_model(model, loqt_config(r=4, task_type="SEQ_CLS"))
    assert {name for name, _ in loqt_layers(model.base_model.model)} == expected


@pytest.mark.parametrize("model_type, changes", CASES)
def test_all_of_them_are_updated_and_the_head_is_trained(model_type, changes):
    # PEFT adds `classifier` and `score`, the names of all heads but T5's
    config = loqt_config(r=4, task_type="SEQ_CLS", modules_to_save=["classification_head"] * model_type.endswith("t5"))
    model = get_peft_model(build(model_type, changes), config).train()
    head = {n: p.detach().clone() for n, p in model.named_parameters() if "modules_to_save" in n}
    assert head
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(0))
    # T5 takes the class from the last end of sequence
    tokens[:, -1] = 1
    for step in range(2):
        model.begin_step(step)
        model(input_ids=tokens, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        update = model.end_step(optimizer)
        optimizer.zero_grad()
    assert update.gradient_energy > 0
    layers = dict(loqt_layers(model))
    assert {layer.num_updates("default") for layer in layers.values()} == {2}
    # a layer without a gradient would have kept a P of zeros
    assert all(layer.projection("default").any() for layer in layers.values())
    trained = dict(model.named_parameters())
    assert all(not torch.equal(trained[name], before) for name, before in head.items())


def test_other_models_mean_all_linear_layers_but_the_head():
    config = CONFIG_MAPPING["llama"](
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=50, pad_token_id=0
    )
    model = AutoModelForSequenceClassification.from_config(config)
    expected = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "score"}
    model = get_peft_model(model, loqt_config(r=4, task_type="SEQ_CLS"))
    assert {name for name, _ in loqt_layers(model.base_model.model)} == expected
