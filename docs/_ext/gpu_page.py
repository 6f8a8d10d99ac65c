"""The page "What fits my GPU": a form, a script that looks the answer up, and the numbers of gpu_data.py, all in one page."""

import hashlib
import json
from pathlib import Path

import gpu_data
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import loqt_peft.memory


def cached_data(folder: Path) -> str:
    """The numbers as JSON; made again, in half a minute, only if what makes them has changed."""
    sources = [Path(gpu_data.__file__), *Path(loqt_peft.memory.__path__[0]).glob("*.py")]
    sources += [path for path, _ in gpu_data.MODELS.values()]
    name = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()[:16]
    path = folder / f"gpu-{name}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(gpu_data.build_data(), separators=(",", ":")), encoding="utf-8")
    return path.read_text(encoding="utf-8").replace("<", "\\u003c")


class GpuPage(SphinxDirective):
    """The calculator, with its data in the page."""

    def run(self) -> list[nodes.Node]:
        static = Path(__file__).with_name("gpu_page_files")
        data = cached_data(Path(self.env.app.outdir).parent)
        html = (static / "page.html").read_text(encoding="utf-8")
        parts = {
            "/*STYLE*/": (static / "page.css").read_text(encoding="utf-8"),
            "/*DATA*/": data,
            "/*SCRIPT*/": (static / "page.js").read_text(encoding="utf-8"),
        }
        for place, text in parts.items():
            html = html.replace(place, text)
        for file in static.iterdir():
            self.env.note_dependency(str(file))
        return [nodes.raw("", html, format="html")]


def setup(app):
    app.add_directive("gpu-page", GpuPage)
    return {"parallel_read_safe": True}
