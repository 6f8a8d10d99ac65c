"""Tiny models of random weights, one a family, with the proportions of the real ones, and a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers


VOCABULARY = 64
LENGTH = 12
BATCH = 4

# of a decoder in LLaMA's manner
DECODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
ENCODER = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DEBERTA = {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
SEQ2SEQ = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "dropout": 0.0,
}
T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
IMAGE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 16,
    "patch_size": 8,
}
AUDIO = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": VOCABULARY,
    "classifier_proj_size": 16,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}


@dataclass(frozen=True)
class Family:
    """A family, by one of its models.

    Attributes:
        model (`str`): Name of a class in transformers.
        settings (`dict[str, Any]`): Of its configuration.
        batch (`Callable`): From a seed to the model's arguments, labels among them.
            note (`str`): For the table.
    """

    model: str
    settings: dict[str, Any]
    batch: Callable[[int], dict[str, torch.Tensor]]
    note: str = ""

    def build(self, seed: int = 0) -> transformers.PreTrainedModel:
        """The model, the same for the same seed, in float32."""
        torch.manual_seed(seed)
        model_class = getattr(transformers, self.model)
        config = model_class.config_class(**self.settings)
        # neither heads of several tensors nor caches are of interest
        config.use_cache = False
        return model_class(config).eval()


###############################
# Batches
###############################


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(seed: int, length: int = LENGTH) -> torch.Tensor:
    """int64 `[BATCH, length]`, without special tokens."""
    return torch.randint(6, VOCABULARY, (BATCH, length), generator=_generator(seed))


def noise(seed: int, *shape: int) -> torch.Tensor:
    """float32."""
    return torch.randn(BATCH, *shape, generator=_generator(seed))


def causal(seed):
    return {"input_ids": tokens(seed), "labels": tokens(seed)}


def classes(seed):
    ids = tokens(seed)
    # BART and T5 classify by the last end of sequence
    ids[:, -1] = 2
    return {"input_ids": ids, "labels": torch.arange(BATCH) % 2}


def seq2seq(seed):
    return {"input_ids": tokens(seed), "labels": tokens(seed + 1)}


def image(seed):
    return {"pixel_values": noise(seed, 3, 16, 16), "labels": torch.arange(BATCH) % 2}


def pixels_and_text(seed):
    return {"input_ids": tokens(seed), "pixel_values": noise(seed, 3, 16, 16), "return_loss": True}


def speech(seed):
    return {"input_values": noise(seed, 400), "labels": tokens(seed, 3)}


def spectrogram(seed):
    return {"input_features": noise(seed, 8, 32), "labels": tokens(seed, 6)}


def llava(seed):
    ids = tokens(seed)
    ids[:, 1:5] = 5
    return {"input_ids": ids, "pixel_values": noise(seed, 3, 16, 16), "labels": tokens(seed)}


def qwen_vl(seed):
    ids = tokens(seed)
    ids[:, 1], ids[:, 2:6], ids[:, 6] = 3, 5, 4
    # an image of 4 x 4 patches, merged two by two
    patches = torch.randn(BATCH * 16, 3 * 2 * 4 * 4, generator=_generator(seed))
    grid = torch.tensor([[1, 4, 4]] * BATCH)
    types = (ids == 5).int()
    return {
        "input_ids": ids,
        "pixel_values": patches,
        "image_grid_thw": grid,
        "mm_token_type_ids": types,
        "labels": ids,
    }


###############################
# Families
###############################


def _decoder(model: str, **settings) -> Family:
    return Family(model, {**DECODER, **settings}, causal)


def _without(settings: dict, *names: str) -> dict:
    return {name: value for name, value in settings.items() if name not in names}


_MAMBA = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 4,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, Family] = {
    "Llama": _decoder("LlamaForCausalLM"),
    "Mistral": _decoder("MistralForCausalLM", sliding_window=None),
    "Qwen2": _decoder("Qwen2ForCausalLM"),
    "Qwen3": _decoder("Qwen3ForCausalLM", head_dim=16),
    "Gemma2": _decoder("Gemma2ForCausalLM", head_dim=16),
    "Gemma3": _decoder("Gemma3ForCausalLM", head_dim=16),
    "Phi-3": _decoder("Phi3ForCausalLM"),
    "Phi": _decoder("PhiForCausalLM", num_key_value_heads=4),
    "StableLM": _decoder("StableLmForCausalLM"),
    "OLMo2": _decoder("Olmo2ForCausalLM"),
    "Cohere": _decoder("CohereForCausalLM"),
    "GLM-4": _decoder("Glm4ForCausalLM", head_dim=16),
    "SmolLM3": _decoder("SmolLM3ForCausalLM"),
    "GPT-2": Family("GPT2LMHeadModel", GPT, causal),
    "GPT-NeoX": _decoder("GPTNeoXForCausalLM"),
    "OPT": Family(
        "OPTForCausalLM",
        {**_without(DECODER, "intermediate_size"), "ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0},
        causal,
    ),
    "Bloom": Family(
        "BloomForCausalLM",
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2},
        causal,
    ),
    "Falcon": _decoder("FalconForCausalLM", new_decoder_architecture=False, multi_query=True, alibi=False),
    "RWKV": Family(
        "RwkvForCausalLM",
        {
            "hidden_size": 64,
            "attention_hidden_size": 64,
            "num_hidden_layers": 2,
            "vocab_size": VOCABULARY,
            "context_length": 64,
            "rescale_every": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        causal,
        note="with `rescale_every=0`; else it changes two weights of each block in place, and those are passed over",
    ),
    "Mamba": Family("MambaForCausalLM", _MAMBA, causal),
    "FalconMamba": Family("FalconMambaForCausalLM", _MAMBA, causal),
    "Mamba2": Family(
        "Mamba2ForCausalLM", {**_MAMBA, "head_dim": 16, "num_heads": 8, "n_groups": 2, "chunk_size": 8}, causal
    ),
    "Zamba2": Family(
        "Zamba2ForCausalLM",
        {
            **DECODER,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "hybrid_layer_ids": [1, 3],
            "num_key_value_heads": 4,
            "mamba_d_state": 4,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "use_shared_attention_adapter": False,
            "adapter_rank": 4,
        },
        causal,
    ),
    "T5": Family("T5ForConditionalGeneration", T5, seq2seq),
    "BART": Family("BartForConditionalGeneration", SEQ2SEQ, seq2seq),
    "Marian": Family("MarianMTModel", SEQ2SEQ, seq2seq),
    "BERT": Family("BertForSequenceClassification", ENCODER, classes),
    "RoBERTa": Family("RobertaForSequenceClassification", ENCODER, classes),
    "DeBERTa": Family("DebertaForSequenceClassification", DEBERTA, classes),
    "DeBERTa-v3": Family(
        "DebertaV2ForSequenceClassification",
        {**DEBERTA, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True},
        classes,
    ),
    "ModernBERT": Family(
        "ModernBertForSequenceClassification",
        {
            **_without(ENCODER, "hidden_dropout_prob", "attention_probs_dropout_prob"),
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        classes,
    ),
    "ViT": Family("ViTForImageClassification", IMAGE, image),
    "DINOv2": Family("Dinov2ForImageClassification", {**_without(IMAGE, "intermediate_size"), "mlp_ratio": 2}, image),
    "Swin": Family(
        "SwinForImageClassification",
        {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "image_size": 16, "patch_size": 2, "window_size": 4}
        | {"mlp_ratio": 4.0, "drop_path_rate": 0.0},
        image,
    ),
    "CLIP": Family(
        "CLIPModel",
        {"text_config": {**_without(ENCODER, "hidden_dropout_prob")}, "vision_config": IMAGE, "projection_dim": 16},
        pixels_and_text,
    ),
    "SigLIP": Family(
        "SiglipModel",
        {"text_config": {**_without(ENCODER, "hidden_dropout_prob"), "max_position_embeddings": LENGTH}}
        | {"vision_config": IMAGE},
        pixels_and_text,
    ),
    "Wav2Vec2": Family("Wav2Vec2ForCTC", AUDIO, speech),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32},
        spectrogram,
    ),
    "LLaVA": Family(
        "LlavaForConditionalGeneration",
        {
            "text_config": {**DECODER, "model_type": "llama"},
            "vision_config": {**IMAGE, "model_type": "clip_vision_model"},
            "image_token_id": 5,
            "vision_feature_layer": -1,
        },
        llava,
    ),
    "Qwen2-VL": Family(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
            "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2}
            | {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2},
            "image_token_id": 5,
            "vision_start_token_id": 3,
            "vision_end_token_id": 4,
        },
        qwen_vl,
    ),
}

_MIXTURE = {"num_experts_per_tok": 2, "output_router_logits": False, "moe_intermediate_size": 64}

# whose experts are one parameter `[experts, out, in]`
MIXTURES: dict[str, Family] = {
    "Mixtral": _decoder("MixtralForCausalLM", num_local_experts=4, **_MIXTURE),
    "OLMoE": _decoder("OlmoeForCausalLM", num_experts=4, **_MIXTURE),
    "Qwen3-MoE": _decoder("Qwen3MoeForCausalLM", num_experts=4, head_dim=16, **_MIXTURE),
    "Qwen3-Next": _decoder(
        "Qwen3NextForCausalLM",
        num_experts=4,
        head_dim=16,
        shared_expert_intermediate_size=64,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention"],
        **_MIXTURE,
    ),
    "DeepSeek-V3": _decoder(
        "DeepseekV3ForCausalLM",
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
        **_MIXTURE,
    ),
    "GPT-OSS": _decoder(
        "GptOssForCausalLM",
        num_local_experts=4,
        head_dim=16,
        layer_types=["full_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **_MIXTURE,
    ),
    "Jamba": _decoder(
        "JambaForCausalLM",
        num_experts=4,
        num_experts_per_tok=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        use_mamba_kernels=False,
    ),
    "Llama4": _decoder(
        "Llama4ForCausalLM",
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=128,
        interleave_moe_layer_step=1,
        head_dim=16,
        attention_chunk_size=32,
    ),
}
