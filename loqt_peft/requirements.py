"""Whether the packages that are installed are new enough: some older ones load an adapter wrongly without an error."""

from __future__ import annotations

import configparser
import importlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


_PACKAGE = "loqt_peft"


def _requirements() -> Iterator[Requirement]:
    """What the package needs, extras left out; a source tree says it in `setup.cfg`, an installed package in its metadata."""
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")
    if setup.get("metadata", "name", fallback=None) == _PACKAGE:
        # first, since what an editable installation says may be older
        lines = setup["options"]["install_requires"].split("\n")
    else:
        try:
            lines = metadata.requires(_PACKAGE) or []
        except metadata.PackageNotFoundError:
            # copied without either
            lines = []
    for line in filter(str.strip, lines):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _installed(name: str) -> str | None:
    """The version of a package, `None` if there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        # built in place, as some machines have their torch
        try:
            return importlib.import_module(name).__version__
        except (ImportError, AttributeError):
            return None


def check_requirements() -> None:
    """Compare what is installed with what the package says that it needs.

    Raises:
        ImportError: If a package is missing or too old: which, its version, what is needed and how to get it.
    """
    wrong, wanted = [], []
    for requirement in _requirements():
        version = _installed(requirement.name)
        # a nightly of a version is taken for it
        if version is None or not requirement.specifier.contains(Version(version).base_version):
            found = "is not installed" if version is None else f"{version} is installed"
            wrong.append(f"{requirement.name}{requirement.specifier}, but {requirement.name} {found}")
            wanted.append(f"'{requirement.name}{requirement.specifier}'")
    if wrong:
        raise ImportError(f"loqt_peft needs {'; '.join(wrong)}. Run `pip install -U {' '.join(wanted)}`.")
