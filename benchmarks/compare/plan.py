"""Which runs a study needs, as far as the finished ones tell."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.compare.errors import CompareError
from benchmarks.compare.settings import LEARNING_RATES, Variant, key_of
from benchmarks.compare.variants import LOQT


@dataclass
class Plan:
    """A study at a size: which runs it needs, as far as the finished ones tell.

    Args:
        study (`str`): Its name.
        variants (`list[Variant]`): Its rows.
        spec (`Callable`): (variant, learning rate, seed) -> spec.
        seeds (`list[int]`): The grid is searched with the first.
        rates (`tuple[float]`, *optional*): Instead of every variant's own grid.
        size (`str`): The size's name.
        steps (`int`): Of each run.
        text (`str`): What it is called in tables and names of files; empty for the reviews.
    """

    study: str
    variants: list[Variant]
    spec: Callable[[Variant, float, int], dict]
    seeds: list[int]
    rates: tuple[float, ...] | None = None
    size: str = ""
    steps: int = 0
    text: str = ""

    def grid(self, variant: Variant) -> list[dict]:
        """The runs that decide on the learning rate of a variant."""
        searched = variant if variant.search else LOQT
        rates = self.rates or searched.rates or LEARNING_RATES[searched.method]
        return [self.spec(searched, rate, self.seeds[0]) for rate in rates]

    def best_rate(self, variant: Variant, done: dict[str, dict]) -> float | None:
        """Of the grid, once all of it is done; `None` before, and if all of it diverged."""
        runs = [done.get(key_of(spec)) for spec in self.grid(variant)]
        if not all(runs):
            return None
        converged = [run for run in runs if not run["diverged"]]
        return min(converged, key=lambda run: run["loss"])["spec"]["lr"] if converged else None

    def at_rate(self, variant: Variant, rate: float) -> list[dict]:
        return [self.spec(variant, rate, seed) for seed in self.seeds]

    def known(self, done: dict[str, dict]) -> list[dict]:
        """All runs that are known to be needed; the repetitions once their learning rate is known."""
        specs = []
        for variant in self.variants:
            specs += self.grid(variant)
            rate = self.best_rate(variant, done)
            if rate is not None:
                specs += self.at_rate(variant, rate)
        return specs

    def expected(self, done: dict[str, dict]) -> set[str]:
        """Keys of all runs, with the first rate of the grid in place of a best one that is not known yet."""
        keys = {key_of(spec) for spec in self.known(done)}
        for variant in self.variants:
            grid = self.grid(variant)
            if not all(key_of(spec) in done for spec in grid):
                keys |= {key_of(spec) for spec in self.at_rate(variant, grid[0]["lr"])}
        return keys


def only_rows(plans: list[Plan], names: list[str]) -> list[Plan]:
    """The plans with the variants of these names. Raises CompareError if no study has one of them."""
    there = {variant.name for plan in plans for variant in plan.variants}
    unknown = [name for name in names if name not in there]
    if unknown:
        raise CompareError(f"--rows {unknown}: the rows are {sorted(there)}")
    return [replace(plan, variants=[v for v in plan.variants if v.name in names]) for plan in plans]
