"""`target_modules=None`: the linear layers of the blocks, for every listed type of model."""

import re

import pytest
import torch
import transformers
from common import loqt_config
from peft import get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from loqt_peft.layers.find import loqt_layers
from loqt_peft.layers.target_modules import TARGET_MODULES_MAPPING


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


IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
}
VISION = {**IMAGE, "patch_size": 8}
AUDIO = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 50,
    "classifier_proj_size": 16,
    "tdnn_dim": (16, 16),
    "tdnn_kernel": (2, 2),
    "tdnn_dilation": (1, 1),
    "xvector_output_dim": 16,
}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 50,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
CLIP = {"text_config": {**BERT, "eos_token_id": 2, "bos_token_id": 1}, "vision_config": VISION, "projection_dim": 16}
GPT2 = {
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 40,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
# class of the model -> its configuration, and the linear layers that are heads
HEADS = {
    "ViTForImageClassification": (VISION, {"classifier"}),
    "ViTForMaskedImageModeling": ({**VISION, "encoder_stride": 8}, set()),
    "ViTMAEForPreTraining": (
        {**VISION, "decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
        | {"decoder_intermediate_size": 32},
        # its decoder has blocks of its own
        {"decoder.decoder_embed", "decoder.decoder_pred"},
    ),
    "DeiTForImageClassificationWithTeacher": (VISION, {"cls_classifier", "distillation_classifier"}),
    "CLIPModel": (CLIP, set()),
    "CLIPForImageClassification": (CLIP, {"classifier"}),
    "Wav2Vec2ForCTC": (AUDIO, {"lm_head"}),
    "Wav2Vec2ForSequenceClassification": (AUDIO, {"projector", "classifier"}),
    "Wav2Vec2ForXVector": (
        AUDIO,
        {"projector", "tdnn.0.kernel", "tdnn.1.kernel", "feature_extractor", "classifier"},
    ),
    "HubertForSequenceClassification": (AUDIO, {"projector", "classifier"}),
    "WhisperForConditionalGeneration": (
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32},
        {"proj_out"},
    ),
    "BartForConditionalGeneration": (SEQ2SEQ, {"lm_head"}),
    "BartForSequenceClassification": (SEQ2SEQ, {"classification_head.dense", "classification_head.out_proj"}),
    "BartForQuestionAnswering": (SEQ2SEQ, {"qa_outputs"}),
    "GPT2LMHeadModel": (GPT2, {"lm_head"}),
    "GPT2ForTokenClassification": (GPT2, {"classifier"}),
    "GPT2DoubleHeadsModel": (GPT2, {"lm_head", "multiple_choice_head.summary"}),
    "FunnelForMaskedLM": (
        {"vocab_size": 50, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 2, "d_head": 16}
        | {"d_inner": 64},
        {"lm_head"},
    ),
    "RoFormerForMaskedLM": (BERT, {"cls.predictions.transform.dense", "cls.predictions.decoder"}),
    "LongformerForQuestionAnswering": ({**BERT, "attention_window": 4}, {"qa_outputs"}),
}


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_are_no_default_targets(name, targets):
    settings, heads = HEADS[name]
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**settings))
    linear = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    assert heads <= linear
    model = get_peft_model(model, loqt_config(r=4, task_type=None, target_modules=targets))
    assert {n for n, _ in loqt_layers(model.base_model.model)} == linear - heads


def test_a_head_that_is_named_is_a_target():
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))
    model = get_peft_model(model, loqt_config(r=2, task_type=None, target_modules=["classifier"]))
    assert [n for n, _ in loqt_layers(model.base_model.model)] == ["classifier"]


def test_a_second_adapter_has_the_same_default_targets():
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))
    config = {"r": 4, "task_type": None, "target_modules": "all-linear", "modules_to_save": ["classifier"]}
    model = get_peft_model(model, loqt_config(**config))
    model.add_adapter("second", loqt_config(**config))
    layers = [layer for _, layer in loqt_layers(model)]
    assert len(layers) == 6 and all(set(layer.loqt_B) == {"default", "second"} for layer in layers)


def test_the_head_of_a_model_of_no_known_kind():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4)), "head": nn.Linear(4, 2)})
    model = get_peft_model(model, loqt_config(r=2, task_type=None, target_modules="all-linear"))
    assert [n for n, _ in loqt_layers(model.base_model.model)] == ["body.0"]
