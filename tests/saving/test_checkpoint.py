"""Nothing learned is lost: resume is exact, and an adapter that is damaged or meant for another model is refused."""

import copy
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import warnings
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from common import TESTS, TokenDataset, load_llama, loqt_config, make_trainer, tiny_llama, token_batch, train_steps
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel
from transformers.trainer_utils import get_last_checkpoint as newest_checkpoint

from loqt_peft import LoQTConfig, LoQTTrainerCallback, get_last_checkpoint
from loqt_peft.layers.find import loqt_layers
from loqt_peft.saving.base_name import base_name_findings, report_base_name
from loqt_peft.saving.seal import FORMAT_VERSION, SEAL_SIZE, Seal, checksum
from loqt_peft.training.update import begin_step, end_step


STEPS = 40
# T = 0, 8, 19, 31
SCHEDULE = {
    "update_interval": 7,
    "interval_schedule": "exponential",
    "interval_growth": 4.0,
    "max_interval": 12,
}
FIXTURE = TESTS / "fixtures" / "adapter_format_1"


def small_llama(seed=0, **kwargs):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return tiny_llama(seed, **{**sizes, **kwargs})


@torch.no_grad()
def logits(model, seed=99):
    model.eval()
    return model(input_ids=token_batch(seed)).logits


###############################
# Resume
###############################


def run(folder, config=None, resume=None, dtype=torch.float32, blocks=1, **kwargs):
    """Train to step 40; everything that training left behind."""
    model = small_llama(num_hidden_layers=blocks).to(dtype)
    model = get_peft_model(model, loqt_config(r=4, full_rank_modules="all", **SCHEDULE, **(config or {})))
    defaults = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    trainer = make_trainer(model, folder, [LoQTTrainerCallback()], TokenDataset(96), **{**defaults, **kwargs})
    trainer.train(resume_from_checkpoint=resume)
    optimizer = trainer.optimizer.state_dict()["state"]
    history = [
        {k: v for k, v in entry.items() if k in ("step", "loss", "grad_norm", "learning_rate")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    updates = [entry["step"] - 1 for entry in trainer.state.log_history if "loqt/updates" in entry]
    return {k: v.clone() for k, v in model.state_dict().items()}, optimizer, history, updates


def same(actual, expected):
    if isinstance(expected, torch.Tensor):
        return torch.equal(actual, expected)
    if isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(same(actual[key], expected[key]) for key in expected)
    return actual == expected


def assert_same(actual, expected):
    for this, that in zip(actual, expected, strict=True):
        assert same(this, that)
    assert expected[-1] == [0, 8, 19, 31]


def test_resume_is_bit_identical_wherever_a_run_stopped(tmp_path):
    expected = run(tmp_path / "straight")
    # around each update, in the middle of each gap, and at both ends
    around = {update + offset for update in (0, 8, 19, 31) for offset in (-1, 0, 1, 2)}
    for step in sorted(around & set(range(1, STEPS)) | {4, 13, 25, STEPS - 1}):
        folder = tmp_path / f"resumed-{step}"
        actual = run(folder, resume=str(tmp_path / "straight" / f"checkpoint-{step}"), save_strategy="no")
        assert_same(actual, expected)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "case",
    [
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
        {"dtype": torch.bfloat16},
        {"optim": "adamw_bnb_8bit"},
        {"config": {"optimizer_state": "rotate"}},
        {"config": {"optimizer_state": "reset", "quantize_weight": None, "quantize_projection": None}},
        {"config": {"double_quant": True, "retain_base": "drop"}},
        {"config": {"error_feedback": True}},
        {"config": {"projection": "random"}},
    ],
    ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()),
)
def test_resume_is_bit_identical_in_every_mode(tmp_path, case):
    expected = run(tmp_path / "straight", save_steps=8, **case)
    # right before an update, between two, and right after one
    for step in (8, 24, 32):
        checkpoint = str(tmp_path / "straight" / f"checkpoint-{step}")
        assert_same(run(tmp_path / "resumed", resume=checkpoint, **{**case, "save_strategy": "no"}), expected)


