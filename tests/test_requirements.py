"""Packages that are too old are refused when loqt_peft is imported, before they can load anything wrongly."""

import configparser
import subprocess
import sys
from importlib import metadata

import pytest
from common import ROOT

from loqt_peft import requirements


# replaces the version that metadata reports of one package, as if that one were installed
IMPORT = """
import sys
from importlib import metadata
name, faked = sys.argv[1:]
real = metadata.version
metadata.version = lambda package: faked if package == name else real(package)
try:
    import loqt_peft
except ImportError as error:
    assert "torch" not in sys.modules and "peft" not in sys.modules
    print(error)
"""


def test_importing_with_an_old_peft_says_which_one_is_needed():
    result = subprocess.run(
        [sys.executable, "-c", IMPORT, "peft", "0.20.0"], capture_output=True, text=True, timeout=120
    )
    assert result.stdout == (
        "loqt_peft needs peft>=0.21, but peft 0.20.0 is installed. Run `pip install -U 'peft>=0.21'`.\n"
    )


def minimums():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return [line.split(">=") for line in setup["options"]["install_requires"].split()]


def with_versions(monkeypatch, **versions):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or real(name))


@pytest.mark.parametrize("name, minimum", minimums())
def test_every_minimum_is_checked(monkeypatch, name, minimum):
    major = minimum.partition(".")[0]
    # a nightly and a build of its own are the version that they are of
    for version in (minimum, f"{minimum}.0+cu130", f"{minimum}.0a0+git1234", f"{int(major) + 1}.0"):
        with_versions(monkeypatch, **{name: version})
        requirements.check_requirements()
    with_versions(monkeypatch, **{name: "0.0.1"})
    with pytest.raises(ImportError, match=rf"needs {name}>={minimum}, but {name} 0.0.1 is installed"):
        requirements.check_requirements()


def test_all_that_is_wrong_is_said_at_once(monkeypatch):
    with_versions(monkeypatch, peft="0.20.0", bitsandbytes="0.49.2")
    with pytest.raises(
        ImportError, match=r"peft 0.20.0 .*bitsandbytes 0.49.2 .*pip install -U 'peft>=.*' 'bitsandbytes>="
    ):
        requirements.check_requirements()


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(requirements, "_installed", lambda name: None if name == "accelerate" else "99.0")
    with pytest.raises(ImportError, match="needs accelerate>=.*, but accelerate is not installed"):
        requirements.check_requirements()


def test_a_package_without_metadata_says_its_version_itself(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    requirements.check_requirements()


def test_an_installed_package_knows_its_minimums_from_its_metadata(monkeypatch, tmp_path):
    here = sorted(map(str, requirements._requirements()))
    # beside an installed package lies no setup.cfg, or one of something else
    monkeypatch.setattr(requirements, "__file__", str(tmp_path / "loqt_peft" / "requirements.py"))
    lines = [*here, 'matplotlib>=99; extra == "benchmarks"']
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    for content in (None, "[metadata]\nname = other\n"):
        if content is not None:
            (tmp_path / "setup.cfg").write_text(content)
        assert sorted(map(str, requirements._requirements())) == here

    def requires(name):
        raise metadata.PackageNotFoundError(name)

    # copied by hand: nothing to compare with
    monkeypatch.setattr(metadata, "requires", requires)
    assert list(requirements._requirements()) == []
