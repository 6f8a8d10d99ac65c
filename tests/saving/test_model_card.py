"""The LoQT section of an adapter's model card."""

import copy
import pickle
from dataclasses import fields

import pytest
from common import TokenDataset, loqt_config, make_trainer, tiny_llama, train_steps
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from loqt_peft import LoQTConfig, LoQTTrainerCallback
from loqt_peft.saving.model_card import add_loqt_section, keep_loqt_section


FOREIGN = """\
---
license: apache-2.0
tags:
- mine
base_model: user/base
---
# My model

It is good.

```bash
## no heading
```

## My results

| loss |
|---|
| 1 |
"""


@pytest.fixture
def card_path(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(FOREIGN)
    return path


def config_of(**kwargs):
    return loqt_config(base_model_name_or_path="user/base", **kwargs)


def test_second_call_replaces_the_first(card_path):
    add_loqt_section(card_path, config_of(num_updates=1))
    add_loqt_section(card_path, config_of(num_updates=1))
    once = card_path.read_text()
    assert once.count("## LoQT\n") == 1 and "so far: 1\n" in once
    add_loqt_section(card_path, config_of(num_updates=27))
    assert card_path.read_text() == once.replace("so far: 1\n", "so far: 27\n").replace(
        "| `num_updates` | `1` |", "| `num_updates` | `27` |"
    )


def test_foreign_text_and_metadata_stay(card_path):
    foreign = ModelCard(FOREIGN)
    add_loqt_section(card_path, config_of())
    card = ModelCard.load(card_path)
    before, rest = card.text.split("<!-- loqt_peft -->")
    after = rest.split("<!-- /loqt_peft -->\n\n")[1]
    assert before + after == foreign.text
    # between introduction and results
    assert after.startswith("## My results")
    assert card.data.license == "apache-2.0" and card.data.base_model == "user/base"
    assert card.data.tags == ["4-bit", "arxiv:2405.16528", "loqt", "mine"]
    add_loqt_section(card_path, config_of(quantize_weight=None))
    card_path.write_text(FOREIGN)
    add_loqt_section(card_path, config_of(quantize_weight=None))
    assert ModelCard.load(card_path).data.tags == ["arxiv:2405.16528", "loqt", "mine"]


def test_says_every_setting(card_path):
    config = config_of(target_modules=r".*(q_proj|v_proj)", loqt_alpha=0.25, max_interval=50)
    add_loqt_section(card_path, config)
    text = card_path.read_text()
    own = {field.name for field in fields(LoQTConfig)} - {field.name for field in fields(PeftConfig)}
    assert all(f"| `{name}` | `" in text for name in own)
    assert "| `loqt_alpha` | `0.25` |" in text and "| `max_interval` | `50` |" in text
    # a bar would end the cell
    assert r"| `target_modules` | `'.*(q_proj\|v_proj)'` |" in text


@pytest.mark.parametrize(
    "task_type, base, name",
    [
        ("CAUSAL_LM", "user/base", "AutoPeftModelForCausalLM"),
        ("SEQ_CLS", "user/base", "AutoPeftModelForSequenceClassification"),
        ("CAUSAL_LM", None, "PeftModel"),
        (None, "user/base", "AutoPeftModel"),
        (None, "/home/user/base", "PeftModel"),
    ],
)
def test_says_how_to_load(card_path, task_type, base, name):
    add_loqt_section(card_path, loqt_config(task_type=task_type, base_model_name_or_path=base), subfolder="other")
    text = card_path.read_text()
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert code.index("import loqt_peft") < code.index(f"model = {name}.from_pretrained(")
    assert "subfolder='other'" in code
    assert "KeyError: 'LOQT'" in text and "https://arxiv.org/abs/2405.16528" in text


def test_local_base_model_is_not_named(tmp_path):
    # the Hub refuses a card whose base model is a path or nothing
    tiny_llama().save_pretrained(tmp_path / "secret_base")
    for path in (str(tmp_path / "secret_base"), ""):
        model = get_peft_model(tiny_llama(), loqt_config())
        model.base_model.model.config._name_or_path = path
        model.base_model.model.name_or_path = path
        model.peft_config["default"].base_model_name_or_path = path or None
        model.save_pretrained(tmp_path / "adapter")
        card = ModelCard.load(tmp_path / "adapter" / "README.md")
        assert "secret_base" not in card.content
        assert card.data.base_model is None and card.data.library_name == "peft"
        assert not any(tag.startswith("base_model") for tag in card.data.tags)


def test_saving_describes_every_adapter(tmp_path):
    model = get_peft_model(tiny_llama(), loqt_config())
    train_steps(model, 2)
    model.add_adapter("other", loqt_config(r=3))
    for _ in range(2):
        model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("## LoQT\n") == 2 and text.count("<!-- loqt_peft -->") == 1
    default = text.split("<!-- loqt_peft -->")[1].split("<!-- /loqt_peft -->")[0]
    other = text.split("<!-- loqt_peft other -->")[1].split("<!-- /loqt_peft other -->")[0]
    assert "so far: 2\n" in default and "subfolder" not in default
    assert "| `r` | `3` |" in other and "subfolder='other'" in other


@pytest.mark.parametrize("metadata", ["", "---\nlicense: mit\n---\n", "---\n[\n---\n", "---\n- list\n---\n"])
def test_somebody_elses_readme_is_left_alone(tmp_path, metadata):
    for readme in (tmp_path / "README.md", tmp_path / "folder" / "README.md"):
        readme.parent.mkdir(exist_ok=True)
        readme.write_text(f"{metadata}# My project\n")
        loqt_config().save_pretrained(tmp_path / "folder")
        assert readme.read_text() == f"{metadata}# My project\n"


def test_nothing_is_written_without_a_card(tmp_path):
    loqt_config().save_pretrained(tmp_path / "adapter")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["adapter_config.json"]


def test_section_survives_a_new_card_of_the_trainer(tmp_path):
    model = get_peft_model(tiny_llama(), loqt_config())
    model.save_pretrained(tmp_path)
    keep_loqt_section(model)
    for writer in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        train_steps(writer, 1)
        (tmp_path / "README.md").write_text("---\ntags:\n- generated_from_trainer\n---\n# New\n")
        writer.create_or_update_model_card(str(tmp_path))
        card = ModelCard.load(tmp_path / "README.md")
        # of each its own, not of the model that it was copied from
        assert f"so far: {writer.peft_config['default'].num_updates}\n" in card.text
        assert {"generated_from_trainer", "loqt"} <= set(card.data.tags)
    (tmp_path / "README.md").unlink()
    (tmp_path / "adapter_config.json").unlink()
    model.create_or_update_model_card(str(tmp_path))
    assert "## LoQT" not in (tmp_path / "README.md").read_text()


def test_other_adapters_get_no_section(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert "LoQT" not in (tmp_path / "README.md").read_text()
    assert isinstance(PeftModel.from_pretrained(tiny_llama(), tmp_path), PeftModel)


def test_nothing_of_a_template_is_left(tmp_path):
    model = get_peft_model(tiny_llama(), loqt_config())
    train_steps(model, 2)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert "Information Needed" not in text and "Model ID" not in text and "[optional]" not in text
        card = ModelCard.load(tmp_path / "README.md")
        headings = [line for line in card.text.splitlines() if line.startswith("#")]
        assert headings == [
            "# LoQT adapter",
            "## LoQT",
            "### How to load it",
            "### Citation",
            "### Framework versions",
        ]


def test_what_somebody_wrote_into_a_template_stays(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    text = path.read_text()
    assert "# Model Card for Model ID" in text
    path.write_text(text.replace("## Uses", "It knows all about bees.\n\n## Uses"))
    add_loqt_section(path, config_of())
    text = path.read_text()
    assert "It knows all about bees." in text and "## Uses" not in text and "# LoQT adapter of base\n" in text


def test_empty_sections_of_the_trainer_go(card_path):
    card_path.write_text(f"{FOREIGN}\n## Model description\n\nMore information needed\n\n## Data\n\nMine.\n")
    add_loqt_section(card_path, config_of())
    text = card_path.read_text()
    assert "Model description" not in text and "## Data\n\nMine." in text and "## My results" in text


def test_a_run_is_described_by_its_trainer(tmp_path):
    model = get_peft_model(tiny_llama(), loqt_config())
    trainer = make_trainer(model, tmp_path / "out", [LoQTTrainerCallback()], max_steps=4, logging_steps=2)
    model.save_pretrained(tmp_path / "before")
    assert "- Steps:" not in (tmp_path / "before" / "README.md").read_text()
    trainer.train()
    trainer.evaluate(TokenDataset(8))
    trainer.save_model(tmp_path / "adapter")
    text = ModelCard.load(tmp_path / "adapter" / "README.md").text
    history = trainer.state.log_history
    loss = next(entry["loss"] for entry in reversed(history) if "loss" in entry)
    evaluated = next(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    assert f"- Training loss, last logged: {loss:.4f}\n" in text and f"- Evaluation loss: {evaluated:.4f}\n" in text
    assert "- Trained on: 64 examples\n" in text and "- Steps: 4 (" in text and "- Peak memory: " in text
    # each way of loading is there, and the settings are folded away
    assert text.index("PeftModel") < text.index("--to dense")
    assert text.index("<details>") < text.index("| `r` |") < text.index("</details>")
