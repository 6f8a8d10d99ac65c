"""A saved adapter, its base model and its tokenizer, loaded by what the adapter says of itself."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
import transformers
from huggingface_hub import hf_hub_download
from peft import PeftConfig
from peft.auto import check_import_allowlist, get_default_import_allowlist
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from .. import register
from ..config import LoQTConfig
from ..saving.seal import saved_base_quantization


register()

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def base_class(config: LoQTConfig) -> type:
    """The class that loads an adapter's base model: by its task type, else the class it was trained with.

    Raises:
        ValueError: If that class is not one of transformers.
    """
    if config.task_type is None and config.auto_mapping:
        library, name = config.auto_mapping["parent_library"], config.auto_mapping["base_model_class"]
        if not check_import_allowlist(get_default_import_allowlist(), library):
            raise ValueError(
                f"The adapter's base model is a {name} of {library!r}, which is not imported from a config."
            )
        return getattr(importlib.import_module(library), name)
    return getattr(transformers, AUTO_CLASSES.get(config.task_type, "AutoModelForCausalLM"))


def load_base(
    config: LoQTConfig,
    name_or_path: str,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    quantization_config: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """The base model of an adapter.

    Args:
        config (`LoQTConfig`): The adapter's.
        name_or_path (`str`): Of the base model; the revision is the config's if it is the config's model.
        dtype (`str` or `torch.dtype`): As in transformers; `"auto"` is the checkpoint's.
        device (`str`): Where to load it.
        quantization_config (`BitsAndBytesConfig`, *optional*): How it was quantized when the adapter was trained.
    """
    kwargs = {"dtype": dtype, "quantization_config": quantization_config}
    if name_or_path == config.base_model_name_or_path and config.revision:
        kwargs["revision"] = config.revision
    if torch.device(device).type != "cpu":
        kwargs["device_map"] = {"": device}
    return base_class(config).from_pretrained(name_or_path, **kwargs)


def trained_quantization(adapter: str, revision: str | None = None) -> BitsAndBytesConfig | None:
    """How the base model was quantized when an adapter was trained; `None` if it was dense.

    Args:
        adapter (`str`): Folder or Hub name.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
    """
    path = Path(adapter) / SAFETENSORS_WEIGHTS_NAME
    if not Path(adapter).is_dir():
        path = hf_hub_download(adapter, SAFETENSORS_WEIGHTS_NAME, revision=revision)
    quantization = saved_base_quantization(path)
    if quantization is None:
        return None
    quant_type, double_quant = quantization
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant
    )


def copy_tokenizer(output_dir: Path, *sources: str, revision: str | None = None) -> str | None:
    """Save the tokenizer of the first source that has one, and return that source."""
    for source in sources:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        except (OSError, ValueError, KeyError, ImportError):
            # a revision is the adapter's, which comes first
            revision = None
            continue
        tokenizer.save_pretrained(output_dir)
        return source
    return None


def load_config(adapter: str, revision: str | None = None) -> LoQTConfig:
    """The config of a saved adapter.

    Args:
        adapter (`str`): Folder or Hub name.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Raises:
        ValueError: If it is no LoQT adapter.
    """
    config = PeftConfig.from_pretrained(adapter, revision=revision)
    if not isinstance(config, LoQTConfig):
        raise ValueError(f"{adapter!r} is an adapter of type {config.peft_type.value}, not LoQT.")
    return config


def base_name(config: LoQTConfig, adapter: str) -> str:
    """Folder or Hub name of the base model that an adapter names.

    Raises:
        ValueError: If it names none.
    """
    if not config.base_model_name_or_path:
        raise ValueError(f"{adapter!r} does not say what its base model is. Pass --base-model.")
    return config.base_model_name_or_path
