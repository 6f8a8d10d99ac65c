"""What the model card (README.md) of a LoQT adapter says about it, and how it gets there."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import peft
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from yaml import YAMLError

from ..compat import calling_objects
from .card_template import without_template
from .run_figures import run_figures


if TYPE_CHECKING:
    from ..config import LoQTConfig


CARD_NAME = "README.md"
ARXIV_ID = "2405.16528"
BASE_MODEL_TAG = "base_model:adapter:"

SECTION = """\
## LoQT

This is an adapter for [PEFT](https://huggingface.co/docs/peft), trained with **LoQT: Low-Rank Adapters for Quantized
Pretraining** ([arXiv {arxiv_id}](https://arxiv.org/abs/{arxiv_id})). Each targeted layer trains one small matrix B under a
frozen projection P taken from the gradient; on growing intervals s·P·B is merged into the weight W, which {storage}, and a new
P is taken, so that the changes add up to full rank.

- Base model: {base_model}
- Updates (merges into W) so far: {num_updates}
{figures}
### How to load it

**As it is.** Loading needs the `loqt_peft` package. It may not be on PyPI: if `pip install loqt_peft` finds nothing, install
it from its source code with `pip install .`

```python
{code}
```

Without `import loqt_peft`, PEFT stops with `KeyError: 'LOQT'`: it does not know the method.

**On a base that you have loaded yourself**, in 4 bits for example: `PeftModel.from_pretrained(base_model, adapter)`, with
`PeftModel` of PEFT, after the same import. The base must be the same; its precision may differ.

**Without this package, once and for all**: `loqt export {export} plain --to dense` writes a model that plain transformers
loads. `--to bnb-4bit` and `--to lora` are other ways out.

All that is loaded of the adapter is safetensors and JSON. No pickle is read, and no remote code is run.

<details>
<summary>All settings of the method</summary>

| setting | value | meaning |
|---|---|---|
{settings}

</details>

### Citation

```bibtex
@inproceedings{{loeschcke2024loqt,
  title = {{LoQT: Low-Rank Adapters for Quantized Pretraining}},
  author = {{Loeschcke, Sebastian and Toftrup, Mads and Kastoryano, Michael J. and Belongie, Serge and
            Sn{{\\ae}}bjarnarson, V{{\\'e}}steinn}},
  booktitle = {{Advances in Neural Information Processing Systems}},
  volume = {{37}},
  year = {{2024}},
  url = {{https://arxiv.org/abs/{arxiv_id}}}
}}
```"""


###############################
# The section
###############################


def loqt_section(config: LoQTConfig, subfolder: str | None = None, figures: Mapping[str, str] | None = None) -> str:
    """What the card says about a LoQT adapter, in Markdown.

    Args:
        config (`LoQTConfig`): Of the adapter.
        subfolder (`str`, *optional*): Where the adapter lies beneath the card, if not beside it.
        figures (`Mapping[str, str]`, *optional*): Of the run that made it: what, and its value in words.
    """
    base_model = config.base_model_name_or_path
    if not base_model:
        base = "not recorded; the adapter is a change of the very weights that it was trained on"
    elif _is_repo_id(base_model):
        base = f"[{base_model}](https://huggingface.co/{base_model})"
    else:
        base = "a local model; the adapter is a change of its very weights"
    return SECTION.format(
        arxiv_id=ARXIV_ID,
        storage="stays in 4 bits and is requantized" if config.quantize_weight else "stays dense here",
        base_model=base,
        num_updates=config.num_updates,
        figures="".join(f"- {name}: {value}\n" for name, value in (figures or {}).items()),
        code=_loading_code(config, subfolder),
        export="ADAPTER" if subfolder is None else f"ADAPTER/{subfolder}",
        settings="\n".join(_settings(config)),
    )


def _title(config: LoQTConfig) -> str:
    base = config.base_model_name_or_path
    return f"LoQT adapter of {base.rpartition('/')[2]}" if _is_repo_id(base) else "LoQT adapter"


def _settings(config: LoQTConfig) -> Iterable[str]:
    inherited = {field.name for field in fields(PeftConfig)}
    values = config.to_dict()
    for field in fields(config):
        if field.name not in inherited:
            value = values[field.name]
            value = sorted(value) if isinstance(value, set) else value
            cells = (f"`{field.name}`", f"`{value!r}`", field.metadata["help"])
            yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _loading_code(config: LoQTConfig, subfolder: str | None) -> str:
    peft_class = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel).__name__
    loads_base = hasattr(peft, f"Auto{peft_class}") and _is_repo_id(config.base_model_name_or_path)
    name = f"Auto{peft_class}" if loads_base else "PeftModel"
    lines = ["import loqt_peft  # makes LoQT known to PEFT", f"from peft import {name}", ""]
    lines.append('adapter = "..."  # this repository, or a directory')
    if not loads_base:
        lines.append("base_model = ...  # loaded, with the weights that the adapter was trained on")
    arguments = ["adapter"] if loads_base else ["base_model", "adapter"]
    if subfolder is not None:
        arguments.append(f"subfolder={subfolder!r}")
    lines.append(f"model = {name}.from_pretrained({', '.join(arguments)})")
    return "\n".join(lines)


def _is_repo_id(name: str | None) -> bool:
    if not name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    # transformers, too, prefers a directory of that name
    return not Path(name).is_dir()


###############################
# The card
###############################


def add_loqt_section(
    path: str | Path, config: LoQTConfig, subfolder: str | None = None, tags: Iterable[str] = ()
) -> None:
    """Add the section of an adapter to the card at `path`, or replace it there. All other text stays.

    Of the metadata, tags are added. A base model that is not on the Hub is taken out: the Hub refuses such a card.

    Args:
        path (`str` or `Path`): The card; must exist.
        config (`LoQTConfig`): Of the adapter.
        subfolder (`str`, *optional*): Where the adapter lies beneath the card, if not beside it.
        tags (iterable of `str`): More tags to add.
    """
    card = ModelCard.load(path)
    name = "loqt_peft" if subfolder is None else f"loqt_peft {subfolder}"
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{begin}\n{loqt_section(config, subfolder, run_figures())}\n{end}"
    card.text = without_template(card.text, _title(config))
    old = re.search(f"{re.escape(begin)}.*?{re.escape(end)}", card.text, re.DOTALL)
    if old:
        card.text = card.text[: old.start()] + section + card.text[old.end() :]
    else:
        position = _first_heading(card.text)
        before, after = card.text[:position].rstrip(), card.text[position:]
        card.text = f"{before}\n\n{section}\n\n{after}" if after else f"{before}\n\n{section}\n"

    card.text = card.text.rstrip() + "\n"
    if "base_model" in card.data and isinstance(card.data.base_model, str) and not _is_repo_id(card.data.base_model):
        card.data.pop("base_model")
    new = ["loqt", f"arxiv:{ARXIV_ID}", *(["4-bit"] if config.quantize_weight else [])]
    card.data.tags = sorted(
        tag
        for tag in {*(card.data.tags or []), *tags, *new}
        if not tag.startswith(BASE_MODEL_TAG) or _is_repo_id(tag.removeprefix(BASE_MODEL_TAG))
    )
    card.save(path)


def _first_heading(text: str) -> int:
    # of the second level or PEFT's last one, outside code and other adapters' sections: what comes before it introduces the
    # model
    position, in_code, in_section = 0, False, False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith(("```", "~~~")):
            in_code = not in_code
        elif line.startswith(("<!-- loqt_peft", "<!-- /loqt_peft")):
            in_section = not line.startswith("<!-- /")
        elif line.startswith(("## ", "### Framework versions")) and not in_code and not in_section:
            return position
        position += len(line)
    return position


def write_model_card(model: PeftModel, output_dir: str | Path, adapter_names: Iterable[str]) -> None:
    """Write PEFT's card of `model` to `output_dir`, or update it there, with the sections of the LoQT adapters named."""
    path = Path(output_dir) / CARD_NAME
    # PEFT replaces them by its own
    tags = (ModelCard.load(path).data.tags or []) if path.exists() else []
    type(model).create_or_update_model_card(model, str(output_dir))
    for name in adapter_names:
        config = model.peft_config[name]
        if config.peft_type == "LOQT":
            add_loqt_section(path, config, None if name == "default" else name, tags)


###############################
# Who writes cards
###############################


def describe_saved_adapter(config: LoQTConfig, save_directory: str | Path) -> None:
    """Add the section to the card that `PeftModel.save_pretrained` has written; without one, do nothing.

    Args:
        config (`LoQTConfig`): Of the adapter.
        save_directory (`str` or `Path`): Of the adapter. PEFT's card lies there, or above it if the adapter has a name.
    """
    directory = Path(save_directory).absolute()
    if (directory / CARD_NAME).exists():
        path, subfolder = directory / CARD_NAME, None
    else:
        path, subfolder = directory.parent / CARD_NAME, directory.name
    if not _is_peft_card(path):
        return
    add_loqt_section(path, config, subfolder)

    # `PeftModel.push_to_hub` goes on to write, over this card, the one of the repository or a general one of transformers.
    # It hands the config nothing, so that only the frame that is running knows that card.
    for model, method, variables in calling_objects(PeftModel):
        card = variables.get("model_card")
        if method == "push_to_hub" and isinstance(card, ModelCard):
            card.save(path)
            tags = card.data.tags or []
            model.create_or_update_model_card(str(path.parent))
            add_loqt_section(path, config, subfolder, tags)
            card.content = ModelCard.load(path).content
            return


def _is_peft_card(path: Path) -> bool:
    # a config can be saved anywhere, and the README there be somebody's own
    if not path.exists():
        return False
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.get("library_name") == "peft"
    except (YAMLError, ValueError):
        return False


def keep_loqt_section(model: PeftModel) -> None:
    """Let every card that `model` writes from now on have the section of each LoQT adapter that is saved beside it.

    `Trainer.create_model_card` writes a new card and then lets the model, and nobody else, add to it.
    """
    model.create_or_update_model_card = functools.partial(_create_or_update_model_card, model)


def _create_or_update_model_card(model: PeftModel, output_dir: str) -> None:
    folders = {name: Path(output_dir, "" if name == "default" else name) for name in model.peft_config}
    write_model_card(model, output_dir, [name for name, folder in folders.items() if (folder / CONFIG_NAME).exists()])