def test_resume_in_the_middle_of_a_staggered_update(tmp_path):
    case = {"config": {"update_mode": "stagger"}, "blocks": 3}
    expected = run(tmp_path / "straight", **case)
    assert expected[-1] == [0, 1, 2, 8, 9, 10, 19, 20, 21, 31, 32, 33]
    for step in (1, 2, 9, 10, 20):
        checkpoint = str(tmp_path / "straight" / f"checkpoint-{step}")
        actual = run(tmp_path / f"resumed-{step}", resume=checkpoint, save_strategy="no", **case)
        assert all(same(this, that) for this, that in zip(actual, expected, strict=True)), step


def test_best_model_is_loaded_back_across_switches(tmp_path):
    config = {"update_interval": 2, "interval_schedule": "constant"}
    model = get_peft_model(small_llama(), loqt_config(r=4, full_rank_modules="all", **config))
    trainer = make_trainer(
        model,
        tmp_path,
        [LoQTTrainerCallback()],
        eval_dataset=TokenDataset(8, seed=1),
        max_steps=8,
        # overfits what it has no reason to know, so that the best model is an early one
        learning_rate=0.03,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        save_only_model=True,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-8"
    saved = load_file(best / "adapter_model.safetensors")
    live = get_peft_model_state_dict(model)
    assert saved.keys() == live.keys() and all(torch.equal(saved[k], live[k]) for k in saved)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


###############################
# Kills and full disks
###############################


@pytest.fixture(scope="module")
def forkserver():
    """Forks from a process that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_checkpoint"])
    with pytest.MonkeyPatch.context() as patch:
        # the server of Python 3.11 does not take over sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        first = context.Process(target=get_last_checkpoint, args=("nowhere",))
        first.start()
        first.join()
        yield context


def train_from_last_checkpoint(folder):
    run(folder, resume=get_last_checkpoint(folder), save_total_limit=3)


def train_without_room(folder):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # pytest captures the output in a file, which must not be what runs full
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    run(folder, resume=f"{folder}/checkpoint-4", save_steps=8, max_steps=8, logging_steps=100)


MEASURED = ("loqt/seconds", "loqt/tokens_per_second", "loqt/peak_resident_memory")


def saved(checkpoint):
    """Adapter, optimizer and logs of a checkpoint, but for what depends on the clock."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return {
        "adapter": load_file(checkpoint / "adapter_model.safetensors"),
        "optimizer": torch.load(checkpoint / "optimizer.pt", weights_only=True),
        "logs": [{k: v for k, v in entry.items() if k not in MEASURED} for entry in state["log_history"]],
    }


def test_killed_training_resumes_to_the_same_bits(forkserver, tmp_path, pytestconfig):
    """50 kills: `pytest tests/saving/test_checkpoint.py -k killed --kills 50 -s`."""
    run(tmp_path / "straight", save_steps=STEPS)
    expected = saved(tmp_path / "straight" / "checkpoint-40")
    folder, generator = tmp_path / "killed", random.Random(0)
    wanted = pytestconfig.getoption("kills")
    kills = resumable = incomplete = ends = 0
    while kills < wanted or folder.exists() or not ends:
        process = forkserver.Process(target=train_from_last_checkpoint, args=(str(folder),))
        process.start()
        process.join(generator.uniform(0.2, 4) if kills < wanted else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            newest = newest_checkpoint(folder) if folder.is_dir() else None
            resumable += get_last_checkpoint(folder) is not None
            incomplete += newest is not None and newest != get_last_checkpoint(folder)
        else:
            assert process.exitcode == 0
            assert same(saved(folder / "checkpoint-40"), expected)
            ends += 1
            shutil.rmtree(folder)
    print(
        f"{kills} kills, {resumable} resumed from a checkpoint, {incomplete} past an incomplete one; "
        f"{ends} runs ended, all with the same bits"
    )


def test_full_disk_leaves_earlier_checkpoints_whole(forkserver, tmp_path):
    run(tmp_path, save_steps=4, max_steps=4)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    process = forkserver.Process(target=train_without_room, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == 1
    assert all(path.read_bytes() == content for path, content in before.items())
    assert newest_checkpoint(tmp_path).endswith("checkpoint-8")
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "trainer_state.json").unlink(),
        lambda folder: (folder / "trainer_state.json").write_text('{"global_step": '),
        lambda folder: (folder / "adapter_config.json").write_text(""),
        lambda folder: os.truncate(folder / "adapter_model.safetensors", 5000),
        lambda folder: os.truncate(folder / "optimizer.pt", 500),
        lambda folder: (folder / "rng_state.pth").write_bytes(b""),
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        lambda folder: (folder / "adapter_config.json").unlink(),
        lambda folder: (folder / "optimizer.pt").unlink(),
        lambda folder: (folder / "scheduler.pt").unlink(),
        lambda folder: (folder / "rng_state.pth").unlink(),
    ],
)
def test_incomplete_checkpoints_are_passed_over(tmp_path, damage):
    assert get_last_checkpoint(tmp_path / "nowhere") is None
    run(tmp_path, save_steps=2, max_steps=4)
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    damage(tmp_path / "checkpoint-4")
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    damage(tmp_path / "checkpoint-2")
    assert get_last_checkpoint(tmp_path) is None


