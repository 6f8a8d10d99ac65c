"""`loqt doctor`: what it says of healthy and of broken runs, as text and as JSON."""

import json

import pytest
import torch
from common import TokenDataset, loqt_config, make_trainer, tiny_llama, train_steps
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from loqt_peft import LoQTTrainerCallback
from loqt_peft.cli.main import main
from loqt_peft.health import Health, run_findings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    return path


def train(base, output_dir, callbacks):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), loqt_config(update_interval=2))
    trainer = make_trainer(model, output_dir, callbacks, TokenDataset(), save_strategy="steps", save_steps=4)
    trainer.train()
    return output_dir / "checkpoint-4"


@pytest.fixture(scope="module")
def healthy(base, tmp_path_factory):
    return train(base, tmp_path_factory.mktemp("healthy"), [LoQTTrainerCallback()])


def doctor(capsys, *arguments):
    capsys.readouterr()
    text_status = main(["doctor", *map(str, arguments)])
    text = capsys.readouterr().out
    status = main(["doctor", *map(str, arguments), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == text_status == (0 if found["in_order"] else 1)
    # the text says all that the programs get
    for finding in found["findings"]:
        assert finding["what"] in text and finding["remedy"] in text
    for version in found["versions"].values():
        assert version in text
    return text, found


def codes(found):
    return [finding["code"] for finding in found["findings"]]


def test_a_machine(capsys):
    text, found = doctor(capsys)
    assert found["in_order"] and found["adapter"] is None and found["weights"] is None
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__ in text
    assert any(device.startswith("cpu") for device in found["devices"])
    assert text.endswith("to mend: nothing\n")


def test_a_healthy_run(capsys, base, healthy):
    text, found = doctor(capsys, healthy)
    assert found["in_order"], found["findings"]
    assert found["adapter"]["updates"] == "2" and found["adapter"]["base model"] == str(base)
    assert found["adapter"]["layers"] == 14 and found["adapter"]["W"] == "nf4"
    counts = [int(row.split(" ")[0].replace(",", "")) for row in found["weights"].values()]
    assert sum(counts) == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())


@pytest.mark.filterwarnings("ignore:The projection P", "ignore:The LoQT adapter 'default' was trained")
def test_a_forgotten_callback(capsys, base, tmp_path):
    _, found = doctor(capsys, train(base, tmp_path, []))
    assert codes(found) == ["run_without_updates", "never_updated"]
    assert "LoQTTrainerCallback" in found["findings"][0]["remedy"]


def test_a_damaged_adapter(capsys, healthy, tmp_path):
    tensors = load_file(healthy / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("up_proj.loqt_weight"))
    tensors[key][7] ^= 1
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text((healthy / "adapter_config.json").read_text())
    text, found = doctor(capsys, tmp_path)
    assert codes(found) == ["not_verified"]
    assert "do not match their checksums" in text and "up_proj.loqt_weight" in text


def test_a_truncated_adapter(capsys, healthy, tmp_path):
    content = (healthy / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "adapter_config.json").write_text((healthy / "adapter_config.json").read_text())
    _, found = doctor(capsys, tmp_path)
    assert codes(found) == ["not_loaded"]
    # other commands say so in one line
    assert main(["export", str(tmp_path), str(tmp_path / "out"), "--to", "dense"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_another_base(capsys, healthy, tmp_path):
    tiny_llama(seed=1).save_pretrained(tmp_path)
    text, found = doctor(capsys, healthy, "--base-model", tmp_path)
    assert codes(found) == ["not_verified"]
    assert "made for other base weights" in text


def test_a_base_that_is_gone(capsys, healthy, tmp_path):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_bytes((healthy / name).read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    _, found = doctor(capsys, tmp_path)
    assert codes(found) == ["base_without_name"]


def test_experts_that_are_not_reached(capsys, tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="fused parameter"):
        model = get_peft_model(base, loqt_config())
    train_steps(model, 2)
    model.save_pretrained(tmp_path / "adapter")
    text, found = doctor(capsys, tmp_path / "adapter")
    assert codes(found) == ["fused_weights_frozen"]
    assert "experts" in text and "% of the model's weights" in text


def test_what_is_no_adapter_is_an_error_in_one_line(capsys, tmp_path):
    assert main(["doctor", str(tmp_path / "nothing")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_live_model_and_its_optimizer():
    model = get_peft_model(tiny_llama(), loqt_config())
    model.get_base_model().name_or_path = "."
    model.peft_config["default"].base_model_name_or_path = "."
    train_steps(model, 2)
    assert Health.of(model).in_order
    B = [p for name, p in model.named_parameters() if "loqt_B" in name]
    optimizer = torch.optim.RMSprop(B, centered=True)
    model.base_model.model.model.layers[0].mlp.up_proj.config["default"].optimizer_state = "rotate"
    assert [finding.code for finding in Health.of(model, optimizer).findings] == ["centered_moment"]
    assert [finding.code for finding in Health.of(tiny_llama()).findings] == ["no_loqt_layers"]


def test_the_newest_state_of_a_run_and_its_last_figures_count(tmp_path):
    def write(step, *ratios):
        (tmp_path / f"checkpoint-{step}").mkdir()
        logs = [{"loqt/updates": i + 1, "loqt/change_to_error": ratio} for i, ratio in enumerate(ratios)]
        state = {"global_step": step, "log_history": logs}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))

    write(4, 2.0)
    assert run_findings(tmp_path) == []
    write(8, 2.0, 0.5)
    assert [finding.code for finding in run_findings(tmp_path)] == ["change_lost_in_quantization"]
    write(12, 2.0, 0.5, 1.5)
    assert run_findings(tmp_path) == []
