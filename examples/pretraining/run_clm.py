"""Pretrain or finetune a causal language model with LoQT, following the conventions of transformers' `run_clm.py`.

    python run_clm.py --config_name configs/llama_60m.json --tokenizer_name TOKENIZER --train_file corpus.txt \\
        --output_dir out --do_train --do_eval --block_size 256 --learning_rate 0.01 --rank 128

All arguments are listed by `--help`; one JSON file of arguments is accepted in their place.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from loqt_peft import LoQTTrainerCallback, PerformanceCallback, per_layer_optimizer


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


logger = logging.getLogger(__name__)

FILE_LOADERS = {"txt": "text", "json": "json", "jsonl": "json", "csv": "csv"}
MAX_DEFAULT_BLOCK_SIZE = 1024


@dataclass
class DataTrainingArguments:
    """Which text, and how it is cut into blocks."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set of the Hub, or a local directory."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training; needs --max_steps."})
    train_file: str | None = field(default=None, metadata={"help": "Training text: .txt, .json, .jsonl or .csv."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation text, of the same formats."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Share of the training text to hold out where there is no validation text."}
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens in a sequence, by default the model's maximum, at most 1,024."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training blocks."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation blocks."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again even if a cached copy exists."})
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep the line breaks of .txt files."})

    def __post_init__(self):
        if self.dataset_name is not None and (self.train_file or self.validation_file):
            raise ValueError("give either --dataset_name or files, and not both")
        if self.dataset_name is None and self.train_file is None and self.validation_file is None:
            raise ValueError("give --dataset_name, --train_file or --validation_file")
        for option in ("train_file", "validation_file"):
            path = getattr(self, option)
            if path is None:
                continue
            if path.rsplit(".", 1)[-1] not in FILE_LOADERS:
                raise ValueError(f"--{option} {path}: the file must end in one of {', '.join(FILE_LOADERS)}")
            if not os.path.isfile(path):
                raise ValueError(f"--{option} {path}: no such file")
            if os.path.getsize(path) == 0:
                raise ValueError(f"--{option} {path}: the file is empty")
        if not 0 <= self.validation_split_percentage < 100:
            raise ValueError(f"--validation_split_percentage {self.validation_split_percentage} is not in [0, 100)")
        for option in ("block_size", "max_train_samples", "max_eval_samples"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"--{option} {value} must be positive")


def parse_arguments(argv: Sequence[str] | None):
    """Return (ModelArguments, DataTrainingArguments, LoQTArguments, TrainingArguments); raises BadInput."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, LoQTArguments, TrainingArguments))
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if len(argv) == 1 and argv[0].endswith(".json"):
            arguments = parser.parse_json_file(os.path.abspath(argv[0]))
        else:
            arguments = parser.parse_args_into_dataclasses(args=argv)
        model_args, data_args, loqt_args, training_args = arguments
        loqt_args.peft_config("CAUSAL_LM")
        if training_args.do_train and loqt_args.per_layer_updates:
            per_layer_optimizer(training_args)
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error
    if not (training_args.do_train or training_args.do_eval):
        raise BadInput("nothing to do: give --do_train, --do_eval or both")
    if training_args.do_train and data_args.dataset_name is None and data_args.train_file is None:
        raise BadInput("--do_train needs --train_file or --dataset_name")
    if training_args.do_train and data_args.streaming and training_args.max_steps <= 0:
        raise BadInput("--streaming has no known length: --do_train needs --max_steps")
    if model_args.load_in_4bit and loqt_args.method == "full":
        raise BadInput("--load_in_4bit cannot be trained with --method full")
    if loqt_args.loqt_alpha == "auto" and loqt_args.method == "lora":
        raise BadInput("--loqt_alpha auto is LoQT's: --method lora needs a number")
    return arguments


def load_raw_datasets(args: DataTrainingArguments, cache_dir: str | None) -> dict:
    """Return {"train", "validation"} -> (iterable) data set, as far as the arguments name them."""
    options = {"cache_dir": cache_dir, "streaming": args.streaming}
    if args.dataset_name is not None:
        with blame("dataset_name", args.dataset_name):
            raw = dict(load_dataset(args.dataset_name, args.dataset_config_name, **options))
    else:
        raw = {}
        for split, path in (("train", args.train_file), ("validation", args.validation_file)):
            if path is None:
                continue
            loader = FILE_LOADERS[path.rsplit(".", 1)[-1]]
            extra = {"keep_linebreaks": args.keep_linebreaks} if loader == "text" else {}
            with blame(f"{split}_file", path):
                raw[split] = load_dataset(loader, data_files=path, split="train", **options, **extra)
    percentage = args.validation_split_percentage
    if "validation" in raw or "train" not in raw or percentage == 0:
        return raw
    if args.streaming:
        raw["validation"] = raw["train"].filter(lambda _, i: i % 100 < percentage, with_indices=True)
        raw["train"] = raw["train"].filter(lambda _, i: i % 100 >= percentage, with_indices=True)
    else:
        with blame("validation_split_percentage", percentage):
            parts = raw["train"].train_test_split(test_size=percentage / 100, shuffle=False)
        raw["train"], raw["validation"] = parts["train"], parts["test"]
    return raw


def block_size_for(args: DataTrainingArguments, tokenizer: PreTrainedTokenizerBase, config) -> int:
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", MAX_DEFAULT_BLOCK_SIZE))
    if args.block_size is None:
        return min(longest, MAX_DEFAULT_BLOCK_SIZE)
    if args.block_size > longest:
        raise BadInput(f"--block_size {args.block_size} is more than the {longest} tokens that the model can take")
    return args.block_size


def make_blocks(raw, split: str, limit: int | None, tokenizer, block_size: int, args: DataTrainingArguments):
    """Tokenize `raw`, concatenate it and cut it into blocks of `block_size` tokens; the remainder is dropped."""
    try:
        columns = list(next(iter(raw)))
    except StopIteration:
        raise BadInput(f"the {split} text is empty") from None
    column = "text" if "text" in columns else columns[0]

    def tokenize(examples):
        # Documents are longer than any block on purpose: verbose=False leaves out the warning about it.
        return {"input_ids": tokenizer(examples[column], verbose=False)["input_ids"]}

    def group_texts(examples):
        tokens = list(chain.from_iterable(examples["input_ids"]))
        end = len(tokens) // block_size * block_size
        blocks = [tokens[i : i + block_size] for i in range(0, end, block_size)]
        return {"input_ids": blocks, "labels": [block.copy() for block in blocks]}

    options = {"batched": True}
    if not args.streaming:
        options |= {"num_proc": args.preprocessing_num_workers, "load_from_cache_file": not args.overwrite_cache}
    tokenized = raw.map(tokenize, remove_columns=columns, **options)
    blocks = tokenized.map(group_texts, **options)
    if args.streaming:
        return blocks if limit is None else blocks.take(limit)
    if len(blocks) == 0:
        raise BadInput(f"the {split} text is shorter than one block of {block_size} tokens")
    return blocks if limit is None else blocks.select(range(min(limit, len(blocks))))


def lora_config(args: LoQTArguments, model: PreTrainedModel) -> LoraConfig:
    """LoRA on the same layers, at the same scale and with the same modules at full rank."""
    head = model.get_output_embeddings()
    full_rank = args.peft_config("CAUSAL_LM").full_rank_modules
    if full_rank == "all":
        full_rank = [
            name
            for name, module in model.named_modules()
            if list(module.parameters(recurse=False)) and (module is head or not isinstance(module, nn.Linear))
        ]
    return LoraConfig(
        r=args.rank,
        lora_alpha=args.rank * args.loqt_alpha,
        target_modules=args.target_modules or "all-linear",
        exclude_modules=args.exclude_modules,
        modules_to_save=full_rank,
        task_type="CAUSAL_LM",
    )


def build_model(
    model_args: ModelArguments,
    loqt_args: LoQTArguments,
    training_args: TrainingArguments,
    checkpoint: str | None,
    config,
    tokenizer: PreTrainedTokenizerBase,
):
    """Return the model to train: the base itself for `--method full`, else a `PeftModel` on it."""
    if loqt_args.method == "full" and model_args.model_name_or_path is None:
        return random_model(AutoModelForCausalLM, config, model_args.dtype)
    model = load_base_model(AutoModelForCausalLM, model_args, loqt_args, training_args, checkpoint, config, tokenizer)
    if loqt_args.method == "full":
        return model
    peft_config: PeftConfig = (
        lora_config(loqt_args, model) if loqt_args.method == "lora" else loqt_args.peft_config("CAUSAL_LM")
    )
    return get_peft_model(model, peft_config)


def evaluate(trainer: Trainer) -> dict:
    metrics = trainer.evaluate()
    try:
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
    except OverflowError:
        metrics["perplexity"] = math.inf
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    return metrics


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> dict:
    """Train and evaluate as the arguments say, and return the metrics of both (the perplexity as `perplexity`).

    `callbacks` are added to the Trainer's. Raises `BadInput` for arguments or data that cannot be used.
    """
    model_args, data_args, loqt_args, training_args = parse_arguments(argv)
    set_up_logging(training_args, logger)
    set_seed(training_args.seed)
    checkpoint = find_checkpoint(training_args)

    raw = load_raw_datasets(data_args, model_args.cache_dir)
    config, tokenizer = load_config_and_tokenizer(model_args)
    block_size = block_size_for(data_args, tokenizer, config)
    blocks = {}
    for split, wanted, limit in (
        ("train", training_args.do_train, data_args.max_train_samples),
        ("validation", training_args.do_eval, data_args.max_eval_samples),
    ):
        if not wanted:
            continue
        if split not in raw:
            raise BadInput(f"the data has no {split} text")
        with training_args.main_process_first(desc=f"{split} text"):
            blocks[split] = make_blocks(raw[split], split, limit, tokenizer, block_size, data_args)

    callback = LoQTTrainerCallback() if loqt_args.method.startswith("loqt") else PerformanceCallback()
    trainer = Trainer(
        model=build_model(model_args, loqt_args, training_args, checkpoint, config, tokenizer),
        args=training_args,
        train_dataset=blocks.get("train"),
        eval_dataset=blocks.get("validation"),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[callback, *callbacks],
        optimizer_cls_and_kwargs=per_layer_optimizer(training_args) if loqt_args.per_layer_updates else None,
    )
    metrics = {}
    if training_args.do_train:
        metrics |= train(trainer, checkpoint)
    if training_args.do_eval:
        metrics |= evaluate(trainer)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return metrics


if __name__ == "__main__":
    try:
        print(json.dumps(main(), indent=2))
    except BadInput as error:
        sys.exit(f"run_clm.py: error: {error}")
