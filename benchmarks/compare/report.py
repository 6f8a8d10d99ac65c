"""The report of a study: its table and its figures, beside the results."""

from pathlib import Path

from benchmarks.compare.errors import CompareError
from benchmarks.compare.figures import plot_losses, plot_memory, plot_updates
from benchmarks.compare.tables import runs_of, table


def write_report(plan, done: dict[str, dict], folder: Path) -> str:
    """Write the table and the figures of a study beside the results, and return the table.

    Raises:
        CompareError: If they cannot be written, or the runs cannot be compared.
    """
    import matplotlib

    matplotlib.use("Agg")
    text = table(plan, done)
    name = "-".join(filter(None, (plan.study, plan.text, plan.size, str(plan.steps))))
    found = {v: runs for v in plan.variants if (runs := runs_of(plan, v, done))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if found:
            plot_losses(plan, found, folder / f"{name}-loss.png")
            plot_memory(plan, found, folder / f"{name}-memory.png")
            plot_updates(plan, found, folder / f"{name}-updates.png")
            (folder / f"{name}.md").write_text(text)
    except OSError as error:
        raise CompareError(f"table and figures could not be written to {folder}: {error}") from error
    return text
