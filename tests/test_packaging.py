"""What the package says of itself: one truth in several files, and links that lead somewhere."""

import configparser
import importlib.util
import re

import pytest
from common import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


ROOT = ROOT


@pytest.fixture(scope="module")
def metadata():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("setup_of_loqt_peft", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def requirements(lines):
    lines = (line.strip() for line in lines)
    return {r.name: r.specifier for line in lines if line and not line.startswith("#") for r in [Requirement(line)]}


def test_lowest_session_installs_the_lower_bounds(metadata):
    bounds = requirements(metadata["options"]["install_requires"].splitlines())
    lowest = requirements((ROOT / "versions" / "lowest.txt").read_text(encoding="utf-8").splitlines())
    assert bounds.keys() == lowest.keys()
    for name, specifier in lowest.items():
        ((pinned,), (bound,)) = specifier, bounds[name]
        # 2.6 is 2.6.0
        assert pinned.operator == "==" and SpecifierSet(f"=={bound.version}").contains(pinned.version), name


def test_pythons_are_the_same_everywhere(metadata):
    lowest = metadata["options"]["python_requires"].removeprefix(">=")
    pythons = re.findall(r"Python :: (3\.\d+)", metadata["metadata"]["classifiers"])
    sessions = re.findall(r'python="(3\.\d+)"', (ROOT / "noxfile.py").read_text(encoding="utf-8"))
    assert pythons[0] == lowest and set(sessions) == set(pythons)
    target = f'target-version = "py{lowest.replace(".", "")}"'
    assert target in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r'session: .*, python: "(3\.\d+)"', workflow)) == sorted(pythons)


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "docs", "benchmarks", "examples"])
def test_relative_links_lead_to_files(file, setup):
    path = ROOT / file
    for page in [path] if path.is_file() else path.rglob("*.md"):
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for link in setup.LINK.finditer(text):
            target = link["target"].partition("#")[0]
            if target and not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_readme_of_a_package_index_has_absolute_links_only(setup):
    text = setup.long_description()
    targets = [link["target"] for link in setup.LINK.finditer(re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))]
    assert len(targets) > 5 and all(target.startswith("https://") for target in targets)


def test_absolute_links(setup):
    text = """[a](docs/x.md#part) [b](#memory) [c](docs) ![d](docs/e.png) [f](https://g.h)
<img src="docs/e.svg">
```py
x[0](y)
```
"""
    base = "https://example.org/repository"
    assert (
        setup.absolute_links(text, base, "v1")
        == f"""\
[a]({base}/blob/v1/docs/x.md#part) [b]({base}/blob/v1/README.md#memory) [c]({base}/tree/v1/docs) \
![d]({base}/raw/v1/docs/e.png) [f](https://g.h)
<img src="{base}/raw/v1/docs/e.svg">
```py
x[0](y)
```
"""
    )