def test_what_a_complete_checkpoint_holds(tmp_path, caplog):
    run(tmp_path, save_steps=2, max_steps=4, save_only_model=True)
    # there is no optimizer, but what was trained
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    # of two adapters each has a folder
    last = tmp_path / "checkpoint-4"
    (last / "ref").mkdir()
    shutil.copy(last / "adapter_config.json", last / "ref")
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "ref/adapter_model.safetensors" in caplog.text
    shutil.copy(last / "adapter_model.safetensors", last / "ref")
    assert get_last_checkpoint(tmp_path) == str(last)
    # of a model in several files all
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (last / name).unlink()
    shutil.rmtree(last / "ref")
    (last / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00001.safetensors"}}')
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    save_file({"x": torch.zeros(1)}, last / "model-00001-of-00001.safetensors")
    assert get_last_checkpoint(tmp_path) == str(last)
    # 10 comes after 2
    last.rename(tmp_path / "checkpoint-10")
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


###############################
# What does not fit
###############################


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    small_llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter_dir(base_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(load_llama(base_dir, "dense"), loqt_config(full_rank_modules=["norm"]))
    train_steps(model, 2)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "config, match",
    [
        ({"r": 4}, r"Another rank, 8 in the adapter and 4 in this model: model\.layers\.0\.mlp\.down_proj"),
        (
            {"target_modules": ["q_proj"]},
            r"targets layers that this model's config does not target: model.layers.0.mlp.down_proj",
        ),
        (
            {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
            r"not target: model\.layers\.0\.mlp\.up_proj",
        ),
        ({"quantize_weight": "fp4"}, r"quantize_weight='nf4' in the adapter and 'fp4' in this model"),
        ({"quantize_projection": None}, r"quantize_projection='nf4' in the adapter and None in this model"),
        ({"double_quant": True}, r"'nf4' in the adapter and 'nf4' with double_quant in this model"),
        ({"error_feedback": True}, r"'nf4' in the adapter and 'nf4' with error_feedback in this model"),
        ({"loqt_alpha": 1.0}, r"Another scale, 0.5 in the adapter and 1 in this model"),
        ({"full_rank_modules": None}, r"no place for: model\.norm\.weight"),
        ({"full_rank_modules": ["norm", "embed_tokens"]}, r"Missing in the adapter: model\.embed_tokens\.weight"),
    ],
)
def test_adapter_of_another_kind_is_refused_and_nothing_is_changed(base_dir, adapter_dir, config, match):
    model = get_peft_model(load_llama(base_dir, "dense"), loqt_config(**{"full_rank_modules": ["norm"], **config}))
    train_steps(model, 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        model.load_adapter(adapter_dir, "default", is_trainable=True)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("load", ["peft", "transformers"])
def test_adapter_for_another_base_is_refused(adapter_dir, load):
    other = small_llama(seed=1, hidden_size=64, intermediate_size=128)
    with pytest.raises(ValueError, match="other base weights than this model's: model.layers.0"):
        if load == "peft":
            PeftModel.from_pretrained(other, adapter_dir)
        else:
            other.load_adapter(str(adapter_dir))
            logits(other)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, folder: model.forward(input_ids=token_batch(0)),
        lambda model, folder: model.model(input_ids=token_batch(0)),
        lambda model, folder: model.model.layers[0].self_attn.q_proj(torch.zeros(1, 64)),
        lambda model, folder: model.generate(token_batch(0), max_new_tokens=1, do_sample=False),
        lambda model, folder: model.save_pretrained(folder),
        lambda model, folder: begin_step(model, 0),
        lambda model, folder: [layer.merge() for _, layer in loqt_layers(model)],
        lambda model, folder: next(loqt_layers(model))[1].get_delta_weight("default"),
    ],
    ids=["forward", "inner", "layer", "generate", "save", "begin_step", "merge", "delta"],
)
def test_no_door_leads_past_the_seals(base_dir, adapter_dir, tmp_path, use):
    other = small_llama(seed=1, hidden_size=64, intermediate_size=128)
    other.load_adapter(str(adapter_dir), is_trainable=True)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    for _ in range(2):
        with pytest.raises(ValueError, match="other base weights than this model's: model.layers.0"):
            use(other, tmp_path / "saved")
    assert not list(tmp_path.rglob("*.safetensors"))
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items() if key in before)

    right = load_llama(base_dir, "dense")
    right.load_adapter(str(adapter_dir), is_trainable=True)
    use(right, tmp_path / "saved")
    # what was verified is not looked at again
    assert not any(module._forward_pre_hooks for module in right.modules())
    assert not any(layer.verifications for _, layer in loqt_layers(right))


