"""Push and pull by name, through a Hub on loopback: one process pushes, another one, with an empty cache, pulls."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from common import TESTS
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file


def run_worker(hub, directory, *commands):
    process = subprocess.run(
        [sys.executable, TESTS / "hub_worker.py", directory, *commands],
        env={**os.environ, **hub.environment(directory / f"cache_{commands[0]}"), "OMP_NUM_THREADS": "1"},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return load_file(directory / f"{commands[0]}.safetensors")


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hub")

    def is_lfs(repo_id, path):
        return repo_id == "user/adapter-lfs" and path.endswith(".safetensors")

    with HubServer(is_lfs) as hub:
        pushed = run_worker(hub, directory, "push", "train")
        pushes = len(hub.log)
        (directory / "step_3").write_text(commit_of(hub, "Training in progress, step 3, checkpoint").oid)
        pulled = run_worker(hub, directory, "pull")
        yield SimpleNamespace(
            hub=hub,
            directory=directory,
            pushed=pushed,
            pulled=pulled,
            pushes=hub.log[:pushes],
            commits=json.loads((directory / "commits.json").read_text()),
            errors=json.loads((directory / "errors.json").read_text()),
        )


def commit_of(hub, message, repo_id="user/trained"):
    commits = [commit for commit in hub.repos[repo_id].commits if commit.message == message]
    assert len(commits) == 1, [commit.message for commit in hub.repos[repo_id].commits]
    return commits[0]


@pytest.mark.parametrize("loader", ["", " auto"])
@pytest.mark.parametrize(
    "name, repo_id",
    [
        pytest.param("first", "user/adapter", id="at an older commit"),
        pytest.param("second", "user/adapter", id="at the last commit"),
        pytest.param("third", "user/adapter", id="of a branch"),
        pytest.param("third", "user/adapter-lfs", id="uploaded by LFS"),
        pytest.param("third", "user/adapter-private", id="private"),
        pytest.param("trained", "user/trained", id="of the Trainer"),
    ],
)
def test_pulled_model_says_the_same(session, name, repo_id, loader):
    for what in ("tokens", "logits"):
        assert torch.equal(session.pulled[f"{name}@{repo_id}{loader}.{what}"], session.pushed[f"{name}.{what}"])


def test_revisions_differ(session):
    names = ("first", "second", "third", "trained")
    assert not any(
        torch.equal(session.pushed[f"{a}.logits"], session.pushed[f"{b}.logits"])
        for a in names
        for b in names
        if a < b
    )
    branches = session.hub.repos["user/adapter"].branches
    assert branches["main"] == session.commits["second"] and branches["experiment"] not in session.commits.values()


def test_both_uploads_were_used(session):
    uploads = [path for method, path, _ in session.pushes if method == "PUT"]
    lfs = session.hub.repos["user/adapter-lfs"].at("main").files["adapter_model.safetensors"]
    regular = session.hub.repos["user/adapter"].at("experiment").files["adapter_model.safetensors"]
    assert len(uploads) == 1 and list(session.hub.lfs_objects.values()) == [lfs] and lfs == regular


def test_private_repository_needs_the_token(session):
    assert session.hub.repos["user/adapter-private"].private and session.hub.repos["user/trained"].private
    assert not session.hub.repos["user/adapter"].private
    refused = "ValueError: Can't find 'adapter_config.json' at 'user/adapter-private'"
    assert session.errors == {
        "no token": f"{refused} (from RepositoryNotFoundError)",
        "no revision": f"{refused} (from RevisionNotFoundError)",
    }


def test_pushed_card_is_of_the_adapter(session):
    card = ModelCard(session.hub.file("user/adapter", "README.md", session.commits["first"]))
    assert card.data.library_name == "peft" and card.data.base_model == "user/base"
    assert {"loqt", "4-bit", "arxiv:2405.16528", "base_model:adapter:user/base", "custom"} <= set(card.data.tags)
    assert "so far: 2\n" in card.text and "import loqt_peft" in card.text
    # the second push started from this one
    later = ModelCard(session.hub.file("user/adapter", "README.md"))
    assert later.text == card.text.replace("so far: 2\n", "so far: 3\n").replace(
        "| `num_updates` | `2` |", "| `num_updates` | `3` |"
    )
    assert later.data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize("repo_id", ["user/adapter-of-local-base", "user/trained-on-local-base"])
def test_card_of_a_local_base_is_accepted_and_names_no_path(session, repo_id):
    card = ModelCard(session.hub.file(repo_id, "README.md"))
    assert "## LoQT\n" in card.text and "local_base" not in card.content.replace("trained-on-local-base", "")
    assert card.data.library_name == "peft" and card.data.base_model is None


def test_push_in_the_middle_of_training_is_whole(session):
    for step, updates in ((3, 2), (6, 3)):
        for message in (f"Training in progress, step {step}", f"Training in progress, step {step}, checkpoint"):
            files = commit_of(session.hub, message).files
            assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(files)
            assert json.loads(files["adapter_config.json"])["num_updates"] == updates
            card = ModelCard(files["README.md"].decode())
            assert card.text.count("## LoQT\n") == 1 and f"so far: {updates}\n" in card.text
            assert card.data.library_name == "peft" and "loqt" in card.data.tags
        # of the second commit
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert files[f"last-checkpoint/{name}"] == files[name]
        assert json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == step
        assert "last-checkpoint/optimizer.pt" in files
        assert "## LoQT\n" in files["last-checkpoint/README.md"].decode()


@pytest.mark.parametrize("loader", ["", " transformers"])
def test_every_kind_of_adapter_is_the_same_after_a_pull(session, loader):
    names = [
        key.removesuffix(".logits") for key in session.pushed if re.match(r"(dense|4bit|4bit-double)-.*logits", key)
    ]
    assert len(names) == 18
    for name in names:
        for what in ("logits", "tokens"):
            assert torch.equal(session.pulled[f"{name}{loader}.{what}"], session.pushed[f"{name}.{what}"]), name


def test_resume_from_a_pulled_checkpoint_is_bit_identical(session):
    assert session.pulled["resumed.steps"] == 3
    assert torch.equal(session.pulled["resumed.logits"], session.pushed["trained.logits"])
    assert torch.equal(session.pulled["resumed.tokens"], session.pushed["trained.tokens"])


def test_final_card_has_both_the_training_results_and_the_section(session):
    card = ModelCard(commit_of(session.hub, "End of training").files["README.md"].decode())
    assert card.text.count("## LoQT\n") == 1 and "so far: 3\n" in card.text
    assert card.text.index("# trained\n") < card.text.index("## LoQT\n") < card.text.index("### Training results")
    rows = card.text.split("### Training results")[1].split("###")[0].splitlines()
    assert any(" Validation Loss " in row for row in rows) and len([row for row in rows if row.startswith("|")]) == 4
    assert {"loqt", "4-bit", "generated_from_trainer", "base_model:adapter:user/base"} <= set(card.data.tags)
    assert card.data.library_name == "peft" and card.data.base_model == "user/base"
    # read by name
    assert ModelCard((session.directory / "card.md").read_text()).content == card.content


def test_adapter_added_by_transformers_is_pushed(session):
    files = commit_of(session.hub, "End of training", "user/added").files
    assert json.loads(files["adapter_config.json"])["peft_type"] == "LOQT"
    assert "adapter_model.safetensors" in files and "README.md" in files


def test_hub_understood_every_request(session):
    assert not [entry for entry in session.hub.log if entry[2] >= 500]
