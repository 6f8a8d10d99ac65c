"""What the demo, the estimate and the doctor print, as pictures: `make docs-screenshots`, a minute on two CPU cores."""

import os
import re
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path


ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
CONFIG = "examples/pretraining/configs/llama_7b.json"
WIDTH, CHARACTER, LINE, MARGIN = 124, 7.83, 18, 14
COMMAND = ' class="command"'
# of libraries, about this machine
NOISE = ("torchao", "Warning", "warnings.warn", "Failed to load", "it/s]", "pytree")


def output(*command: str, cwd: Path = ROOT) -> list[str]:
    """What a command prints, libraries' remarks left out."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    if done.returncode > 1:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}")
    return [line for line in done.stdout.splitlines() if not any(word in line for word in NOISE)]


def wrapped(lines: list[str]) -> list[str]:
    return [line[i : i + WIDTH] for line in lines for i in range(0, max(len(line), 1), WIDTH)]


def picture(name: str, command: str, lines: list[str]) -> None:
    """A terminal that shows a command and what it printed; dark on every page."""
    lines = wrapped([f"$ {command}", *lines])
    width, height = 2 * MARGIN + WIDTH * CHARACTER, 2 * MARGIN + LINE * len(lines)
    rows = "\n".join(
        f'<text x="{MARGIN}" y="{MARGIN + LINE * (i + 0.75):g}"{COMMAND if not i else ""}>{escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    style = "text{font:13px monospace;fill:#e6e6e6;white-space:pre}.command{fill:#56b4e9;font-weight:bold}"
    (FIGURES / f"terminal-{name}.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}">'
        f'<style>{style}</style><rect width="100%" height="100%" rx="8" fill="#1b1d1f"/>\n{rows}\n</svg>\n',
        encoding="utf-8",
    )


def main() -> None:
    loqt = ("-m", "loqt_peft")
    arguments = f"estimate {CONFIG} --rank 1024 --optimizer adamw_8bit --double-quant --gpu 24GiB"
    picture("estimate", f"loqt {arguments}", output(*loqt, *arguments.split()))
    arguments = f"estimate {CONFIG} --gpu 16GiB --plan"
    picture("plan", f"loqt {arguments}", output(*loqt, *arguments.split()))
    with tempfile.TemporaryDirectory() as folder:
        lines = output(str(ROOT / "examples" / "pretraining" / "demo.py"), "--fast", cwd=Path(folder))
        end = next(i for i, line in enumerate(lines) if line.startswith("| | validation perplexity"))
        shown = [lines[0], "...", "", *lines[end:]]
        picture("demo", 'make demo DEMO_ARGS="--fast"', shown)
        lines = output(*loqt, "doctor", "demo_output/LoQT", cwd=Path(folder))
    picture(
        "doctor", "loqt doctor demo_output/LoQT", [re.sub(r"/tmp/\S+?/demo_output", "demo_output", x) for x in lines]
    )


if __name__ == "__main__":
    main()