def test_copies_of_a_model_are_verified_on_their_own(base_dir, adapter_dir):
    model = load_llama(base_dir, "dense")
    model.load_adapter(str(adapter_dir))
    twin = copy.deepcopy(model)
    expected = logits(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(layer.verifications for _, layer in loqt_layers(twin))
    assert torch.equal(logits(twin), expected)
    assert not any(module._forward_pre_hooks for module in twin.modules())


@pytest.mark.parametrize("door", ["peft", "low memory", "transformers"])
def test_loading_in_inference_mode(base_dir, feedback_dir, door):
    expected = logits(PeftModel.from_pretrained(load_llama(base_dir, "dense"), feedback_dir))
    base = load_llama(base_dir, "dense")
    with torch.inference_mode():
        if door == "transformers":
            base.load_adapter(str(feedback_dir), is_trainable=True)
            model = base
        else:
            model = PeftModel.from_pretrained(
                base, feedback_dir, is_trainable=True, low_cpu_mem_usage=door == "low memory"
            )
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
    # and to be trained on
    for step in (0, 1):
        model.train()
        begin_step(model, step)
        loss = model(input_ids=token_batch(step), labels=token_batch(step)).loss
        loss.backward()
        optimizer = torch.optim.AdamW([layer.loqt_B["default"] for _, layer in loqt_layers(model)])
        optimizer.step()
        end_step(model, optimizer)
    assert all(layer.num_updates("default") == 4 for _, layer in loqt_layers(model))


def test_models_without_embeddings(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **sizes},
        vision_config={"image_size": 16, "patch_size": 8, **sizes},
    )
    CLIPModel(config).save_pretrained(tmp_path / "base")
    inputs = {"input_ids": token_batch(0), "pixel_values": torch.randn(4, 3, 16, 16)}
    model = get_peft_model(CLIPModel.from_pretrained(tmp_path / "base"), loqt_config(task_type=None))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.begin_step(0)
    model(**inputs, return_loss=True).loss.backward()
    optimizer.step()
    model.end_step(optimizer)
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(**inputs).logits_per_text
        loaded = PeftModel.from_pretrained(CLIPModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
        assert torch.equal(loaded(**inputs).logits_per_text, expected)
        loaded = CLIPModel.from_pretrained(tmp_path / "base")
        loaded.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(loaded(**inputs).logits_per_text, expected)


@pytest.mark.parametrize("base", ["4bit", "4bit-double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saves", [False, True])
def test_a_4bit_base_that_was_evaluated_before(base_dir, tmp_path, base, dtype, saves):
    model = get_peft_model(load_llama(base_dir, base, dtype), loqt_config())
    train_steps(model, 2)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    evaluated = load_llama(base_dir, base, dtype)
    for module in evaluated.modules():
        # what bitsandbytes does in eval where the processor has AVX512-BF16
        if isinstance(module, bnb.nn.Linear4bit):
            packed, state = _convert_weight_packed_for_cpu(module.weight.data, module.weight.quant_state)
            module.weight.data, module.weight.quant_state = packed, state
    if saves:
        evaluated.state_dict()
    assert torch.equal(logits(PeftModel.from_pretrained(evaluated, tmp_path)), expected)

    small_llama(seed=1, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other base weights"):
        PeftModel.from_pretrained(load_llama(tmp_path / "other", base, dtype), tmp_path)


@pytest.mark.parametrize("full_rank_modules", [None, "all"])
def test_a_base_that_exists_nowhere(tmp_path, full_rank_modules):
    with pytest.warns(
        UserWarning, match="a LlamaForCausalLM, cannot be found again: it has no `name_or_path`"
    ) as found:
        model = get_peft_model(small_llama(), loqt_config(full_rank_modules=full_rank_modules))
        train_steps(model, 2)
        model.save_pretrained(tmp_path / "adapter")
        model.save_pretrained(tmp_path / "adapter")
    messages = [str(warning.message) for warning in found if "cannot be found" in str(warning.message)]
    assert len(messages) == 1 and ("the adapter is lost" in messages[0]) == (full_rank_modules is None)

    # what the warning says helps
    base, path = small_llama(), str(tmp_path / "base")
    base.save_pretrained(path)
    base.name_or_path = path
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(base, loqt_config(full_rank_modules=full_rank_modules))
        train_steps(model, 2)
        model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    shutil.rmtree(path)
    assert [finding.code for finding in base_name_findings(model)] == ["base_without_name"]


def test_each_of_several_bases_is_warned_of_once():
    models = [get_peft_model(small_llama(), loqt_config()) for _ in range(2)]
    for module in (models[0], nn.ModuleList(models)):
        with pytest.warns(UserWarning, match="cannot be found again") as found:
            report_base_name(module)
        assert len(found) == 1


def test_adapter_for_another_base_that_replaces_all_of_it_is_loaded(tmp_path):
    # a run that began with random weights nobody kept must still resume
    model = get_peft_model(small_llama(), loqt_config(full_rank_modules="all"))
    train_steps(model, 2)
    model.save_pretrained(tmp_path / "drifted")
    with pytest.warns(UserWarning, match="made on other base weights"):
        loaded = PeftModel.from_pretrained(small_llama(seed=1), tmp_path / "drifted")
    assert torch.equal(logits(loaded), logits(model))

    undrifted = get_peft_model(small_llama(), loqt_config(full_rank_modules="all"))
    undrifted.save_pretrained(tmp_path / "undrifted")
    with pytest.raises(ValueError, match="other base weights"):
        PeftModel.from_pretrained(small_llama(seed=1), tmp_path / "undrifted")


def test_4bit_layers_that_are_not_targeted_belong_to_the_base(base_dir, tmp_path):
    # full_rank_modules="all" cannot train what is quantized, so the adapter does not hold it
    model = get_peft_model(
        load_llama(base_dir, "4bit"), loqt_config(target_modules=["q_proj"], full_rank_modules="all")
    )
    train_steps(model, 2)
    model.save_pretrained(tmp_path / "adapter")
    small_llama(seed=1, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other base weights"):
        PeftModel.from_pretrained(load_llama(tmp_path / "other", "4bit"), tmp_path / "adapter")


@pytest.mark.parametrize("base", ["dense", "4bit"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_base_in_another_precision_is_the_same_base(base_dir, adapter_dir, base, dtype):
    model = PeftModel.from_pretrained(load_llama(base_dir, base, dtype), adapter_dir)
    saved = load_file(adapter_dir / "adapter_model.safetensors")
    assert all(torch.equal(v, saved[k]) for k, v in get_peft_model_state_dict(model).items() if "loqt_B" in k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_matrices_keep_the_dtype_that_they_were_saved_in(base_dir, tmp_path, dtype):
    model = get_peft_model(
        load_llama(base_dir, "dense", dtype),
        loqt_config(quantize_weight=None, quantize_projection=None, update_interval=2),
    )
    # the last step is not an update, so that B is not zero
    train_steps(model, 4)
    model.save_pretrained(tmp_path)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            load_llama(base_dir, "dense", other), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        )
        for (_, expected), (_, actual) in zip(loqt_layers(model), loqt_layers(loaded), strict=True):
            assert torch.equal(expected.effective_weight("default"), actual.effective_weight("default"))


def test_state_of_a_newer_format_is_refused(base_dir, adapter_dir, tmp_path):
    shutil.copytree(adapter_dir, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=f"reads up to format {FORMAT_VERSION}: upgrade loqt_peft"):
        LoQTConfig(format_version=FORMAT_VERSION + 1)
    state = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in state if "loqt_seal" in key)
    seal = state[key].clone()
    seal[0] = FORMAT_VERSION + 1
    # a version of the future may have a longer one
    for newer in (torch.cat([seal[:-1], torch.tensor([checksum(seal[:-1])])]), torch.cat([seal, seal])):
        save_file({**state, key: newer}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"reads up to format {FORMAT_VERSION}: upgrade loqt_peft"):
            PeftModel.from_pretrained(load_llama(base_dir, "dense"), tmp_path)


def test_seal_survives_its_tensor():
    sample = torch.randn(64)
    seal = Seal(1, (1, 2**32 - 1, 3, 4), (1, 5, 5, 6), 9, 10, 8, 7, 17, 2, 0.1, 258, sample)
    tensor = seal.to_tensor()
    assert tensor.shape == (SEAL_SIZE,)
    restored = Seal.from_tensor(tensor)
    assert torch.equal(restored.base_sample, sample)
    restored.base_sample = seal.base_sample = None
    assert restored == seal
    for index in range(SEAL_SIZE):
        damaged = tensor.clone()
        damaged[index] ^= 1
        with pytest.raises(ValueError):
            Seal.from_tensor(damaged)


def test_seals_are_zero_but_in_a_saved_adapter(base_dir, adapter_dir):
    model = PeftModel.from_pretrained(load_llama(base_dir, "dense"), adapter_dir)
    assert all(not layer.loqt_seal["default"].any() for _, layer in loqt_layers(model))
    # what was verified while it was loaded waits for nothing
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(layer.verifications for _, layer in loqt_layers(model))
    saved = get_peft_model_state_dict(model)
    assert all(v.any() for k, v in saved.items() if "loqt_seal" in k)
    set_peft_model_state_dict(model, saved)
    model.load_state_dict(model.state_dict(), strict=True)


def test_a_loader_that_drops_layers_is_noticed(base_dir, adapter_dir, tmp_path):
    shutil.copytree(adapter_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = load_llama(base_dir, "dense")
    # transformers loads what there is a place for
    model.load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match="does not target: all layers of the adapter"):
        model(input_ids=token_batch())


def test_an_adapter_that_was_rounded_is_not_taken_for_a_damaged_one(base_dir, adapter_dir, tmp_path):
    shutil.copytree(adapter_dir, tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "adapter_model.safetensors")
    rounded = {key: tensor.bfloat16() if key.endswith("loqt_B") else tensor for key, tensor in state.items()}
    save_file(rounded, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"Saved in another dtype than torch.bfloat16: .*loqt_B") as error:
        PeftModel.from_pretrained(load_llama(base_dir, "dense"), tmp_path)
    assert "checksum" not in str(error.value)


def test_number_of_updates_is_that_of_the_layers_that_are_ahead(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        load_llama(tmp_path / "base", "dense"), loqt_config(update_interval=4, update_mode="stagger")
    )
    train_steps(model, 5)
    assert [layer.num_updates("default") for _, layer in loqt_layers(model)] == [2] * 7 + [1] * 7
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["num_updates"] == 2
    loaded = PeftModel.from_pretrained(load_llama(tmp_path / "base", "dense"), tmp_path / "adapter")
    assert loaded.peft_config["default"].num_updates == 2


def test_adapter_of_format_1_is_still_read():
    """Written once by `python tests/fixtures/write.py`; a later version that cannot read it has broken somebody's model."""
    model = PeftModel.from_pretrained(small_llama(), FIXTURE)
    expected = load_file(FIXTURE / "effective_weights.safetensors")
    for name, layer in loqt_layers(model.base_model.model):
        assert torch.equal(layer.effective_weight("default"), expected[name])
    assert model.peft_config["default"].num_updates == 3


def test_layers_that_traded_places_are_refused(tmp_path):
    # seals and all; the base under them is not compared where it makes no difference
    model = get_peft_model(small_llama(), loqt_config(full_rank_modules="all"))
    train_steps(model, 2)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    traded = {"q_proj": "k_proj", "k_proj": "q_proj"}
    state = {re.sub("q_proj|k_proj", lambda match: traded[match[0]], key): value for key, value in state.items()}
    save_file(state, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not match their checksums: model\.layers\.0\.self_attn\.k_proj"):
        PeftModel.from_pretrained(small_llama(), tmp_path)


@pytest.fixture(scope="module")
def feedback_dir(base_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("feedback")
    model = get_peft_model(load_llama(base_dir, "dense"), loqt_config(error_feedback=True))
    train_steps(model, 2)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("load", ["peft", "transformers"])
def test_the_kept_error_travels_with_the_adapter(base_dir, feedback_dir, load):
    model = load_llama(base_dir, "dense")
    if load == "peft":
        model = PeftModel.from_pretrained(model, feedback_dir)
    else:
        model.load_adapter(str(feedback_dir))
    logits(model)
    saved = load_file(feedback_dir / "adapter_model.safetensors")
    layers = {name.removeprefix("base_model.model."): layer for name, layer in loqt_layers(model)}
    for name, layer in layers.items():
        (adapter_name,) = layer.loqt_error
        assert torch.equal(layer.loqt_error[adapter_name], saved[f"base_model.model.{name}.loqt_error"]), name
        assert layer.loqt_error[adapter_name].any()
    assert len(layers) == 7
    if load == "peft":
        model.add_adapter("other", loqt_config(error_feedback=True))
        model.delete_adapter("default")
        assert not any("default" in layer.loqt_error for layer in layers.values())


def test_a_state_from_before_the_first_switch_brings_no_error_back(base_dir):
    model = get_peft_model(load_llama(base_dir, "dense"), loqt_config(error_feedback=True))
    before = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    train_steps(model, 2)
    assert all(layer.loqt_error["default"].any() for _, layer in loqt_layers(model))
    set_peft_model_state_dict(model, before)
    assert not any(layer.loqt_error or layer.loqt_weight for _, layer in loqt_layers(model))


###############################
# Damage
###############################


@pytest.mark.parametrize(
    "damage, match",
    [
        ("missing", r"Missing in the adapter: model\.layers\.0\.mlp\.down_proj\.loqt_error"),
        ("bit", r"do not match their checksums: model\.layers\.0\.mlp\.down_proj\.loqt_weight"),
        ("other layer", r"do not match their checksums: model\.layers\.0\.mlp\.down_proj\.loqt_weight"),
        ("longer", r"do not match their checksums: model\.layers\.0\.mlp\.down_proj\.loqt_weight"),
        ("no weight", r"Superfluous: model\.layers\.0\.mlp\.down_proj\.loqt_error"),
    ],
)
def test_a_damaged_error_is_refused(base_dir, feedback_dir, tmp_path, damage, match):
    shutil.copytree(feedback_dir, tmp_path / "adapter")
    file, key = tmp_path / "adapter" / "adapter_model.safetensors", "base_model.model.model.layers.0.mlp.down_proj."
    state = load_file(file)
    error = state.pop(key + "loqt_error")
    if damage == "bit":
        error[100] ^= 1
    elif damage == "other layer":
        other = key.replace("down", "up") + "loqt_error"
        error, state[other] = state[other], error
    elif damage == "longer":
        error = torch.cat([error, error[:16]])
    elif damage == "no weight":
        del state[key + "loqt_weight"]
    if damage != "missing":
        state[key + "loqt_error"] = error.clone()
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(load_llama(base_dir, "dense"), tmp_path / "adapter")


def header_and_data(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def corrupt(folder, generator):
    """One random fault in an adapter directory; what was done."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    kind = generator.choice(["truncate", "flip", "swap", "missing", "extra", "zeros", "config", "config file"])
    if kind == "truncate":
        size = generator.choice([0, 7, 8, generator.randrange(weights.stat().st_size)])
        os.truncate(weights, size)
        return f"truncated to {size}"
    if kind == "flip":
        content = bytearray(weights.read_bytes())
        header = struct.unpack("<Q", content[:8])[0] + 8
        place = generator.choice([generator.randrange(header), generator.randrange(header, len(content))])
        content[place] ^= 1 << generator.randrange(8)
        weights.write_bytes(content)
        return f"flipped a bit of byte {place}, header of {header}"
    if kind == "config":
        fields = json.loads(config.read_text())
        field = generator.choice(sorted(set(fields) - {"peft_type", "auto_mapping", "peft_version"}))
        fields[field] = generator.choice(
            [None, 0, 1, 7, -1, 0.25, "q_proj", "nf4", "fp4", True, False, [], ["o_proj"], {}]
        )
        config.write_text(json.dumps(fields))
        return f"config {field}={fields[field]!r}"
    if kind == "config file":
        content = config.read_text()
        place = generator.randrange(len(content))
        config.write_text(generator.choice([content[:place], content[:place] + "#" + content[place + 1 :], ""]))
        return f"config file at {place}"
    state = load_file(weights)
    key, other = generator.sample(sorted(state), 2)
    if kind == "swap":
        other = generator.choice([k for k in state if k != key and state[k].shape == state[key].shape] or [other])
        state[key], state[other] = state[other].clone(), state[key].clone()
    elif kind == "missing":
        del state[key]
    elif kind == "zeros":
        state[key] = torch.zeros_like(state[key])
    else:
        state[generator.choice([key + "_2", "base_model.model." + key, "x"])] = state[key].clone()
    save_file(state, weights, {"format": "pt"})
    return f"{kind} {key} {other}"


@pytest.mark.parametrize("load", ["peft", "transformers"])
def test_a_corrupted_adapter_is_refused_or_loaded_exactly(base_dir, adapter_dir, tmp_path, load):
    expected = logits(PeftModel.from_pretrained(load_llama(base_dir, "dense"), adapter_dir))
    generator = random.Random(0)
    cases, refused = (200, 0) if load == "peft" else (100, 0)
    for case in range(cases):
        folder = tmp_path / str(case)
        shutil.copytree(adapter_dir, folder)
        what = corrupt(folder, generator)
        model = load_llama(base_dir, "dense")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if load == "peft":
                    model = PeftModel.from_pretrained(model, folder)
                else:
                    model.load_adapter(str(folder))
                actual = logits(model)
        except (ValueError, TypeError, KeyError, RuntimeError, OSError, SafetensorError) as error:
            assert str(error).strip(), what
            refused += 1
        else:
            assert torch.equal(actual, expected), f"silently wrong: {what}"
        shutil.rmtree(folder)
    print(f"{cases} corrupted adapters: {refused} refused, {cases - refused} loaded exactly")
    # the rest are faults without effect on the model, such as another update interval
    assert refused > cases // 2
