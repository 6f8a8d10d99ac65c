"""The pictures of README and site, each for light and for dark pages: `make docs-figures`.

Memory comes from `estimate_memory`, curves from benchmarks/results/compare/runs.jsonl; nothing is trained.
"""

import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from loqt_peft import estimate_memory
from loqt_peft.plots import BLUE, GREEN, GREY, ORANGE, colour, name_lines, save, style


DOCS = Path(__file__).parent
ROOT = DOCS.parent
FIGURES = DOCS / "figures"
SEVEN_B = ROOT / "examples" / "pretraining" / "configs" / "llama_7b.json"
RUNS = ROOT / "benchmarks" / "results" / "compare" / "runs.jsonl"
# of the table "By model" in memory.md
MEMORY = {
    "full rank": {"method": "full"},
    "GaLore": {"method": "galore", "rank": 1024, "optimizer": "adamw_8bit"},
    # its usual rank
    "QLoRA": {"method": "qlora", "rank": 64, "optimizer": "adamw_8bit", "double_quant": True},
    "LoQT": {"method": "loqt", "rank": 1024, "optimizer": "adamw_8bit", "double_quant": True, "per_layer": True},
}
# rows of the table "Perplexity" in comparison.md: the best full rank, and the better recipe
IMDB = "8fa80451e4f03f43"
CURVES = {
    "full rank": {"method": "full", "lr": 0.003, "factor": 10.0, "optim": "adamw_torch"},
    "LoQT": {"method": "loqt", "lr": 0.02, "optim": "adamw_bnb_8bit", "r": 104, "optimizer_state": "rotate"},
}


def curve(**wanted) -> list[tuple[int, float]]:
    """Steps and validation losses, the mean over the seeds of the runs whose spec holds what is wanted."""
    curves = []
    for line in RUNS.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        spec = {**run["spec"]["fields"], **(run["spec"]["candidate"] or {}), **run["spec"]}
        if all(spec.get(name) == value for name, value in wanted.items()):
            curves.append(dict(run["curve"]))
    steps = sorted(set.intersection(*map(set, curves)))
    return [(step, sum(c[step] for c in curves) / len(curves)) for step in steps]


