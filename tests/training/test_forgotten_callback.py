"""Training that nobody asks updates for is noticed, whatever the optimizer; a healthy run is not disturbed."""

import copy
import pickle
import warnings

import pytest
import torch
from common import TokenDataset, loqt_config, make_trainer, tiny_llama, token_batch, train_steps
from conditions import needs_trl, optimizers
from datasets import Dataset
from optimi import AdamW as OptimiAdamW
from optimi import prepare_for_gradient_release
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.training_args import OptimizerNames

from loqt_peft import LoQTTrainerCallback
from loqt_peft.layers.find import loqt_layers
from loqt_peft.layers.training_watch import never_updated_findings


EMPTY = "is still empty after a backward pass in training, so B cannot learn"
NO_FURTHER = "nobody asks for further ones"
SAVED = "was trained, but has learned nothing"
MISSING = "the update of the first step was not carried out"
# of each way in which an optimizer steps; the others of the Trainer are of the same classes, refused, or for other devices
OPTIMIZERS = [
    "adafactor",
    "adagrad",
    "adamw_bnb_8bit",
    "adamw_torch",
    "adamw_torch_8bit",
    "adamw_torch_fused",
    "ademamix",
    "grokadamw",
    "lion_8bit",
    "lomo",
    "paged_adamw_8bit",
    "rmsprop_bnb",
    "schedule_free_adamw",
    "schedule_free_radam",
    "sgd",
    "stable_adamw",
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
    pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported"),
]


@pytest.fixture(autouse=True, scope="module")
def without_compilation():
    # torchao's optimizers and bitsandbytes compile for every new shape
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def loqt_model(**kwargs):
    return get_peft_model(tiny_llama(num_hidden_layers=1), loqt_config(update_interval=100, **kwargs))


def said(recorded):
    """Which of our warnings came, each once."""
    texts = {str(warning.message) for warning in recorded}
    return sorted(kind for kind in (EMPTY, NO_FURTHER, SAVED, MISSING) if any(kind in text for text in texts))


def backward(model, seed=0):
    model(input_ids=token_batch(seed), labels=token_batch(seed)).loss.backward()


###############################
# Noticed
###############################


@pytest.mark.parametrize("optim", optimizers(OPTIMIZERS))
def test_every_optimizer_of_the_trainer(optim):
    with pytest.warns(UserWarning) as recorded:
        make_trainer(loqt_model(), "unused", optim=optim, max_steps=2).train()
    assert said(recorded) == [EMPTY]


def test_optimizers_are_those_of_the_trainer():
    assert set(OPTIMIZERS) <= {name.value for name in OptimizerNames}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"gradient_accumulation_steps": 2, "max_steps": 1},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}, "max_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}, "max_steps": 2},
    ],
    ids=["accumulation", "checkpointing", "reentrant"],
)
def test_second_forward_pass_is_the_latest(kwargs):
    with pytest.warns(UserWarning) as recorded:
        make_trainer(loqt_model(), "unused", **kwargs).train()
    assert said(recorded) == [EMPTY]


@needs_trl
def test_sft_trainer():
    from trl import SFTConfig, SFTTrainer

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    args = SFTConfig(
        "unused", max_steps=2, use_cpu=True, bf16=False, report_to="none", save_strategy="no", eos_token="1"
    )
    data = Dataset.from_list([{"input_ids": tokens.tolist()} for tokens in TokenDataset(8).tokens])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="1", pad_token="0")
    with pytest.warns(UserWarning) as recorded:
        SFTTrainer(loqt_model(), args, train_dataset=data, processing_class=tokenizer).train()
    assert said(recorded) == [EMPTY]


def test_loop_of_ones_own():
    model = loqt_model()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    with pytest.warns(UserWarning, match=EMPTY):
        backward(model)


def test_compiled_model():
    # no code of ours runs in its forward pass, so that the second backward pass says it
    model = loqt_model()
    model.train()
    with torch.compiler.set_stance("default"):
        compiled = torch.compile(model, backend="aot_eager")
        backward(compiled)
        with pytest.warns(UserWarning, match=EMPTY):
            backward(compiled)


def test_copied_model_is_watched_too():
    model = copy.deepcopy(loqt_model())
    model.train()
    backward(model)
    with pytest.warns(UserWarning, match=EMPTY):
        backward(model)


@pytest.mark.parametrize("path", ["loaded", "trained before"])
def test_adapter_that_trains_on_without_updates(path, tmp_path):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny_llama(num_hidden_layers=1), loqt_config(update_interval=100))
    if path == "loaded":
        train_steps(model, 2)
        model.save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(tiny_llama(num_hidden_layers=1), tmp_path / "adapter", is_trainable=True)
    else:
        make_trainer(model, "unused", [LoQTTrainerCallback()], max_steps=2).train()
    with pytest.warns(UserWarning) as recorded:
        make_trainer(model, "unused", max_steps=2).train()
    assert said(recorded) == [NO_FURTHER]


