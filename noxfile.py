"""The test suite with every set of versions, and what is published: `nox`; one of them: `nox -s lowest`.

A part of the suite: `nox -s lowest -- -k schedule`. A run of the whole suite writes its row of the table in docs/versions.md.
"""

import datetime
import json
import os
import shutil
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nox


# Environments stay: each holds a torch of its own. `nox --reuse-venv=never` makes them anew.
nox.options.reuse_venv = "yes"
nox.options.stop_on_first_error = False

TABLE = Path("docs", "versions.md")
PACKAGES = ["torch", "transformers", "peft", "accelerate", "bitsandbytes"]
ASK_VERSIONS = (
    "import importlib.metadata as m, json, platform; "
    f"print(json.dumps([platform.python_version(), *map(m.version, {PACKAGES!r})]))"
)
# of the source distribution, with nothing but the wheel and pytest
OF_THE_PACKAGE = [
    "tests/test_quickstart.py",
    "tests/test_config.py",
    "tests/test_compat.py",
    "tests/test_packaging.py",
    "tests/algorithm/test_reference.py",
    "tests/algorithm/test_schedule.py",
    "tests/saving/test_adapter.py",
    "tests/cli/test_doctor.py",
]


def count(junit: Path) -> tuple[int, int, int]:
    """How many tests passed, failed (or broke outside of the test) and were skipped."""
    suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(key)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    return total - failures - errors - skipped, failures + errors, skipped


def record(session: nox.Session, counts: tuple[int, int, int]) -> None:
    """Put versions, counts and day into the session's row of the table."""
    versions = json.loads(session.run("python", "-c", ASK_VERSIONS, silent=True))
    row = " | ".join(map(str, [f"| `{session.name}`", *versions, *counts, datetime.date.today()])) + " |"
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    (place,) = (number for number, line in enumerate(lines) if line.startswith(f"| `{session.name}` |"))
    lines[place] = row
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_tests(session: nox.Session, *install: str) -> None:
    session.install(*install, "-e", ".[dev]")
    session.install("--no-deps", "-r", "versions/data.txt")
    junit = Path(session.create_tmp(), "junit.xml")
    environment = {
        # as the Makefile: no look-up that hangs where there is no way out, no threads that wait by spinning
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }
    # after an exit with 1, tests that failed, there is something to record
    command = ["python", "-m", "pytest", "-n", "2", f"--junitxml={junit}", *session.posargs]
    session.run(*command, env=environment, success_codes=[0, 1])
    counts = count(junit)
    if not session.posargs:
        record(session, counts)
    if counts[1]:
        session.error(f"{counts[1]} tests failed.")


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """The lower bounds of setup.cfg."""
    run_tests(session, "-c", "versions/lowest.txt")


@nox.session(name="gpu-machine", python="3.12")
def gpu_machine(session: nox.Session) -> None:
    """What a machine with a GPU brings along."""
    run_tests(session, "-c", "versions/gpu-machine.txt")


@nox.session(python="3.11")
def pinned(session: nox.Session) -> None:
    """The versions that `make` installs."""
    run_tests(session, "-c", "constraints.txt")


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """The newest releases of everything."""
    run_tests(session, "--upgrade", "--upgrade-strategy", "eager")


@nox.session(python="3.12")
def package(session: nox.Session) -> None:
    """Wheel and source distribution, checked, and used as users get them: an empty environment, another folder."""
    session.install("-c", "constraints.txt", "build", "twine")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build")
    wheel, sdist = (str(next(Path("dist").glob(pattern)).resolve()) for pattern in ("*.whl", "*.tar.gz"))
    session.run("twine", "check", "--strict", wheel, sdist)
    versions = str(Path("versions", "gpu-machine.txt").resolve())
    session.chdir(session.create_tmp())
    shutil.rmtree("empty", ignore_errors=True)
    session.run("python", "-m", "venv", "empty")
    session.run("empty/bin/pip", "install", "-c", versions, wheel, external=True)
    session.run("empty/bin/loqt", "--help", external=True)
    session.run("empty/bin/loqt", "doctor", external=True)
    session.run("empty/bin/pip", "install", "pytest", external=True)
    shutil.rmtree("sdist", ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall("sdist", filter="data")
    (root,) = Path("sdist").iterdir()
    pytest = str(Path("empty", "bin", "pytest").absolute())
    session.chdir(root)
    # without the folder itself, in which lies the package too: the tests are for that of the wheel
    session.run(pytest, "-o", "pythonpath=tests", *(session.posargs or OF_THE_PACKAGE), external=True)
