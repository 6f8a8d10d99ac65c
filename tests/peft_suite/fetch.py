"""Fetches PEFT's own test files, which only its source distribution holds, into a git-ignored cache.

Run as a script, or called on demand when the suite is imported.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from filelock import FileLock


CACHE = Path(__file__).resolve().parents[2] / ".cache" / "peft-sdist"


def _download(version, folder):
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "peft"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), f"peft=={version}"]
    # pip wants to read the metadata of a source distribution and so runs its build backend. Without isolation nothing
    # else is downloaded, but setuptools must be installed here; with isolation pip fetches setuptools for itself.
    attempts = [[*command, "--no-build-isolation"], command]
    errors = []
    for attempt in attempts:
        result = subprocess.run(attempt, capture_output=True, text=True)
        archives = list(folder.glob("peft-*.tar.gz"))
        if result.returncode == 0 and archives:
            return archives[0]
        errors.append(f"$ {' '.join(attempt)}\n{result.stdout}{result.stderr}")
    raise RuntimeError(
        f"The source distribution of peft {version}, which holds PEFT's own tests, could not be downloaded with pip. "
        "Check the network or pip's index settings and run this again.\n" + "\n".join(errors)
    )


def fetch():
    """Returns the folder of PEFT's tests that belong to the installed version, downloading them the first time."""
    version = importlib.metadata.version("peft")
    target = CACHE / version
    tests = target / "tests"
    if tests.is_dir():
        return tests

    CACHE.mkdir(parents=True, exist_ok=True)
    # Workers of pytest-xdist come here at the same moment: one downloads, the others wait for it.
    with FileLock(CACHE / "lock"):
        if tests.is_dir():
            return tests
        (CACHE.parent / ".gitignore").write_text("*\n", encoding="utf-8")
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            archive = _download(version, Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            with tarfile.open(archive) as tar:
                if hasattr(tarfile, "data_filter"):
                    tar.extractall(unpacked, filter="data")
                else:
                    tar.extractall(unpacked)
            (source,) = unpacked.iterdir()
            if not (source / "tests" / "test_custom_models.py").is_file():
                raise RuntimeError(f"The source distribution of peft {version} holds no tests/test_custom_models.py.")
            shutil.rmtree(target, ignore_errors=True)
            # The rename comes last: the folder exists under its final name only when it is complete.
            os.replace(source, target)
    return tests


if __name__ == "__main__":
    print(fetch())
