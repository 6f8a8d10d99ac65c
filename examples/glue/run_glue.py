"""Fine-tune an encoder on a GLUE task with LoQT, following the conventions of transformers' `run_glue.py`.

    python run_glue.py --task_name rte --model_name_or_path microsoft/deberta-v3-base --output_dir out --do_train --do_eval

With local files in place of the Hub's data, `--data_dir DIR` (DIR/TASK/train.jsonl ...), or `--train_file` and
`--validation_file`. Other methods than LoQT: `--method`. All tasks, methods and seeds in one command:

    python run_glue.py --all --tasks cola sst2 --methods loqt lora --seeds 0 1 2 --output_dir out ...

All arguments are listed by `--help`; one JSON file of arguments is accepted in their place.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import load_dataset
from glue_metrics import load_metric
from glue_tasks import PRESETS, TASKS, Task, preset
from loftq_cpu import loftq_where_the_weights_are
from peft import LoftQConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import is_galore_torch_available

from loqt_peft import LoQTTrainerCallback, PerformanceCallback, per_layer_optimizer
from loqt_peft.advice import CASES
from loqt_peft.layers.target_modules import TARGET_MODULES_MAPPING


# what the examples share lies beside their folders
sys.path.append(str(Path(__file__).parents[1]))
from script_utils import (
    BadInput,
    LoQTArguments,
    ModelArguments,
    blame,
    find_checkpoint,
    load_base_model,
    load_config_and_tokenizer,
    random_model,
    set_up_logging,
    train,
)


GLUE = CASES["large_encoder"]
logger = logging.getLogger(__name__)

FILE_LOADERS = {"json": "json", "jsonl": "json", "csv": "csv"}


@dataclass
class DataTrainingArguments:
    """Which task, and how its sentences are cut."""

    task_name: str | None = field(default=None, metadata={"help": f"GLUE task: {', '.join(TASKS)}."})
    preset: Literal["paper", "small"] = field(
        default="paper",
        metadata={
            "help": "Settings that a task brings: the paper's (DeBERTaV3-base), or for small encoders (another learning rate, "
            "random P)."
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Directory with train, validation and test .jsonl files in a folder for each task."},
    )
    train_file: str | None = field(default=None, metadata={"help": "Training examples: .json, .jsonl or .csv."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation examples, of the same formats."})
    test_file: str | None = field(default=None, metadata={"help": "Examples to predict, of the same formats."})
    max_seq_length: int = field(default=256, metadata={"help": "Tokens of an example; longer ones are cut."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad all examples to max_seq_length, not each batch to its longest."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first so many."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first so many."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again even if a cached copy exists."})

    def __post_init__(self):
        if self.task_name is not None:
            self.task_name = self.task_name.lower().replace("-", "")
            if self.task_name not in TASKS:
                raise ValueError(f"--task_name {self.task_name} is not one of {', '.join(TASKS)}")
        elif self.train_file is None and self.validation_file is None:
            raise ValueError("give --task_name, or --train_file and --validation_file")
        if self.preset not in PRESETS:
            raise ValueError(f"--preset {self.preset} is not one of {', '.join(PRESETS)}")
        if self.data_dir is not None and self.task_name is None:
            raise ValueError(f"--data_dir {self.data_dir} needs --task_name")
        for option in ("train_file", "validation_file", "test_file"):
            path = getattr(self, option)
            if path is None:
                continue
            if path.rsplit(".", 1)[-1] not in FILE_LOADERS:
                raise ValueError(f"--{option} {path}: the file must end in one of {', '.join(FILE_LOADERS)}")
            if not os.path.isfile(path):
                raise ValueError(f"--{option} {path}: no such file")
        for option in ("max_seq_length", "max_train_samples", "max_eval_samples", "max_predict_samples"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"--{option} {value} must be positive")


@dataclass
class MethodArguments(LoQTArguments):
    """How the linear layers are trained; the defaults are the paper's for GLUE. Other fields are those of `LoQTConfig`."""

    method: Literal["loqt", "loqt-nq", "lora", "loftq", "galore", "full"] = field(
        default="loqt",
        metadata={
            "help": "loqt; loqt-nq (not quantized); lora, or loftq (PEFT's LoftQ initialisation), at scale loqt_alpha; galore "
            "(the Trainer's galore_adamw, with update_interval and scale loqt_alpha); full (full-rank training)."
        },
    )
    rank: int = field(default=32, metadata={"help": "Rank of P and B, of LoRA and of GaLore."})
    loqt_alpha: float = field(
        default=GLUE.scale, metadata={"help": "The scale s, used as is: not divided by the rank."}
    )
    update_interval: int = field(
        default=GLUE.fields["update_interval"], metadata={"help": "Optimizer steps between updates (GaLore: of P)."}
    )
    interval_schedule: Literal["exponential", "linear", "constant"] = field(
        default=GLUE.fields["interval_schedule"], metadata={"help": "Whether the gaps between updates grow."}
    )
    full_rank_modules: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Modules trained in place besides the head, at full rank: names, all or none."},
    )
    loftq_iterations: int = field(default=5, metadata={"help": "Iterations of LoftQ's initialisation."})

    not_of_config = (*LoQTArguments.not_of_config, "loftq_iterations")


