"""What the example scripts share: the arguments about model and method, how a model is loaded, errors of the user's making."""

import dataclasses
import logging
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import datasets
import torch
import transformers
from peft import prepare_model_for_kbit_training
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from loqt_peft import LoQTConfig, get_last_checkpoint


_logger = logging.getLogger(__name__)


class BadInput(ValueError):
    """An argument or an input file that the user has to change."""


@contextmanager
def blame(option: str, value):
    """Turn a library's error about `value` into a `BadInput` that names the option."""
    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise BadInput(f"--{option} {value}: {error}") from error


def config_field(name: str, **changes):
    """Field with the default and the help text of `LoQTConfig`'s field of that name."""
    source = LoQTConfig.__dataclass_fields__[name]
    return field(**{"default": source.default, "metadata": dict(source.metadata), **changes})


def scale(text: str) -> float | str:
    """A number, or "auto"; the type of `--loqt_alpha`."""
    return text if text == "auto" else float(text)


@dataclass
class ModelArguments:
    """Which model: a checkpoint, or a configuration that is initialised at random."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint to start from."})
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration (JSON file, directory or name) to start from scratch."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, by default that of --model_name_or_path."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and processed data are kept."})
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto", metadata={"help": "dtype of the weights; auto is the checkpoint's own, float32 from scratch."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the linear layers in 4 bits (bitsandbytes)."})

    def __post_init__(self):
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise ValueError("give either --model_name_or_path or --config_name, and not both")
        if self.config_name is not None and self.tokenizer_name is None:
            raise ValueError("--config_name starts from scratch and needs --tokenizer_name as well")


@dataclass
class LoQTArguments:
    """How the linear layers are trained; fields not described here are those of `LoQTConfig`."""

    method: Literal["loqt", "loqt-nq", "lora", "full"] = field(
        default="loqt",
        metadata={"help": "loqt, loqt-nq (not quantized), lora (at scale loqt_alpha) or full (full-rank training)."},
    )
    # Not `r`: torchrun takes --r for an abbreviation of one of its own options.
    rank: int = config_field("r")
    loqt_alpha: scale = config_field("loqt_alpha")
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the modules to train, by default all linear layers of the model's blocks."},
    )
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Names of modules to leave out."})
    quantize_weight: Literal["nf4", "fp4", "none"] = config_field("quantize_weight")
    quantize_projection: Literal["nf4", "fp4", "none"] = config_field("quantize_projection")
    double_quant: bool = config_field("double_quant")
    compensation_steps: int = config_field("compensation_steps")
    error_feedback: bool = config_field("error_feedback")
    update_interval: int = config_field("update_interval")
    interval_schedule: Literal["exponential", "linear", "constant"] = config_field("interval_schedule")
    interval_growth: float = config_field("interval_growth")
    max_interval: int | None = config_field("max_interval")
    projection: Literal["svd", "eigh", "randomized", "random"] = config_field("projection")
    optimizer_state: Literal["keep", "reset", "rotate"] = config_field("optimizer_state")
    full_rank_modules: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={"help": "Modules trained in place at full rank: names, all (the default here) or none."},
    )
    retain_base: Literal["device", "cpu", "drop"] = config_field("retain_base")
    update_mode: Literal["backward", "stagger", "whole"] = config_field("update_mode")
    offload_gradients: bool | None = config_field("offload_gradients")
    per_layer_updates: bool = field(
        default=False,
        metadata={
            "help": "Apply and free each gradient inside the backward pass, with any method: the memory of all gradients is "
            "saved, for the same result. Needs --max_grad_norm 0, one process, no --fp16, and an --optim of AdamW or "
            "bitsandbytes."
        },
    )

    not_of_config = ("method", "per_layer_updates")

    def peft_config(self, task_type: str) -> LoQTConfig:
        """Raises ValueError, by way of `LoQTConfig`, for a value that is not allowed."""
        fields = [f.name for f in dataclasses.fields(self) if f.name not in self.not_of_config]
        values = {name: getattr(self, name) for name in fields}
        values["r"] = values.pop("rank")
        for name in ("quantize_weight", "quantize_projection"):
            values[name] = None if self.method == "loqt-nq" or values[name] == "none" else values[name]
        values["full_rank_modules"] = {"all": "all", "none": None}.get(
            " ".join(self.full_rank_modules), self.full_rank_modules
        )
        return LoQTConfig(task_type=task_type, **values)


def load_config_and_tokenizer(args: ModelArguments):
    options = {"cache_dir": args.cache_dir, "revision": args.model_revision}
    name = args.config_name or args.model_name_or_path
    with blame("config_name" if args.config_name else "model_name_or_path", name):
        config = AutoConfig.from_pretrained(name, **options)
    name = args.tokenizer_name or args.model_name_or_path
    with blame("tokenizer_name", name):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if args.config_name is not None:
        config.vocab_size = len(tokenizer)
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, token, getattr(tokenizer, token))
    return config, tokenizer


def random_model(auto_class, config, dtype: str) -> PreTrainedModel:
    return auto_class.from_config(config, dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype))


def load_base_model(
    auto_class,
    model_args: ModelArguments,
    loqt_args: LoQTArguments,
    training_args: TrainingArguments,
    checkpoint: str | None,
    config,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """Load the base model, ready for an adapter; one that starts from scratch is written to `output_dir`/base_model first.

    An adapter is a change of its base, so a base that starts at random must be kept for it.
    """
    quantization = None
    if model_args.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="fp4" if loqt_args.quantize_weight == "fp4" else "nf4",
            bnb_4bit_use_double_quant=loqt_args.double_quant,
            bnb_4bit_compute_dtype=torch.float32 if model_args.dtype == "auto" else getattr(torch, model_args.dtype),
        )
    path = model_args.model_name_or_path
    with training_args.main_process_first(desc="base model"):
        if path is None:
            path = os.path.abspath(os.path.join(training_args.output_dir, "base_model"))
            # A resumed adapter must find the very base that it was trained on.
            resumed = checkpoint is not None and os.path.isdir(path)
            if training_args.should_save and not resumed:
                random_model(auto_class, config, model_args.dtype).save_pretrained(path)
                tokenizer.save_pretrained(path)
        with blame("model_name_or_path", path):
            model = auto_class.from_pretrained(
                path,
                config=config,
                revision=model_args.model_revision,
                cache_dir=model_args.cache_dir,
                dtype=model_args.dtype,
                quantization_config=quantization,
                use_safetensors=True,
            )
    if loqt_args.method == "full":
        return model
    if model_args.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=training_args.gradient_checkpointing)
    elif training_args.gradient_checkpointing:
        model.enable_input_require_grads()
    if training_args.ddp_find_unused_parameters is None:
        training_args.ddp_find_unused_parameters = False
    return model


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to go on from: the one asked for, or else the last complete one in `output_dir`."""
    if not args.do_train:
        return None
    if args.resume_from_checkpoint is not None:
        if not os.path.isdir(args.resume_from_checkpoint):
            raise BadInput(f"--resume_from_checkpoint {args.resume_from_checkpoint}: no such directory")
        return args.resume_from_checkpoint
    checkpoint = get_last_checkpoint(args.output_dir)
    if checkpoint is not None:
        _logger.warning(f"Resuming from {checkpoint}. Use another --output_dir to train from the start.")
    return checkpoint


def set_up_logging(args: TrainingArguments, logger: logging.Logger) -> None:
    """Let the script's logger and those of the libraries say what the arguments ask for, on this process."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    level = args.get_process_log_level()
    logger.setLevel(level)
    _logger.setLevel(level)
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)


def train(trainer: Trainer, checkpoint: str | None) -> dict:
    """Train from the checkpoint, if there is one, save model, metrics and state, and return the metrics."""
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    return result.metrics
