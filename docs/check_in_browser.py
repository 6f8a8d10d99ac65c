"""The built site in a real browser: `make docs-check`, where Chromium is installed.

Each page loads without an error in the console; the search finds ten terms; "What fits my GPU" shows what `estimate_memory`
says for twelve settings; `--shots DIR` leaves a picture of every page in both colour schemes and at the width of a phone.
"""

import argparse
import functools
import re
import subprocess
import sys
import tempfile
import threading
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

from loqt_peft.memory import estimate_memory


DOCS = Path(__file__).parent
HTML = DOCS / "_build" / "html"
sys.path.insert(0, str(DOCS / "_ext"))
import gpu_data


TERMS = {
    "per-layer": "memory",
    "DPO": "settings",
    "KeyError": "troubleshooting",
    "error_feedback": "settings",
    "GaLore": "moving-over",
    "resume": "saving",
    "change_to_error": "logs",
    "glossary": "how-it-works",
    "estimate_memory": "reference-api",
    "checkpointing": "memory",
}
# model, card, method, and what differs from the page's first choice
SETTINGS = [
    ("LLaMA 7B (paper)", 24, "loqt", {}),
    ("LLaMA 7B (paper)", 16, "loqt", {"per_layer": True, "gradient_checkpointing": True}),
    ("LLaMA 13B (paper)", 24, "loqt", {"sequence_length": 256, "rank": 8}),
    ("LLaMA 1B (paper)", 8, "loqt", {"optimizer": "adamw", "batch_size": 4}),
    ("Llama-3.1-8B", 48, "loqt", {"gradient_accumulation_steps": 4, "rank": 2}),
    ("Qwen2.5-7B", 40, "loqt", {"sequence_length": 4096, "rank": 16}),
    ("LLaMA 7B (paper)", 24, "qlora", {"rank": 16}),
    ("Mistral-7B", 24, "qlora", {"gradient_checkpointing": True, "batch_size": 2}),
    ("LLaMA 350M (paper)", 8, "galore", {"optimizer": "adamw"}),
    ("Llama-3.2-1B", 12, "galore", {"sequence_length": 2048}),
    ("LLaMA 130M (paper)", 8, "full", {"per_layer": True}),
    ("LLaMA 7B (paper)", 80, "full", {"gradient_checkpointing": True}),
]
FIRST = {
    "sequence_length": 1024,
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "rank": 4,
    "optimizer": "adamw_8bit",
    "gradient_checkpointing": False,
    "per_layer": False,
}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


class Browser:
    """Chromium without a window, a process a page."""

    def __init__(self, chromium: str, home: str, address: str) -> None:
        self.address = address
        self.command = [
            *(
                chromium,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--user-data-dir={home}",
            ),
            *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=4000"),
        ]

    def run(self, page: str, *options: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*self.command, *options, f"{self.address}/{page}"], capture_output=True, text=True, timeout=90
        )

    def dom(self, page: str) -> tuple[str, list[str]]:
        """The page after its scripts have run, and what they wrote to the console."""
        done = self.run(page, "--dump-dom")
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    def shot(self, page: str, path: Path, width: int, dark: bool) -> None:
        # Chromium's own names of the schemes
        scheme = "--blink-settings=preferredColorScheme=" + ("0" if dark else "1")
        self.run(page, f"--screenshot={path}", f"--window-size={width},1400", scheme)


def check_pages(browser: Browser, pages: list[str]) -> list[str]:
    wrong = []
    for page in pages:
        dom, console = browser.dom(page)
        wrong += [f"{page}: {line}" for line in console]
        if "<h1" not in dom and page != "search.html":
            wrong.append(f"{page}: no heading")
    return wrong


def check_search(browser: Browser) -> list[str]:
    wrong = []
    for term, page in TERMS.items():
        dom, _ = browser.dom(f"search.html?{urlencode({'q': term})}")
        results = dom.partition('id="search-results"')[2]
        if f"{page}.html" not in results:
            wrong.append(f"search {term!r}: {page} is not among the results")
    return wrong


def check_gpu_page(browser: Browser) -> list[str]:
    wrong = []
    for model, card, method, changes in SETTINGS:
        chosen = {**FIRST, **changes}
        asked = urlencode(
            {
                "model": model,
                "card": card,
                **{k: str(v).lower() if isinstance(v, bool) else v for k, v in chosen.items()},
            }
        )
        dom, _ = browser.dom(f"memory.html#{asked}")
        found = re.search(rf'<h3 data-method="{method}" data-required="([\d.]+)" data-phases="([\d. ]+)">([^<]*)', dom)
        path, _ = gpu_data.MODELS[model]
        config, _ = gpu_data.load_config(path)
        options = {name: chosen[name] for name in gpu_data.axes(method)}
        if "rank" in options:
            options["rank"] = config.hidden_size // options["rank"]
        if method in ("loqt", "qlora"):
            options["double_quant"] = True
        estimate = estimate_memory(path, method=method, budget=f"{card}GiB", **options)
        phases = [sum(estimate.phases.get(phase, {}).values()) / 1e9 for phase in gpu_data.PHASES]
        right = (
            found is not None
            and all(abs(float(a) - b) < 0.0051 for a, b in zip(found[2].split(), phases, strict=True))
            and 0 <= float(found[1]) - estimate.required / 1e9 < 0.01
            and ("does not fit" not in unescape(found[3])) == estimate.fits
        )
        if not right:
            wrong.append(f"{model}, {card} GiB, {method}, {changes}: {found and found.groups()}, predicted {phases}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("--shots", type=Path, help="a folder for pictures")
    options = parser.parse_args()
    pages = sorted(path.name for path in HTML.glob("*.html"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(HTML)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as home:
        browser = Browser(options.chromium, home, f"http://127.0.0.1:{server.server_port}")
        wrong = []
        for name, check in (
            (f"{len(pages)} pages", lambda: check_pages(browser, pages)),
            (f"{len(TERMS)} searches", lambda: check_search(browser)),
            (f"{len(SETTINGS)} settings", lambda: check_gpu_page(browser)),
        ):
            found = check()
            wrong += found
            print(f"{name}: {'all right' if not found else f'{len(found)} wrong'}", flush=True)
        if options.shots:
            options.shots.mkdir(parents=True, exist_ok=True)
            for page in pages:
                for name, width, dark in (("light", 1200, False), ("dark", 1200, True), ("phone", 400, False)):
                    browser.shot(page, options.shots / f"{Path(page).stem}-{name}.png", width, dark)
    server.shutdown()
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
