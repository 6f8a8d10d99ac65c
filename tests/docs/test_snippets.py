"""Every Python block of README and site runs, and every command line in them is one."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from common import ROOT, TESTS
from hub_server import HubServer
from pages import PAGES, commands, python_blocks

from loqt_peft.cli.main import build_parser


WITH_CODE = [page for page in PAGES if python_blocks(page)]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# what belongs to other programs, and is not taken apart here
FOREIGN = (
    "git",
    "cd",
    "export",
    "nox",
    "bash",
    "torchrun",
    "accelerate",
    "deepspeed",
    "CUDA_VISIBLE_DEVICES=",
    "vllm",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snippets")
    with HubServer() as hub:
        process = subprocess.run(
            [sys.executable, TESTS / "docs" / "snippet_worker.py"],
            env={
                **os.environ,
                **hub.environment(folder / "cache"),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(map(str, (ROOT, TESTS, TESTS / "docs"))),
            },
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert process.returncode == 0, process.stderr[-5000:]
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", WITH_CODE)
def test_python_runs(results, page):
    assert results[page] is None, results[page]


def test_the_first_snippets_are_whole_programs():
    for code in python_blocks("README.md"):
        compile(code, "README.md", "exec")
        assert "import" in code.splitlines()[0] or "import" in code


def parse(command):
    """Raise, or exit, where a command line is none."""
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]) and len(words) > 1:
        words = words[1:]
    program, rest = words[0], words[1:]
    if program == "loqt" or words[:3] == ["python", "-m", "loqt_peft"]:
        build_parser().parse_args(rest if program == "loqt" else rest[2:])
    elif program == "make":
        for word in rest:
            name, equals, _ = word.partition("=")
            assert f"$({name})" in MAKEFILE or name == "PYTHON" if equals else f"\n{word}:" in MAKEFILE, word
    elif program == "pip":
        extras = re.findall(r"'\.\[(.*)\]'", command)
        metadata = (ROOT / "setup.cfg").read_text(encoding="utf-8")
        assert all(f"\n{extra} =" in metadata for names in extras for extra in names.split(","))
    elif program == "python" and rest[0] == "-m":
        path = ROOT.joinpath(*rest[1].split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), rest[1]
    elif program == "python":
        assert list(ROOT.rglob(rest[0])) or rest[0].startswith("train"), rest[0]
    else:
        assert program.startswith(FOREIGN), command


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))])
def test_command_lines_are_known(page):
    for command in commands(page):
        try:
            parse(command)
        except SystemExit:
            pytest.fail(f"{page}: {command}")
