"""Links of a page that lead out of docs/ become addresses in the repository: they work on a code host and on the site."""

import configparser
import importlib.util
import os
import re
from pathlib import Path


ROOT = Path(__file__).parents[2]


def _setup_py():
    spec = importlib.util.spec_from_file_location("setup_of_loqt_peft", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outward_links(text: str, page: Path, revision: str = "main") -> str:
    """`text` of `page` with each relative link that leaves docs/ as an address in the repository."""
    setup = _setup_py()
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg", encoding="utf-8")
    repository = metadata["metadata"]["url"]

    def outward(match: re.Match) -> str:
        target = match["target"]
        path, mark, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return match[0]
        place = os.path.relpath(os.path.normpath(page.parent / path), ROOT)
        if place.split(os.sep)[0] == "docs":
            return match[0]
        kind = "tree" if (ROOT / place).is_dir() else "blob"
        return f"{match['before']}{repository}/{kind}/{revision}/{place}{mark}{anchor}"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else setup.LINK.sub(outward, part) for part in parts)


def _on_source_read(app, docname, source):
    source[0] = outward_links(source[0], Path(app.env.doc2path(docname)))


def setup(app):
    app.connect("source-read", _on_source_read)
    return {"parallel_read_safe": True}
