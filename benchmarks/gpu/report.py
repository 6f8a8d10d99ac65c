"""Verdicts in the terminal, and the same with all figures in Markdown."""

from __future__ import annotations

from .claims import Claim, Figure
from .plan import MEASUREMENTS
from .results import DONE, Results


TINY_NOTE = (
    "The small form, on the CPU: it shows that every measurement runs to its end. Its values and verdicts say nothing about a "
    "GPU.\n"
)


def show(value: Figure, unit: str = "") -> str:
    """A value for people."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if unit == "bytes":
        return f"{value / 1e9:.3f} GB" if value >= 1e8 else f"{value / 1e6:.3f} MB"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{text} {unit}".strip()


def _table(header: tuple[str, ...], rows: list[tuple]) -> str:
    # a vertical line would end a cell
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [header, ("---",) * len(header), *rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells) + "\n"


def _row(claim: Claim) -> tuple:
    predicted, measured = show(claim.predicted, claim.unit), show(claim.measured, claim.unit)
    return claim.name, predicted, measured, claim.relation, claim.verdict, claim.source


def verdicts(results: Results) -> str:
    """A line a claim: verdict, predicted, measured; and a line for each measurement that did not end."""
    lines = [f"{'verdict':>13}  claim: predicted -> measured"]
    for measurement in MEASUREMENTS:
        for claim in results.claims(measurement.name):
            name, predicted, measured, relation, verdict, _ = _row(claim)
            lines.append(f"{verdict:>13}  {measurement.name}, {name}: {predicted} ({relation}) -> {measured}")
        status = results.status(measurement.name) or "not begun"
        if status != DONE:
            lines.append(f"{status.upper():>13}  {measurement.name}")
    return "\n".join(lines)


def _figures(figures: dict, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in figures.items():
        if isinstance(value, dict):
            rows += _figures(value, f"{prefix}{name}, ")
        elif isinstance(value, list):
            rows.append((prefix + name, ", ".join(show(item) for item in value)))
        else:
            rows.append((prefix + name, show(value, "bytes" if name.endswith("bytes") else "")))
    return rows


def markdown(results: Results) -> str:
    """Everything that was measured, with device, driver and versions."""
    tiny = results.data["form"] == "tiny"
    environment = ", ".join(
        f"{key} {value}" for key, value in results.data["environment"].items() if value is not None
    )
    sections = ["# GPU claims\n", TINY_NOTE if tiny else "", f"Measured on: {environment}.\n", "## Verdicts\n"]
    claims = [claim for m in MEASUREMENTS for claim in results.claims(m.name)]
    sections.append(
        _table(("claim", "predicted", "measured", "must be", "verdict", "predicted by"), [*map(_row, claims)])
    )
    for measurement in MEASUREMENTS:
        row = results.data["measurements"].get(measurement.name, {})
        seconds = f" in {row['seconds']} s, commit {row['commit']}" if "seconds" in row else ""
        sections.append(
            f"## {measurement.name}\n\n{measurement.what} {row.get('status', 'not begun').capitalize()}{seconds}.\n"
        )
        if row.get("figures"):
            sections.append(_table(("", ""), _figures(row["figures"])))
        if row.get("error"):
            sections.append(f"```\n{row['error'].strip()}\n```\n")
    return "\n".join(section for section in sections if section)
