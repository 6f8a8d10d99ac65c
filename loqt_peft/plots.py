"""One look for all pictures: `loqt estimate --plot`, documentation, examples, notebooks, benchmarks. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .memory import MemoryEstimate

# Okabe and Ito's, which people who see few colours can tell apart: (on white, on black)
BLUE, ORANGE, GREEN, PURPLE, GREY = (
    ("#0072b2", "#56b4e9"),
    ("#c45100", "#f0a04b"),
    ("#007a58", "#2fd0a2"),
    ("#a8578a", "#e39ac6"),
    ("#6b6b6b", "#b0b0b0"),
)
# a method has one colour everywhere
METHOD_COLOURS = {
    "LoQT": BLUE,
    "full rank": GREY,
    "LoRA": PURPLE,
    "QLoRA": GREEN,
    "GaLore": ORANGE,
}
CATEGORY_COLOURS = {
    "weights": BLUE,
    "gradients": ORANGE,
    "optimizer state": GREEN,
    "activations": PURPLE,
}


def colour(name: str, dark: bool = False) -> str:
    """Of a method or a category of memory; grey for those that have none."""
    return {**METHOD_COLOURS, **CATEGORY_COLOURS}.get(name, GREY)[dark]


def settings(dark: bool = False) -> dict[str, Any]:
    """matplotlib's settings of this look, for `plt.rcParams.update`; the background is transparent.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    try:
        from matplotlib import cycler
    except ImportError:
        raise ValueError("A picture needs matplotlib: pip install matplotlib.") from None
    ink, faint = ("#e6e6e6", "#5a5a5a") if dark else ("#1f1f1f", "#c8c8c8")
    return {
        "axes.axisbelow": True,
        "axes.edgecolor": faint,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": ink,
        "axes.prop_cycle": cycler(color=[pair[dark] for pair in (BLUE, GREY, ORANGE, GREEN, PURPLE)]),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": ink,
        "axes.titlelocation": "left",
        "axes.titlesize": "medium",
        "axes.titleweight": "bold",
        "figure.constrained_layout.use": True,
        "figure.facecolor": "none",
        "font.size": 10,
        "grid.color": faint,
        "grid.linewidth": 0.5,
        "legend.frameon": False,
        "savefig.facecolor": "none",
        "svg.fonttype": "path",
        # the same picture is the same file
        "svg.hashsalt": "loqt_peft",
        "text.color": ink,
        "xtick.color": ink,
        "ytick.color": ink,
    }


def paper() -> dict[str, Any]:
    """[`settings`] on white, for pictures that are looked at by themselves: notebooks, `.png` files."""
    return {**settings(), "figure.facecolor": "white", "savefig.facecolor": "white"}


@contextmanager
def style(dark: bool = False, white: bool = False) -> Iterator[None]:
    """[`settings`] for a while, or with `white` those of [`paper`]."""
    chosen = paper() if white else settings(dark)
    import matplotlib

    with matplotlib.rc_context(chosen):
        yield


def save(figure: Any, path: str | Path) -> None:
    """Write a figure, the same bytes whenever it is the same picture."""
    import matplotlib.pyplot as plt

    metadata = {"Date": None} if str(path).endswith(".svg") else None
    figure.savefig(path, dpi=150, metadata=metadata)
    plt.close(figure)


def name_lines(axes: Axes) -> None:
    """Write each line's label beside its end, in its colour, in place of a legend; those that would overlap move apart."""
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    if not lines:
        return
    axes.figure.draw_without_rendering()
    low, high = axes.get_ylim()
    room = (high - low) * 0.055 * 4 / max(axes.get_window_extent().height / axes.figure.dpi, 1)
    ends = sorted((float(line.get_ydata()[-1]), float(line.get_xdata()[-1]), line) for line in lines)
    below = float("-inf")
    for y, x, line in ends:
        place = max(y, below + room)
        below = place
        axes.annotate(
            line.get_label(),
            (x, place),
            xytext=(6, 0),
            textcoords="offset points",
            color=line.get_color(),
            va="center",
            annotation_clip=False,
        )
    # constrained layout makes room for what is written outside
    axes.margins(x=0.01)


def memory_bars(axes: Axes, estimate: MemoryEstimate, dark: bool = False) -> None:
    """A bar a phase, in GB, by what takes the memory; the device's size as a line, if it is known."""
    phases = list(estimate.phases)
    categories = list(dict.fromkeys(name for held in estimate.phases.values() for name in held))
    left = [0.0] * len(phases)
    shades = iter((GREY[dark], "#8c8c8c", "#a6a6a6", "#595959", "#737373"))
    for name in categories:
        sizes = [estimate.phases[phase].get(name, 0) / 1e9 for phase in phases]
        shade = colour(name, dark) if name in CATEGORY_COLOURS else next(shades, GREY[dark])
        axes.barh(phases, sizes, left=left, color=shade, label=name, height=0.7)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for y, total in enumerate(left):
        axes.annotate(f"{total:.1f}", (total, y), xytext=(4, 0), textcoords="offset points", va="center")
    widest = max(left)
    if estimate.budget is not None:
        budget = estimate.budget / 1e9
        widest = max(widest, budget)
        axes.axvline(budget, color=ORANGE[dark], linestyle="--", linewidth=1.5)
        axes.annotate(
            f"card: {budget:.1f} GB",
            (budget, -0.6),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=ORANGE[dark],
        )
    axes.set_xlim(0, widest * 1.12)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("memory on the device, GB (10⁹ bytes), predicted")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def plot_estimate(estimate: MemoryEstimate, path: str | Path) -> None:
    """`loqt estimate --plot`: the phases of one estimate as a picture; the name's ending says which format.

    Args:
        estimate ([`MemoryEstimate`]): What is shown.
        path (`str` or `Path`): Where; as matplotlib takes it, `.svg`, `.png` or `.pdf`.

    Raises:
        ValueError: If matplotlib is not installed, or does not know the format.
    """
    with style(white=True):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(8.5, 0.55 * len(estimate.phases) + 1.5))
        memory_bars(axes, estimate)
        options = estimate.options
        name = Path(estimate.model).stem if estimate.model.endswith(".json") else estimate.model
        axes.set_title(
            f"{name}, {options.method}, rank {options.rank}, {options.batch_size} × {options.sequence_length} tokens"
        )
        save(figure, path)