def parse_arguments(argv: Sequence[str] | None):
    """Return (ModelArguments, DataTrainingArguments, MethodArguments, TrainingArguments); raises BadInput.

    What is not given is the paper's for the task, then the default.
    """
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, MethodArguments, TrainingArguments))
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if len(argv) == 1 and argv[0].endswith(".json"):
            given = json.loads(Path(argv[0]).read_text())
            arguments = parser.parse_dict({**preset(given.get("task_name"), given.get("preset", "paper")), **given})
        else:
            first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            first.add_argument("--task_name")
            first.add_argument("--preset", default="paper")
            given, _ = first.parse_known_args(argv)
            parser.set_defaults(**preset(given.task_name, given.preset))
            arguments = parser.parse_args_into_dataclasses(args=argv)
        model_args, data_args, method_args, training_args = arguments
        method_args.peft_config("SEQ_CLS")
        if training_args.do_train and method_args.per_layer_updates:
            per_layer_optimizer(training_args)
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise BadInput("nothing to do: give --do_train, --do_eval or --do_predict")
    if model_args.load_in_4bit and method_args.method in ("full", "galore", "loftq"):
        raise BadInput(f"--load_in_4bit cannot be combined with --method {method_args.method}")
    if method_args.method == "galore":
        if not is_galore_torch_available():
            raise BadInput("--method galore needs the package galore_torch: pip install galore-torch")
        if method_args.per_layer_updates:
            raise BadInput("--method galore cannot be combined with --per_layer_updates")
    return arguments


def load_raw_datasets(args: DataTrainingArguments, task: Task | None, training_args, cache_dir: str | None) -> dict:
    """Return split -> data set; the splits are named as GLUE names them."""
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    if args.data_dir is not None:
        folder = Path(args.data_dir) / args.task_name
        if not folder.is_dir():
            raise BadInput(f"--data_dir {args.data_dir}: it has no folder {args.task_name}")
        files = {path.stem: str(path) for path in sorted(folder.glob("*.jsonl"))} | {
            split: path for split, path in files.items() if path is not None
        }
    raw = {}
    for split, path in files.items():
        if path is not None:
            with blame(f"{split}_file", path):
                raw[split] = load_dataset(
                    FILE_LOADERS[path.rsplit(".", 1)[-1]], data_files=path, split="train", cache_dir=cache_dir
                )
    if not raw:
        with blame("task_name", args.task_name):
            raw = dict(load_dataset("nyu-mll/glue", args.task_name, cache_dir=cache_dir))
    if task is not None and "validation" in raw:
        raw[task.validation_splits[0]] = raw.pop("validation")
    if task is not None and "test" in raw:
        raw[task.test_splits[0]] = raw.pop("test")
    for wanted, split in ((training_args.do_train, "train"), (training_args.do_eval, evaluation_splits(task)[0])):
        if wanted and split not in raw:
            raise BadInput(f"the data has no {split} examples")
    if training_args.do_predict and prediction_splits(task)[0] not in raw:
        raise BadInput("--do_predict needs --test_file, or test examples in the data")
    return raw


def evaluation_splits(task: Task | None) -> tuple[str, ...]:
    return ("validation",) if task is None else task.validation_splits


def prediction_splits(task: Task | None) -> tuple[str, ...]:
    return ("test",) if task is None else task.test_splits


def sentence_keys(raw: dict, task: Task | None) -> list[str]:
    """Names of the one or two columns of text."""
    columns = next(iter(raw.values())).column_names
    if task is not None:
        missing = [key for key in task.sentence_keys if key not in columns]
        if missing:
            raise BadInput(f"the data has no column {missing[0]!r}: it has {', '.join(columns)}")
        return list(task.sentence_keys)
    if "sentence1" in columns and "sentence2" in columns:
        return ["sentence1", "sentence2"]
    features = next(iter(raw.values())).features
    texts = [
        name
        for name in columns
        if name != "label" and getattr(features[name], "dtype", None) in ("string", "large_string")
    ]
    if not texts:
        raise BadInput(f"the data has no column of text: it has {', '.join(columns)}")
    return texts[:2]


