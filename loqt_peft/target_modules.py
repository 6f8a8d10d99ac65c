"""Which layers `target_modules=None` means, by the type of the model."""

from __future__ import annotations


_BERT = ["query", "key", "value", "intermediate.dense", "output.dense"]

# The linear layers of the blocks, but not of poolers and projected embeddings: those are small, and often new. Of a model that
# is not listed all linear layers but the output head are meant.
TARGET_MODULES_MAPPING: dict[str, list[str]] = {
    "albert": ["query", "key", "value", "attention.dense", "ffn", "ffn_output"],
    "bert": _BERT,
    "camembert": _BERT,
    "deberta": ["in_proj", "pos_proj", "pos_q_proj", "intermediate.dense", "output.dense"],
    "deberta-v2": [
        "query_proj",
        "key_proj",
        "value_proj",
        "pos_key_proj",
        "pos_query_proj",
        "intermediate.dense",
        "output.dense",
    ],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "electra": _BERT,
    "modernbert": ["Wqkv", "Wi", "Wo"],
    "mpnet": ["attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "roberta": _BERT,
    "t5": ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"],
    "xlm-roberta": _BERT,
}
