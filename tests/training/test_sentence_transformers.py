"""The trainer of sentence-transformers, which calls its models with one dict."""

import pytest
import torch
from common import loqt_config
from conditions import transformers_loads_into_models_without_a_head
from datasets import Dataset
from peft import get_peft_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BatchEncoding, BertConfig, BertModel, PreTrainedTokenizerFast

from loqt_peft import LoQTTrainerCallback
from loqt_peft.layers.find import loqt_layers
from loqt_peft.training.performance import count_tokens


WORDS = "a cat dog sits runs on the mat far away small big red house tree".split()
SENTENCES = [
    f"the {size} {animal} {verb}" for size in ("small", "big") for animal in ("cat", "dog") for verb in WORDS[3:5]
]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(special + WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(path)
    return path


def sentence_model(base_dir):
    transformer = Transformer(str(base_dir))
    return SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu")


def by_adapter(model, config):
    model.add_adapter(config)


def by_peft(model, config):
    model[0].model = get_peft_model(model[0].auto_model, config)


@transformers_loads_into_models_without_a_head
@pytest.mark.parametrize("add", [by_adapter, by_peft])
def test_trains_saves_and_loads(base_dir, tmp_path, add):
    model = sentence_model(base_dir)
    before = model.encode(SENTENCES)
    add(model, loqt_config(r=4, update_interval=4, task_type="FEATURE_EXTRACTION"))
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=4,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    pairs = Dataset.from_dict({"anchor": SENTENCES, "positive": SENTENCES[1:] + SENTENCES[:1]})
    trainer = SentenceTransformerTrainer(
        model, args, pairs, loss=MultipleNegativesRankingLoss(model), callbacks=[LoQTTrainerCallback()]
    )
    trainer.train()
    assert {layer.num_updates("default") for _, layer in loqt_layers(model)} == {3}
    # 2 sentences of 4 words and 2 marks in each of 4 pairs
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3 and all(entry["loqt/tokens_per_second"] > 0 for entry in entries)
    trained = model.encode(SENTENCES)
    assert abs(trained - before).max() > 0.01

    if add is by_adapter:
        model.save_pretrained(str(tmp_path / "saved"))
        loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    else:
        model[0].auto_model.save_pretrained(tmp_path / "saved")
        loaded = sentence_model(base_dir)
        loaded.load_adapter(str(tmp_path / "saved"))
    assert (loaded.encode(SENTENCES) == trained).all()


IDS, MASK, FEATURES = torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 5, 8)


@pytest.mark.parametrize(
    "inputs, tokens",
    [
        ({"input_ids": IDS, "attention_mask": IDS}, 10),
        (({"input_ids": IDS, "attention_mask": IDS},), 10),
        ((BatchEncoding({"input_ids": IDS, "token_type_ids": IDS}),), 10),
        (([{"input_ids": IDS}, {"input_ids": IDS}],), 20),
        (({"query": {"input_ids": IDS}, "document": {"input_ids": IDS}, "labels": IDS},), 20),
        (((IDS, IDS),), 10),
        ((IDS, MASK), 10),
        ({"inputs_embeds": FEATURES, "input_ids": None}, 10),
        (({"inputs_embeds": FEATURES, "attention_mask": IDS},), 10),
        ({"pixel_values": FEATURES}, 0),
        ((FEATURES,), 0),
        (({"pixel_values": FEATURES, "labels": IDS},), 0),
        ({"input_features": FEATURES, "labels": IDS}, 0),
        (([FEATURES, IDS],), 0),
        (([1, 2], "text", None), 0),
        ((MASK,), 0),
        ((), 0),
    ],
)
def test_tokens_are_counted_where_there_are_ids(inputs, tokens):
    assert count_tokens(inputs) == tokens
