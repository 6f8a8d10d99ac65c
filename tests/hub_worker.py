"""Run by test_hub.py, in processes whose environment names the Hub on loopback: one pushes, another pulls."""

import json
import os
import sys
from itertools import product
from pathlib import Path

import torch
from common import TokenDataset, load_llama, loqt_config, make_trainer, tiny_llama, token_batch, train_steps
from huggingface_hub import ModelCard, snapshot_download
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed

from loqt_peft import LoQTTrainerCallback


results = {}


def load_base(base="dense", dtype=torch.float32):
    return load_llama("user/base", base, dtype)


def variants():
    """Name, base, number of switches and dtype of adapters that are pushed and pulled."""
    for base, switches, dtype in product(("dense", "4bit", "4bit-double"), (0, 1, 5), (torch.float32, torch.bfloat16)):
        yield f"{base}-{switches}-{str(dtype).removeprefix('torch.')}", base, switches, dtype


@torch.no_grad()
def record(name, model):
    model.eval()
    prompt = token_batch(99, batch=2)
    results[f"{name}.logits"] = model(input_ids=prompt).logits
    results[f"{name}.tokens"] = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)


class WaitForPush(TrainerCallback):
    """Training ends before a push does, and a checkpoint that comes during a push is not pushed."""

    def __init__(self):
        self.trainer = None
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def on_save(self, args, state, control, **kwargs):
        if self.trainer.args.push_to_hub:
            self.trainer.push_in_progress.wait_until_done()
            # what went wrong there, the Trainer never says
            for job in self.trainer.push_in_progress.jobs:
                job.result()


def make_hub_trainer(output_dir, **kwargs):
    set_seed(0)
    model = get_peft_model(load_base(), loqt_config(update_interval=2, full_rank_modules=["norm"]))
    wait = WaitForPush()
    wait.trainer = make_trainer(
        model,
        output_dir,
        [LoQTTrainerCallback(), wait],
        eval_dataset=TokenDataset(size=8, seed=5),
        max_steps=6,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        **kwargs,
    )
    return wait.trainer, wait


def push(directory):
    tiny_llama(hidden_size=64, intermediate_size=128).push_to_hub("user/base")

    model = get_peft_model(load_base(), loqt_config(full_rank_modules=["norm"]))
    train_steps(model, 2)
    first = model.push_to_hub("user/adapter", tags=["custom"])
    record("first", model)
    train_steps(model, 1, start=2)
    second = model.push_to_hub("user/adapter")
    record("second", model)
    train_steps(model, 1, start=3)
    model.push_to_hub("user/adapter", revision="experiment", commit_message="An experiment")
    model.push_to_hub("user/adapter-lfs")
    model.push_to_hub("user/adapter-private", private=True)
    record("third", model)

    for name, base, switches, dtype in variants():
        model = get_peft_model(load_base(base, dtype), loqt_config())
        train_steps(model, switches)
        model.push_to_hub(f"user/{name}")
        record(name, model)

    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(directory / "local_base")
    local = get_peft_model(AutoModelForCausalLM.from_pretrained(directory / "local_base"), loqt_config())
    local.push_to_hub("user/adapter-of-local-base")

    (directory / "commits.json").write_text(json.dumps({"first": first.oid, "second": second.oid}))


def train(directory):
    options = {"push_to_hub": True, "hub_strategy": "checkpoint", "hub_private_repo": True}
    trainer, _ = make_hub_trainer(directory / "trained", hub_model_id="user/trained", **options)
    trainer.train()
    trainer.push_to_hub()
    record("trained", trainer.model)

    # a repository's name defaults to the directory's
    local = AutoModelForCausalLM.from_pretrained(directory / "local_base")
    trainer = make_trainer(
        get_peft_model(local, loqt_config()),
        directory / "trained-on-local-base",
        [LoQTTrainerCallback()],
        push_to_hub=True,
        max_steps=1,
    )
    trainer.train()
    trainer.push_to_hub()

    # without a PeftModel
    model = load_base()
    model.add_adapter(loqt_config())
    trainer = make_trainer(
        model,
        directory / "added",
        [LoQTTrainerCallback()],
        push_to_hub=True,
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    trainer.push_to_hub()


def error_of(repo, **options):
    try:
        PeftModel.from_pretrained(load_base(), repo, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error} (from {type(error.__context__).__name__})"


def pull(directory):
    # before anything is in the cache
    token = os.environ.pop("HF_TOKEN")
    errors = {"no token": error_of("user/adapter-private")}
    os.environ["HF_TOKEN"] = token
    errors["no revision"] = error_of("user/adapter-private", revision="nowhere")
    (directory / "errors.json").write_text(json.dumps(errors))

    commits = json.loads((directory / "commits.json").read_text())
    pulled = [
        ("first", "user/adapter", {"revision": commits["first"]}),
        ("second", "user/adapter", {}),
        ("third", "user/adapter", {"revision": "experiment"}),
        ("third", "user/adapter-lfs", {}),
        ("third", "user/adapter-private", {}),
        ("trained", "user/trained", {}),
    ]
    for name, repo, options in pulled:
        key = f"{name}@{repo}"
        record(key, PeftModel.from_pretrained(load_base(), repo, **options))
        record(f"{key} auto", AutoPeftModelForCausalLM.from_pretrained(repo, **options))

    for name, base, _, dtype in variants():
        record(name, PeftModel.from_pretrained(load_base(base, dtype), f"user/{name}"))
        plain = load_base(base, dtype)
        plain.load_adapter(f"user/{name}")
        record(f"{name} transformers", plain)

    revision = (directory / "step_3").read_text()
    checkpoint = Path(snapshot_download("user/trained", revision=revision)) / "last-checkpoint"
    trainer, wait = make_hub_trainer(directory / "resumed")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    record("resumed", trainer.model)
    results["resumed.steps"] = torch.tensor(wait.steps)
    (directory / "card.md").write_text(ModelCard.load("user/trained").content)


if __name__ == "__main__":
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    for command in sys.argv[2:]:
        {"push": push, "train": train, "pull": pull}[command](directory)
    save_file({key: value.contiguous() for key, value in results.items()}, directory / f"{sys.argv[2]}.safetensors")