def test_end_of_the_step_forgotten():
    model = loqt_model()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.begin_step(0)
    backward(model)
    optimizer.step()
    with pytest.warns(UserWarning, match=MISSING):
        model.begin_step(1)


def test_begin_of_training_missed():
    with pytest.warns(UserWarning, match=MISSING):
        loqt_model().begin_step(1)


@pytest.mark.parametrize("save", ["save_pretrained", "save_model", "injected"])
def test_saving_what_has_learned_nothing(save, tmp_path):
    model = tiny_llama(num_hidden_layers=1)
    if save == "injected":
        model.add_adapter(loqt_config())
    else:
        model = get_peft_model(model, loqt_config())
    trainer = make_trainer(model, tmp_path, max_steps=1)
    trainer.train()
    with pytest.warns(UserWarning, match=SAVED):
        trainer.save_model() if save == "save_model" else model.save_pretrained(tmp_path)
    # nothing is lost
    assert (tmp_path / "adapter_model.safetensors").exists()


###############################
# No false alarm
###############################


@pytest.fixture
def silence():
    """Nothing of ours is said."""
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        yield
    assert said(recorded) == []


def test_healthy_trainer(silence, tmp_path):
    model = loqt_model()
    kwargs = {"gradient_accumulation_steps": 2, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(model, tmp_path, [LoQTTrainerCallback()], eval_dataset=TokenDataset(8), **kwargs)
    trainer.train()
    trainer.save_model()


@pytest.mark.parametrize("update_mode", ["backward", "stagger", "whole"])
def test_healthy_loop(silence, tmp_path, update_mode):
    model = get_peft_model(tiny_llama(), loqt_config(update_interval=3, update_mode=update_mode))
    # the turn of some layers comes later
    train_steps(model, 1)
    model.save_pretrained(tmp_path)
    train_steps(model, 4, start=1)
    model.save_pretrained(tmp_path)


def test_nothing_but_forward_passes(silence, tmp_path):
    model = loqt_model()
    model.train()
    for _ in range(2):
        with torch.no_grad():
            model(input_ids=token_batch(), labels=token_batch())
    model.eval()
    for _ in range(2):
        model(input_ids=token_batch(), labels=token_batch())
    model.save_pretrained(tmp_path)


def test_one_backward_pass_before_training(silence):
    # to find out how much memory it takes, say
    model = loqt_model()
    model.train()
    backward(model)
    model.zero_grad()
    train_steps(model, 2)


def test_forward_passes_after_training(silence):
    model = loqt_model()
    model.train()
    backward(model)
    model.zero_grad()
    train_steps(model, 1)
    # training has ended; what came before it has been answered
    model.cancel_step()
    model.train()
    model(input_ids=token_batch())


@pytest.mark.parametrize(
    "name, checkpointing", [("deberta", None), ("deberta", False), ("deberta", True), ("albert", None)]
)
def test_module_that_runs_several_times(silence, name, checkpointing):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64, "num_labels": 2}
    if name == "deberta":
        shared = {
            "relative_attention": True,
            "share_att_key": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
        }
        base = DebertaV2ForSequenceClassification(DebertaV2Config(num_hidden_layers=1, **sizes, **shared))
    else:
        base = AlbertForSequenceClassification(AlbertConfig(num_hidden_layers=2, embedding_size=32, **sizes))
    model = get_peft_model(
        base, loqt_config(task_type="SEQ_CLS", target_modules="all-linear", exclude_modules=["classifier"])
    )
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        base.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for step in range(2):
        model.begin_step(step)
        model(input_ids=token_batch(step), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
        model.end_step(optimizer)
        optimizer.zero_grad()


def test_random_adapter_is_an_ordinary_one(silence, tmp_path):
    model = loqt_model(init_weights=False)
    model.train()
    for _ in range(3):
        backward(model)
    model.save_pretrained(tmp_path)


def test_random_adapter_may_begin_at_any_step(silence):
    train_steps(loqt_model(init_weights=False), 1, start=3)


@pytest.mark.filterwarnings("ignore:The gradient of 7 of 7 LoQT layers is not finite")
def test_first_update_that_waits_is_not_taken_for_a_missing_one(silence, tmp_path):
    model = loqt_model()
    model.train()
    model.begin_step(0)
    (model(input_ids=token_batch(), labels=token_batch()).loss * float("inf")).backward()
    assert model.end_step() is None
    model.save_pretrained(tmp_path)


def test_frozen_adapter_is_not_trained(silence, tmp_path):
    model = loqt_model()
    model.enable_input_require_grads()
    for _, layer in loqt_layers(model):
        layer.loqt_B["default"].requires_grad_(False)
    model.train()
    for _ in range(3):
        backward(model)
    model.save_pretrained(tmp_path)


def test_watching_does_not_get_in_the_way():
    model = loqt_model()
    pickle.loads(pickle.dumps(model))
    # refuses parameters with hooks of its kind
    prepare_for_gradient_release(model, OptimiAdamW(model.parameters(), lr=0.01, gradient_release=True))
    layers = [layer for _, layer in loqt_layers(model)]
    assert never_updated_findings(layers, "default") == []
