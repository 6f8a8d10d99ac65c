"""examples/glue: every task and method, from a random DeBERTaV3 of tiny sizes."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from common import ROOT
from peft import AutoPeftModelForSequenceClassification
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, DebertaV2Config, PreTrainedTokenizerFast

from loqt_peft.layers.find import loqt_layers


# the examples are healthy runs
pytestmark = pytest.mark.filterwarnings("error::loqt_peft.LoQTWarning")

EXAMPLE = ROOT / "examples" / "glue"
WORDS = ["good", "fine", "nice", "bad", "poor", "sad", "the", "a", "film", "plot", "is", "was"]
TASKS = {
    "cola": ["sentence"],
    "mnli": ["premise", "hypothesis"],
    "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"],
    "rte": ["sentence1", "sentence2"],
    "sst2": ["sentence"],
    "stsb": ["sentence1", "sentence2"],
}


@pytest.fixture(scope="module", autouse=True)
def path():
    sys.path.insert(0, str(EXAMPLE))
    yield
    sys.path.remove(str(EXAMPLE))


@pytest.fixture(scope="module")
def run_glue(path):
    import run_glue

    return run_glue


def sentence(draw):
    return " ".join(draw.choices(WORDS, k=draw.randint(3, 9)))


def examples(task, split, size, secret=False):
    draw = random.Random(f"{task} {split}")
    for i in range(size):
        texts = {key: sentence(draw) for key in TASKS[task]}
        label = draw.uniform(0, 5) if task == "stsb" else draw.randrange(3 if task == "mnli" else 2)
        yield {**texts, "label": -1 if secret else label, "idx": i}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """data/TASK/SPLIT.jsonl, and configuration and tokenizer of a model."""
    folder = tmp_path_factory.mktemp("glue")
    for task in TASKS:
        splits = {"train": 24, "validation": 12, "test": 5}
        if task == "mnli":
            splits = {"train": 24, "validation": 12, "validation_mismatched": 12, "test": 5, "test_mismatched": 5}
        for split, size in splits.items():
            write_lines(
                folder / "data" / task / f"{split}.jsonl", examples(task, split, size, split.startswith("test"))
            )
    DebertaV2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        type_vocab_size=0,
    ).save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator([" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder / "model")
    return folder


def arguments(inputs, output_dir, **changes):
    options = {
        "data_dir": inputs / "data",
        "config_name": inputs / "model" / "config.json",
        "tokenizer_name": inputs / "model",
        "cache_dir": inputs / "cache",
        "output_dir": output_dir,
        "max_seq_length": 24,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "rank": 4,
        "update_interval": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "do_train": True,
        "do_eval": True,
        **changes,
    }
    return [part for k, v in options.items() if v is not None for part in (f"--{k}", str(v))]


SCORES = {
    "cola": {"matthews_correlation"},
    "mnli": {"accuracy"},
    "mrpc": {"accuracy", "f1", "combined_score"},
    "qnli": {"accuracy"},
    "qqp": {"accuracy", "f1", "combined_score"},
    "rte": {"accuracy"},
    "sst2": {"accuracy"},
    "stsb": {"pearson", "spearmanr", "combined_score"},
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_trained_evaluated_and_predicted(run_glue, inputs, tmp_path, task):
    metrics = run_glue.main(arguments(inputs, tmp_path, task_name=task, do_predict=True))
    expected = {f"eval_{name}" for name in SCORES[task]}
    files = [f"predict_results_{task}.txt"]
    if task == "mnli":
        expected |= {f"{name}_mm" for name in expected}
        files.append("predict_results_mnli-mm.txt")
    assert expected <= set(metrics)
    assert metrics["metric_source"] == "scikit-learn and scipy"
    assert json.loads((tmp_path / "all_results.json").read_text()).keys() >= expected | {"metric_source"}
    for file in files:
        lines = (tmp_path / file).read_text().splitlines()
        assert lines[0] == "index\tprediction" and len(lines) == 6
        answers = [line.split("\t")[1] for line in lines[1:]]
        if task == "stsb":
            assert all(np.isfinite(float(answer)) for answer in answers)
        else:
            from glue_tasks import TASKS as glue_tasks

            assert set(answers) <= set(glue_tasks[task].labels)


@pytest.mark.parametrize("method", ["loqt", "loqt-nq", "lora", "loftq", "galore", "full"])
def test_every_method_trains_what_it_should(run_glue, inputs, tmp_path, method):
    before, trained = {}, []

    class Watch(run_glue.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            before.update({n: p.detach().clone() for n, p in model.named_parameters()})
            self.model = model

        def on_train_end(self, args, state, control, model=None, **kwargs):
            trained.extend(n for n, p in model.named_parameters() if not torch.equal(p, before[n]))
            self.optimizer = type(kwargs["optimizer"].optimizer).__module__

    watch = Watch()
    run_glue.main(arguments(inputs, tmp_path, task_name="rte", method=method, max_steps=4), callbacks=[watch])
    encoder = [n for n in trained if "classifier" not in n and "pooler" not in n]
    # the classifier, and DeBERTa's pooler, which is not of the encoder and new
    assert any("classifier" in n for n in trained) and any("pooler" in n for n in trained)
    if method.startswith("loqt"):
        assert encoder and all(".loqt_B." in n for n in encoder)
        layers = [layer for _, layer in loqt_layers(watch.model)]
        assert len(layers) == 6 and {layer.num_updates("default") for layer in layers} == {2}
        quantized = {layer.loqt_weight["default"].dtype == torch.uint8 for layer in layers}
        assert quantized == {method == "loqt"}
    elif method in ("lora", "loftq"):
        assert encoder and all(".lora_" in n for n in encoder)
        assert len(encoder) == 12
        # LoftQ takes the quantization error into its start: B is not zero
        starts = [p for n, p in before.items() if "lora_B" in n]
        assert all(bool(p.any()) == (method == "loftq") for p in starts)
    else:
        assert any("embeddings" in n for n in encoder) and any("query_proj.weight" in n for n in encoder)
        assert watch.optimizer.split(".")[0] == ("galore_torch" if method == "galore" else "torch")


def test_trained_adapter_predicts_the_same_when_loaded(run_glue, inputs, tmp_path):
    metrics = run_glue.main(arguments(inputs, tmp_path, task_name="rte"))
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = [json.loads(line) for line in (inputs / "data" / "rte" / "validation.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        batch = tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt", truncation=True, max_length=24)
        right += model(**batch).logits.argmax().item() == row["label"]
    assert right / len(rows) == pytest.approx(metrics["eval_accuracy"])


def test_training_goes_on_from_a_checkpoint(run_glue, inputs, tmp_path):
    options = {"task_name": "cola", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = run_glue.main(arguments(inputs, tmp_path / "whole", **options))

    class Interrupt(run_glue.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_glue.main(arguments(inputs, tmp_path / "cut", **options), callbacks=[Interrupt()])
    resumed = run_glue.main(arguments(inputs, tmp_path / "cut", **options))
    assert resumed["eval_loss"] == whole["eval_loss"]


def test_files_of_ones_own(run_glue, inputs, tmp_path):
    rows = [{"text": sentence(random.Random(i)), "label": ["no", "yes", "perhaps"][i % 3]} for i in range(12)]
    write_lines(tmp_path / "train.jsonl", rows)
    (tmp_path / "validation.csv").write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    files = {"train_file": tmp_path / "train.jsonl", "validation_file": tmp_path / "validation.csv"}
    metrics = run_glue.main(arguments(inputs, tmp_path / "out", data_dir=None, **files))
    assert 0 <= metrics["eval_accuracy"] <= 1
    config = json.loads((tmp_path / "out" / "base_model" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"}

    for row in rows:
        row["label"] = len(row["text"]) / 10
    write_lines(tmp_path / "regression.jsonl", rows)
    files = dict.fromkeys(("train_file", "validation_file"), tmp_path / "regression.jsonl")
    assert run_glue.main(arguments(inputs, tmp_path / "out2", data_dir=None, **files))["eval_mse"] >= 0


def test_the_papers_settings_hold_unless_told_otherwise(run_glue, tmp_path):
    model = ["--model_name_or_path", "x", "--output_dir", str(tmp_path), "--do_train"]
    _, _, method, training = run_glue.parse_arguments([*model, "--task_name", "mrpc"])
    assert (training.learning_rate, training.num_train_epochs, training.per_device_train_batch_size) == (1e-4, 60, 32)
    config = method.peft_config("SEQ_CLS")
    assert (config.r, config.loqt_alpha, config.compensation_steps, config.update_interval) == (32, 2.0, 5, 2400)
    assert config.interval_schedule == "constant"
    _, _, _, training = run_glue.parse_arguments([*model, "--task_name", "MRPC", "--num_train_epochs", "1"])
    assert (training.learning_rate, training.num_train_epochs) == (1e-4, 1)
    file = tmp_path / "arguments.json"
    given = {"model_name_or_path": "x", "output_dir": str(tmp_path), "do_train": True, "task_name": "cola"}
    file.write_text(json.dumps({**given, "learning_rate": 1e-3}))
    _, _, _, training = run_glue.parse_arguments([str(file)])
    assert (training.learning_rate, training.num_train_epochs) == (1e-3, 20)


def test_small_encoders_have_settings_of_their_own(run_glue, tmp_path):
    def settings(*argv):
        _, _, method, training = run_glue.parse_arguments(argv)
        return training.learning_rate, training.num_train_epochs, method.projection

    given = {"task_name": "cola", "model_name_or_path": "x", "output_dir": str(tmp_path), "do_train": True}
    argv = [part for option, value in given.items() for part in (f"--{option}", str(value))]
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({**given, "preset": "small"}))
    small = (2e-4, 20, "random")
    assert settings(*argv) == settings(*argv, "--preset", "paper") == (8e-5, 20, "randomized")
    assert settings(*argv, "--preset", "small") == settings(*argv, "--preset=small") == settings(str(file)) == small
    assert settings(*argv, "--preset", "small", "--projection", "svd") == (2e-4, 20, "svd")
    (tmp_path / "train.jsonl").write_text("{}\n")
    own = ["--train_file", str(tmp_path / "train.jsonl"), *argv[2:], "--preset", "small"]
    assert settings(*own) == (2e-4, 3, "random")
    file.write_text(json.dumps({**given, "preset": "tiny"}))
    with pytest.raises(run_glue.BadInput, match="--preset tiny is not one of paper, small"):
        settings(str(file))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"task_name": "wnli"}, "wnli"),
        ({"task_name": "rte", "do_train": None, "do_eval": None}, "nothing to do"),
        ({"task_name": "rte", "data_dir": "nowhere"}, "nowhere"),
        ({"data_dir": None}, "--task_name"),
        ({"task_name": "rte", "validation_file": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"task_name": "rte", "max_eval_samples": "0"}, "max_eval_samples"),
        ({"task_name": "rte", "rank": "0"}, "r=0"),
        ({"task_name": "rte", "method": "galore", "load_in_4bit": True}, "galore"),
        ({"task_name": "rte", "method": "qlora"}, "qlora"),
    ],
)
def test_bad_arguments_are_named(run_glue, inputs, tmp_path, changes, message, capsys):
    with pytest.raises((run_glue.BadInput, SystemExit)) as error:
        run_glue.main(arguments(inputs, tmp_path, **changes))
    assert message in str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "good", "label": 1}], "sentence1"),
        ([{"sentence1": "good", "sentence2": "bad"}], "label"),
        ([{"sentence1": "good", "sentence2": "bad", "label": 7}], "7"),
    ],
)
def test_bad_data_is_named(run_glue, inputs, tmp_path, rows, message):
    write_lines(tmp_path / "train.jsonl", rows)
    with pytest.raises(run_glue.BadInput, match=message):
        run_glue.main(arguments(inputs, tmp_path, task_name="rte", train_file=tmp_path / "train.jsonl"))


def test_galore_without_its_package(run_glue, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(run_glue, "is_galore_torch_available", lambda: False)
    with pytest.raises(run_glue.BadInput, match="pip install galore-torch"):
        run_glue.main(arguments(inputs, tmp_path, task_name="rte", method="galore"))


def test_loftq_without_a_gpu_splits_the_weight(run_glue):
    from loftq_cpu import loftq_init

    W = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    errors = []
    for iterations in (1, 5):
        Q, A, B = loftq_init(W, 4, 8, iterations)
        assert A.shape == (8, 64) and B.shape == (48, 8)
        # NF4 has 16 levels, of which each block has its own 16 at most
        assert all(len(block.unique()) <= 16 for block in Q.view(-1, 64))
        errors.append(torch.linalg.norm(W - Q - B @ A))
    assert errors[1] < errors[0] < torch.linalg.norm(W - Q)


def test_metrics_are_those_of_glue(run_glue):
    from glue_metrics import LOCAL_METRICS

    draw = np.random.default_rng(0)
    predicted, labels = draw.integers(0, 2, 200), draw.integers(0, 2, 200)
    hits = [(predicted == p) & (labels == q) for p, q in ((1, 1), (1, 0), (0, 1), (0, 0))]
    tp, fp, fn, tn = (int(hit.sum()) for hit in hits)
    accuracy = (tp + tn) / 200
    assert LOCAL_METRICS["rte"](predicted, labels) == {"accuracy": pytest.approx(accuracy)}
    assert LOCAL_METRICS["qqp"](predicted, labels) == {
        "accuracy": pytest.approx(accuracy),
        "f1": pytest.approx(2 * tp / (2 * tp + fp + fn)),
    }
    correlation = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert LOCAL_METRICS["cola"](predicted, labels) == {"matthews_correlation": pytest.approx(correlation)}
    predicted, labels = draw.normal(size=50), draw.normal(size=50)
    ranks = [values.argsort().argsort() for values in (predicted, labels)]
    assert LOCAL_METRICS["stsb"](predicted, labels) == {
        "pearson": pytest.approx(np.corrcoef(predicted, labels)[0, 1]),
        "spearmanr": pytest.approx(np.corrcoef(*ranks)[0, 1]),
    }


###############################
# --all
###############################


def run_all(inputs, output, *options):
    import glue_all

    others = arguments(inputs, output, do_train=None, do_eval=None)
    glue_all.main(["--tasks", "cola", "rte", "--seeds", "0", "1", *options, *others])


def test_all_runs_are_tabled_and_finished_ones_are_skipped(run_glue, inputs, tmp_path, monkeypatch, capsys):
    import glue_all

    started = []

    def in_this_process(command, stdout, stderr):
        started.append(command)
        run_glue.main(command[2:])
        return glue_all.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(glue_all.subprocess, "run", in_this_process)
    overrides = tmp_path / "overrides.json"
    overrides.write_text(json.dumps({"lora": {"learning_rate": 1e-3}, "rte/lora": {"learning_rate": 2e-3}}))
    options = ("--methods", "loqt", "lora", "--overrides", str(overrides))
    run_all(inputs, tmp_path / "out", *options)
    assert len(started) == 8
    runs = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {(run["task"], run["method"], run["seed"]) for run in runs} == {
        (task, method, seed) for task in ("cola", "rte") for method in ("loqt", "lora") for seed in (0, 1)
    }
    by_run = {(run["task"], run["method"], run["seed"]): run for run in runs}
    scores = [100 * by_run["rte", "lora", seed]["eval_accuracy"] for seed in (0, 1)]
    mean, error = np.mean(scores), np.std(scores, ddof=1) / 2**0.5
    text = (tmp_path / "out" / "results.md").read_text()
    assert f"{mean:.2f} ± {error:.2f}" in next(line for line in text.splitlines() if line.startswith("| lora"))
    assert (tmp_path / "out" / "results.png").stat().st_size > 0
    rates = {
        (task, method): json.loads((tmp_path / "out" / task / method / "seed_0" / "arguments.json").read_text())
        for task in ("cola", "rte")
        for method in ("loqt", "lora")
    }
    given = {
        run: [a for o, a in zip(args, args[1:], strict=False) if o == "--learning_rate"] for run, args in rates.items()
    }
    assert given == {
        ("cola", "loqt"): [],
        ("rte", "loqt"): [],
        ("cola", "lora"): ["0.001"],
        ("rte", "lora"): ["0.002"],
    }

    # one run is gone, another one was cut off before its evaluation
    (tmp_path / "out" / "cola" / "loqt" / "seed_1" / "all_results.json").unlink()
    (tmp_path / "out" / "rte" / "lora" / "seed_0" / "all_results.json").write_text('{"train_loss": 1.0}')
    started.clear()
    run_all(inputs, tmp_path / "out", *options)
    assert len(started) == 2
    assert text.splitlines()[:4] == (tmp_path / "out" / "results.md").read_text().splitlines()[:4]

    (tmp_path / "out" / "rte" / "lora" / "seed_0" / "all_results.json").unlink()
    with pytest.raises(run_glue.BadInput, match="other arguments"):
        run_all(inputs, tmp_path / "out", "--methods", "loqt", "lora")


def test_a_run_that_fails_is_named_and_the_others_go_on(run_glue, inputs, tmp_path):
    overrides = tmp_path / "overrides.json"
    overrides.write_text(json.dumps({"cola": {"rank": 0}}))
    with pytest.raises(run_glue.BadInput, match="cola/loqt/seed_0"):
        run_all(inputs, tmp_path / "out", "--methods", "loqt", "--seeds", "0", "--overrides", str(overrides))
    assert "r=0" in (tmp_path / "out" / "cola" / "loqt" / "seed_0" / "log.txt").read_text()
    assert [run["task"] for run in json.loads((tmp_path / "out" / "results.json").read_text())] == ["rte"]
    assert "Failed: cola/loqt/seed_0" in (tmp_path / "out" / "results.md").read_text()


def test_unknown_names_in_overrides(run_glue, inputs, tmp_path):
    overrides = tmp_path / "overrides.json"
    overrides.write_text(json.dumps({"qlora": {}}))
    with pytest.raises(run_glue.BadInput, match="qlora"):
        run_all(inputs, tmp_path / "out", "--overrides", str(overrides))