def overview(dark: bool) -> plt.Figure:
    """Memory by method at 7B, and two loss curves."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), width_ratios=(1, 1.15))
    sizes = {name: estimate_memory(SEVEN_B, **options).peak / 1e9 for name, options in MEMORY.items()}
    ranks = (f"{name}, r {o['rank']}" if "rank" in o else name for name, o in MEMORY.items())
    left.barh(list(ranks), list(sizes.values()), color=[colour(name, dark) for name in sizes], height=0.65)
    for y, size in enumerate(sizes.values()):
        left.annotate(f"{size:.0f} GB", (size, y), xytext=(4, 0), textcoords="offset points", va="center")
    left.axvline(24 * 1024**3 / 1e9, color=GREY[dark], linestyle="--", linewidth=1)
    left.annotate("24 GiB card", (24 * 1024**3 / 1e9, 2.5), xytext=(4, 0), textcoords="offset points", va="center")
    left.set_xlim(0, max(sizes.values()) * 1.15)
    left.set_ylim(3.5, -0.5)
    left.grid(axis="y", visible=False)
    left.set_title("LLaMA-7B, peak memory (predicted)")
    left.set_xlabel("GB (10⁹ bytes), 256 tokens, update step included")

    for name, wanted in CURVES.items():
        points = curve(size="1m", steps=1000, text=IMDB, **wanted)
        points = [(step, loss) for step, loss in points if step >= 200]
        right.plot(
            *zip(*points, strict=True), color=colour(name, dark), label=f"{name}, {points[-1][1]:.2f}", linewidth=2
        )
    right.set_title("validation loss, 1M parameters (measured)")
    right.set_xlabel("optimizer step, 1,024 tokens each, mean of 3 seeds")
    right.set_ylabel("nats a token")
    name_lines(right)
    return figure


class Drawing:
    """Boxes and arrows in a unit of the page."""

    def __init__(self, dark: bool, width: float, height: float) -> None:
        self.dark, self.ink = dark, "#e6e6e6" if dark else "#1f1f1f"
        self.figure, self.axes = plt.subplots(figsize=(width, height))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")

    def box(self, x, y, width, height, text, shade=GREY, filled=False):
        self.axes.add_patch(
            FancyBboxPatch(
                (x, y),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=0.08",
                linewidth=1.8,
                edgecolor=shade[self.dark],
                facecolor=(shade[self.dark] + "33") if filled else "none",
            )
        )
        self.text(x + width / 2, y + height / 2, text)

    def text(self, x, y, text, shade=None, **options):
        shade = self.ink if shade is None else shade[self.dark]
        self.axes.text(x, y, text, **{"ha": "center", "va": "center", "color": shade, **options})

    def arrow(self, start, end, shade=None, **options):
        shade = self.ink if shade is None else shade[self.dark]
        self.axes.add_patch(
            FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=shade, linewidth=1.5, **options)
        )


def step(dark: bool) -> plt.Figure:
    """An ordinary step of a layer."""
    d = Drawing(dark, 9, 3.4)
    d.box(0.2, 1.2, 0.9, 0.7, "input\nx")
    d.box(2.6, 2.3, 2.6, 0.8, "W: 4 bits, frozen", BLUE, True)
    d.box(2.0, 0.3, 1.9, 0.9, "B: small,\ntrained", ORANGE, True)
    d.box(4.5, 0.3, 1.7, 0.9, "P: 4 bits,\nfrozen", BLUE, True)
    d.box(6.9, 1.2, 0.5, 0.7, "+")
    d.box(8.0, 1.2, 0.9, 0.7, "output\ny")
    d.arrow((1.1, 1.7), (2.6, 2.7), connectionstyle="arc3,rad=-0.15")
    d.arrow((1.1, 1.4), (2.0, 0.75), connectionstyle="arc3,rad=0.15")
    d.arrow((3.9, 0.75), (4.5, 0.75))
    d.arrow((5.2, 2.7), (7.15, 1.9), connectionstyle="arc3,rad=-0.25")
    d.arrow((6.2, 0.75), (7.15, 1.2), connectionstyle="arc3,rad=0.25")
    d.text(6.85, 0.72, "times s", fontsize=9, ha="left")
    d.arrow((7.4, 1.55), (8.0, 1.55))
    d.text(2.95, 0.1, "the only gradient and optimizer state", ORANGE, fontsize=9)
    return d.figure


def update(dark: bool) -> plt.Figure:
    """An update of a layer."""
    d = Drawing(dark, 10, 3.9)
    d.box(0.2, 2.7, 2.2, 0.9, "gradient of the\nwhole W, one layer", GREEN, True)
    d.box(3.2, 2.7, 2.2, 0.9, "leading singular\nvectors", GREEN, True)
    d.box(6.2, 2.7, 1.8, 0.9, "new P, 4 bits", BLUE, True)
    d.box(0.2, 0.9, 2.2, 0.9, "W + s · P · B\nof the old P", ORANGE, True)
    d.box(3.2, 0.9, 2.2, 0.9, "quantize,\nK times in turn", BLUE, True)
    d.box(6.2, 1.35, 1.8, 0.75, "new W, 4 bits", BLUE, True)
    d.box(6.2, 0.4, 1.8, 0.75, "new B", ORANGE, True)
    d.arrow((2.4, 3.15), (3.2, 3.15))
    d.arrow((5.4, 3.15), (6.2, 3.15))
    d.arrow((2.4, 1.35), (3.2, 1.35))
    d.arrow((5.4, 1.5), (6.2, 1.72))
    d.arrow((5.4, 1.2), (6.2, 0.77))
    d.arrow((6.6, 2.7), (4.9, 1.8), connectionstyle="arc3,rad=0.15")
    d.text(1.3, 2.45, "freed at once", GREEN, fontsize=9)
    d.text(1.3, 0.65, "what was learned is merged", ORANGE, fontsize=9)
    d.text(8.15, 0.77, "holds what rounding\nlost, as far as the\nnew P reaches", fontsize=9, ha="left")
    d.text(8.15, 3.15, "directions of the\nnext steps", fontsize=9, ha="left")
    return d.figure


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    for draw in (overview, step, update):
        for dark in (False, True):
            with style(dark):
                save(draw(dark), FIGURES / f"{draw.__name__}-{'dark' if dark else 'light'}.svg")


if __name__ == "__main__":
    main()
