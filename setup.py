"""Makes the README's links absolute for a package index, which shows the README alone. All else stands in setup.cfg."""

import re
import runpy
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).resolve().parent
# of Markdown, `](TARGET)`, and of the HTML in it, `href="TARGET"`
LINK = re.compile(r"""(?P<before>\]\(|\b(?:href|src|srcset)=["'])(?P<target>[^)"'\s]+)""")
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")


def absolute_links(readme: str, repository: str, revision: str) -> str:
    """`readme` with each relative link as an address in `repository` at `revision`; code blocks stay as they are."""

    def absolute(match: re.Match) -> str:
        target = match["target"]
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = target.partition("#")[0]
        if path.lower().endswith(PICTURES):
            kind = "raw"
        else:
            kind = "tree" if path and (ROOT / path).is_dir() else "blob"
        # a package index gives headings no anchors
        target = f"README.md{target}" if not path else target
        return f"{match['before']}{repository}/{kind}/{revision}/{target}"

    # every other part is a code block
    parts = re.split(r"(^```.*?^```$)", readme, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(absolute, part) for part in parts)


def long_description() -> str:
    """The README, its links pointing to the tag of this version."""
    metadata = ConfigParser()
    metadata.read(ROOT / "setup.cfg", encoding="utf-8")
    version = runpy.run_path(str(ROOT / "loqt_peft" / "_version.py"))["__version__"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return absolute_links(readme, metadata["metadata"]["url"], f"v{version}")


if __name__ == "__main__":
    setup(long_description=long_description())