def labels_of(raw: dict, task: Task | None) -> list | None:
    """The labels in the order of their numbers; `None` for a regression."""
    for split, data in raw.items():
        if not split.startswith("test") and "label" not in data.column_names:
            raise BadInput(f"the {split} examples have no column 'label': they have {', '.join(data.column_names)}")
    if task is not None:
        return None if task.is_regression else list(task.labels)
    labelled = [data for split, data in raw.items() if not split.startswith("test")]
    feature = labelled[0].features["label"]
    if getattr(feature, "dtype", None) in ("float32", "float64"):
        return None
    return sorted({label for data in labelled for label in data.unique("label")})


def tokenize(raw: dict, keys: list[str], labels: list | None, tokenizer, args: DataTrainingArguments) -> dict:
    longest = min(args.max_seq_length, tokenizer.model_max_length)
    if longest < args.max_seq_length:
        logger.warning(f"--max_seq_length {args.max_seq_length} is more than the model can take: {longest} is used.")
    # files hold numbers or names, the Hub's data numbers
    numbers = (
        {} if labels is None else {label: i for i, label in enumerate(labels)} | {i: i for i in range(len(labels))}
    )

    def process(examples):
        padding = "max_length" if args.pad_to_max_length else False
        result = tokenizer(*(examples[key] for key in keys), padding=padding, max_length=longest, truncation=True)
        if "label" in examples:
            if labels is None:
                result["labels"] = [float(label) for label in examples["label"]]
            else:
                # -1 stands for a label that is kept secret
                result["labels"] = [label if label == -1 else numbers[label] for label in examples["label"]]
        return result

    limits = {"train": args.max_train_samples}
    tokenized = {}
    for split, data in raw.items():
        limit = limits.get(split, args.max_predict_samples if split.startswith("test") else args.max_eval_samples)
        if limit is not None:
            data = data.select(range(min(limit, len(data))))
        if len(data) == 0:
            raise BadInput(f"the {split} examples are empty")
        try:
            tokenized[split] = data.map(
                process, batched=True, remove_columns=data.column_names, load_from_cache_file=not args.overwrite_cache
            )
        except KeyError as error:
            raise BadInput(
                f"the {split} examples have a label {error.args[0]!r} that is not one of {labels}"
            ) from error
    return tokenized


def head_modules(model: PreTrainedModel) -> list[str]:
    """The modules beside the encoder: the classifier, and where it has one of its own its pooler."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def targets_of(model: PreTrainedModel, args: MethodArguments) -> list[str] | str:
    return args.target_modules or TARGET_MODULES_MAPPING.get(model.config.model_type, "all-linear")


def linear_names(model: PreTrainedModel, args: MethodArguments) -> list[str]:
    """Full names of the targeted linear layers."""
    targets, heads = targets_of(model, args), head_modules(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.split(".")[0] not in heads
        and (targets == "all-linear" or any(f".{name}".endswith(f".{target}") for target in targets))
    ]


def lora_config(args: MethodArguments, model: PreTrainedModel) -> LoraConfig:
    """LoRA on the same layers, at the same scale; for `loftq` with PEFT's LoftQ initialisation in 4 bits."""
    options = {}
    if args.method == "loftq":
        options = {
            "init_lora_weights": "loftq",
            "loftq_config": LoftQConfig(loftq_bits=4, loftq_iter=args.loftq_iterations),
        }
    return LoraConfig(
        r=args.rank,
        lora_alpha=args.rank * args.loqt_alpha,
        target_modules=targets_of(model, args),
        exclude_modules=args.exclude_modules,
        modules_to_save=head_modules(model),
        task_type="SEQ_CLS",
        **options,
    )


def build_model(model_args, method_args, training_args, checkpoint: str | None, config, tokenizer):
    """Return the model to train: the base itself for `full` and `galore`, else a `PeftModel` on it."""
    dense = method_args.method in ("full", "galore")
    if dense and model_args.model_name_or_path is None:
        model = random_model(AutoModelForSequenceClassification, config, model_args.dtype)
    else:
        model = load_base_model(
            AutoModelForSequenceClassification,
            model_args,
            method_args,
            training_args,
            checkpoint,
            config,
            tokenizer,
        )
    if method_args.method == "galore":
        training_args.optim = "galore_adamw"
        training_args.optim_target_modules = linear_names(model, method_args)
        options = (method_args.rank, method_args.update_interval, method_args.loqt_alpha)
        training_args.optim_args = "rank={}, update_proj_gap={}, scale={}".format(*options)
    if dense:
        return model
    if method_args.method in ("lora", "loftq"):
        with loftq_where_the_weights_are():
            return get_peft_model(model, lora_config(method_args, model))
    peft_config = method_args.peft_config("SEQ_CLS")
    # one way or the other the head is trained
    if peft_config.full_rank_modules != "all":
        peft_config.modules_to_save = head_modules(model)
    return get_peft_model(model, peft_config)


