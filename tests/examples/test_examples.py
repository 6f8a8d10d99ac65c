"""examples/pretraining/run_clm.py, called as the demo calls it."""

import json
import sys

import pytest
from common import ROOT
from conditions import TRAINER_LOGS_NORMS_WITHOUT_CLIPPING
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from loqt_peft.training.per_layer import PerLayerOptimizer


# the examples are healthy runs
pytestmark = pytest.mark.filterwarnings("error::loqt_peft.LoQTWarning")

EXAMPLE = ROOT / "examples" / "pretraining"
TEXT = "The state of the union is strong, and the union of the states is strong.\n" * 200


@pytest.fixture(scope="module")
def run_clm():
    sys.path.insert(0, str(EXAMPLE))
    try:
        import run_clm
    finally:
        sys.path.remove(str(EXAMPLE))
    return run_clm


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    (path / "text.txt").write_text(TEXT)
    (path / "empty.txt").write_text("")
    (path / "short.txt").write_text("The state.\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path / "tokenizer")
    config = json.loads((EXAMPLE / "configs" / "llama_9m.json").read_text())
    config.update(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    (path / "config.json").write_text(json.dumps(config))
    return path


def arguments(inputs, output_dir, **changes):
    options = {
        "config_name": inputs / "config.json",
        "tokenizer_name": inputs / "tokenizer",
        "train_file": inputs / "text.txt",
        "cache_dir": output_dir / "cache",
        "output_dir": output_dir,
        "block_size": 32,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "update_interval": 2,
        "rank": 4,
        "learning_rate": 0.01,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "do_train": True,
        **changes,
    }
    return [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]


def test_pretraining_goes_on_from_its_last_checkpoint(run_clm, inputs, tmp_path):
    run_clm.main(arguments(inputs, tmp_path))
    base = (tmp_path / "base_model" / "model.safetensors").read_bytes()
    metrics = run_clm.main(arguments(inputs, tmp_path, max_steps=8, do_eval=True))
    assert metrics["perplexity"] < 300
    assert (tmp_path / "base_model" / "model.safetensors").read_bytes() == base
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    # gaps of 2 + ⌊1.2^i⌋: steps 0, 3 and 6
    assert model.peft_config["default"].num_updates == 3


def test_full_rank_baseline(run_clm, inputs, tmp_path):
    run_clm.main(arguments(inputs, tmp_path, method="full", max_steps=1))
    AutoModelForCausalLM.from_pretrained(tmp_path)


class KeepOptimizer(TrainerCallback):
    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.optimizer = optimizer.optimizer


@pytest.mark.parametrize("method", ["loqt", "full"])
def test_per_layer_updates_change_nothing_but_memory(run_clm, inputs, tmp_path, method):
    options = {"method": method, "max_grad_norm": 0, "save_strategy": "no", "logging_steps": 1}
    base = tmp_path / "base"
    run_clm.main(arguments(inputs, base, **options, max_steps=1))
    # the same base, which is random
    source = {"config_name": None, "model_name_or_path": base / "base_model"} if method == "loqt" else {}
    saved, histories = [], []
    for per_layer_updates in (False, True):
        output_dir = tmp_path / str(per_layer_updates)
        keep = KeepOptimizer()
        run_clm.main(arguments(inputs, output_dir, **options, **source, per_layer_updates=per_layer_updates), [keep])
        assert isinstance(keep.optimizer, PerLayerOptimizer) is per_layer_updates
        saved.append(next(output_dir.glob("*model.safetensors")).read_bytes())
        state = json.loads((output_dir / "trainer_state.json").read_text())
        histories.append([entry for entry in state["log_history"] if "loss" in entry])
    assert saved[0] == saved[1]
    for ordinary, layer_by_layer in zip(*histories, strict=True):
        if TRAINER_LOGS_NORMS_WITHOUT_CLIPPING:
            assert layer_by_layer["grad_norm"] == pytest.approx(ordinary["grad_norm"], rel=1e-5)
        assert layer_by_layer["loqt/tokens_per_second"] > 0


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"config_name": None}, "either --model_name_or_path or --config_name"),
        ({"tokenizer_name": None}, "needs --tokenizer_name"),
        ({"train_file": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"train_file": __file__}, "must end in one of"),
        ({"train_file": None}, "train_file"),
        ({"validation_split_percentage": 100}, "validation_split_percentage 100"),
        ({"block_size": 100_000}, "block_size 100000 is more than"),
        ({"rank": 0}, "r=0 is not allowed"),
        ({"update_interval": 0}, "update_interval=0 is not allowed"),
        ({"do_train": False}, "nothing to do"),
        ({"streaming": True, "max_steps": -1}, "needs --max_steps"),
        ({"method": "full", "load_in_4bit": True}, "load_in_4bit"),
        ({"method": "lora", "loqt_alpha": "auto"}, "--loqt_alpha auto is LoQT's"),
        ({"per_layer_updates": True}, "max_grad_norm=1.0 is not allowed with per-layer updates"),
        ({"per_layer_updates": True, "max_grad_norm": 0, "optim": "sgd"}, "optim='sgd'"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere: no such directory"),
    ],
)
def test_bad_arguments_are_told_in_one_error(run_clm, inputs, tmp_path, changes, match):
    with pytest.raises(run_clm.BadInput, match=match):
        run_clm.main(arguments(inputs, tmp_path, **changes))


@pytest.mark.parametrize("name, match", [("empty", "empty"), ("short", "shorter than one block")])
def test_texts_that_hold_no_block(run_clm, inputs, tmp_path, name, match):
    with pytest.raises(run_clm.BadInput, match=match):
        run_clm.main(arguments(inputs, tmp_path, train_file=inputs / f"{name}.txt", validation_split_percentage=0))


@pytest.mark.parametrize("size", ["9m", "60m", "130m", "350m", "1b", "7b", "13b"])
def test_configurations_have_the_size_they_are_named_for(size):
    config = json.loads((EXAMPLE / "configs" / f"llama_{size}.json").read_text())
    h, i, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    parameters = config["num_hidden_layers"] * (4 * h * h + 3 * h * i) + 2 * v * h
    named = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    assert 0.85 <= parameters / named <= 1.4
