"""README and the pages of the site, and the code in them."""

import re

from common import ROOT


PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
FENCE = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, *languages):
    """The code of a page in any of these languages, in order."""
    text = PAGES[page].read_text(encoding="utf-8")
    return [match["code"] for match in FENCE.finditer(text) if match["language"] in languages]


def python_blocks(page):
    """What a reader would run: Python as it stands, and of a diff what stands after it."""
    text = PAGES[page].read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        if match["language"] in ("python", "py"):
            found.append(match["code"])
        elif match["language"] == "diff":
            lines = [line for line in match["code"].splitlines() if not line.startswith("-")]
            found.append("\n".join(line[1:] for line in lines))
    return found


def commands(page):
    """Every command line in a page's shell blocks, and in indented blocks those of `make` and of modules."""
    text = PAGES[page].read_text(encoding="utf-8")
    lines = "\n".join(blocks(page, "bash", "sh")).replace("\\\n", " ").splitlines()
    indented = re.findall(
        r"^    ((?:make|loqt|python -m) .*)$", FENCE.sub("", text).replace("\\\n", " "), re.MULTILINE
    )
    for line in [*lines, *indented]:
        for command in re.sub(r"(^|\s)#.*", "", line).split("&&"):
            if command.strip():
                yield " ".join(command.split())