def metric_function(task: Task | None, labels: list | None) -> tuple[Callable[[EvalPrediction], dict], str]:
    """The metric of a task, accuracy or mean squared error without one, and where it comes from."""
    compute, source = load_metric(task.name if task else None, labels is None)

    def compute_metrics(prediction: EvalPrediction) -> dict:
        outputs = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        predicted = np.squeeze(outputs, axis=-1) if labels is None else np.argmax(outputs, axis=1)
        result = compute(predicted, prediction.label_ids)
        if len(result) > 1:
            result["combined_score"] = float(np.mean(list(result.values())))
        return result

    return compute_metrics, source


def evaluate(trainer: Trainer, task: Task | None, data: dict, source: str) -> dict:
    """Evaluate on all validation splits; the figures of MNLI's mismatched one end in `_mm`."""
    combined = {"metric_source": source}
    for i, split in enumerate(evaluation_splits(task)):
        if split not in data:
            continue
        metrics = trainer.evaluate(eval_dataset=data[split])
        trainer.log_metrics("eval" + "_mm" * i, metrics)
        combined |= {name + "_mm" * i: value for name, value in metrics.items()}
    trainer.save_metrics("eval", combined)
    return combined


def predict(trainer: Trainer, task: Task | None, labels: list | None, data: dict, output_dir: str) -> None:
    """Write `predict_results_<task>.txt`, as GLUE's server takes it."""
    for i, split in enumerate(prediction_splits(task)):
        if split not in data:
            continue
        unlabelled = data[split].remove_columns([name for name in ("labels",) if name in data[split].column_names])
        outputs = trainer.predict(unlabelled)
        outputs = outputs.predictions[0] if isinstance(outputs.predictions, tuple) else outputs.predictions
        if not trainer.is_world_process_zero():
            continue
        name = (task.name if task else "test") + "-mm" * i
        with open(os.path.join(output_dir, f"predict_results_{name}.txt"), "w") as file:
            file.write("index\tprediction\n")
            for index, output in enumerate(outputs):
                answer = f"{output.item():3.3f}" if labels is None else labels[int(np.argmax(output))]
                file.write(f"{index}\t{answer}\n")


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> dict:
    """Train, evaluate and predict as the arguments say, and return the metrics.

    `callbacks` are added to the Trainer's. Raises `BadInput` for arguments or data that cannot be used.
    """
    model_args, data_args, method_args, training_args = parse_arguments(argv)
    set_up_logging(training_args, logger)
    set_seed(training_args.seed)
    checkpoint = find_checkpoint(training_args)
    task = TASKS.get(data_args.task_name)

    raw = load_raw_datasets(data_args, task, training_args, model_args.cache_dir)
    keys, labels = sentence_keys(raw, task), labels_of(raw, task)
    config, tokenizer = load_config_and_tokenizer(model_args)
    config.num_labels = 1 if labels is None else len(labels)
    config.problem_type = "regression" if labels is None else "single_label_classification"
    config.finetuning_task = data_args.task_name
    if labels is not None:
        config.label2id = {str(label): i for i, label in enumerate(labels)}
        config.id2label = {i: str(label) for i, label in enumerate(labels)}
    with training_args.main_process_first(desc="tokenizing"):
        data = tokenize(raw, keys, labels, tokenizer, data_args)

    compute_metrics, source = metric_function(task, labels)
    logger.info(f"The metric is computed by {source}.")
    model = build_model(model_args, method_args, training_args, checkpoint, config, tokenizer)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data.get("train"),
        eval_dataset=data.get(evaluation_splits(task)[0]),
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None),
        callbacks=[
            LoQTTrainerCallback() if method_args.method.startswith("loqt") else PerformanceCallback(),
            *callbacks,
        ],
        optimizer_cls_and_kwargs=per_layer_optimizer(training_args) if method_args.per_layer_updates else None,
    )
    metrics = {}
    if training_args.do_train:
        metrics |= train(trainer, checkpoint)
    if training_args.do_eval:
        metrics |= evaluate(trainer, task, data, source)
    if training_args.do_predict:
        predict(trainer, task, labels, data, training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(tasks="text-classification", dataset_tags="glue", dataset_args=data_args.task_name)
    return metrics


if __name__ == "__main__":
    try:
        if "--all" in sys.argv[1:]:
            from glue_all import main as run_all

            run_all([part for part in sys.argv[1:] if part != "--all"])
        else:
            print(json.dumps(main(), indent=2))
    except BadInput as error:
        sys.exit(f"run_glue.py: error: {error}")
