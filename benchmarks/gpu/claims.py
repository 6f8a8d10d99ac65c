"""A claim: what was predicted, what was measured, and whether it holds.

Needs nothing but Python, so that a report can be written anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


Figure = float | int | bool | str | None


@dataclass(frozen=True)
class Claim:
    """One claim with its verdict.

    Attributes:
        name (`str`): What is claimed, in words.
        predicted (`float`, `int`, `bool` or `str`): The predicted value.
        measured (`float`, `int`, `bool`, `str`, *optional*): `None` if it could not be measured.
        relation (`str`): How the measured value must lie to the predicted one, in words.
        source (`str`): The function or formula that the prediction comes from.
        unit (`str`): Of both values.
        holds (`bool`, *optional*): The verdict; `None` if nothing was measured.
    """

    name: str
    predicted: Figure
    measured: Figure
    relation: str
    source: str = ""
    unit: str = ""
    holds: bool | None = None

    @property
    def verdict(self) -> str:
        return {True: "holds", False: "DOES NOT HOLD", None: "not measured"}[self.holds]


def _claim(name: str, predicted: Figure, measured: Figure, relation: str, holds: bool, **others: str) -> Claim:
    if measured is None:
        return Claim(name, predicted, None, relation, holds=None, **others)
    # a value that is not a number proves nothing
    broken = any(isinstance(value, float) and math.isnan(value) for value in (predicted, measured))
    return Claim(name, predicted, measured, relation, holds=bool(holds) and not broken, **others)


def equal(name: str, predicted: Figure, measured: Figure, **others: str) -> Claim:
    """The measured value must be the predicted one."""
    return _claim(name, predicted, measured, "equal", measured == predicted, **others)


def within(name: str, predicted: float, measured: float | None, share: float, **others: str) -> Claim:
    """The measured value must not differ from the predicted one by more than a share of it."""
    near = measured is not None and abs(measured - predicted) <= share * abs(predicted)
    return _claim(name, predicted, measured, f"within {share:.0%}", near, **others)


def at_most(name: str, predicted: float, measured: float | None, share: float = 0.0, **others: str) -> Claim:
    """The measured value must not be above the predicted one, or above it by more than a share of it."""
    relation = f"at most {share:.0%} more" if share else "at most"
    return _claim(
        name, predicted, measured, relation, measured is not None and measured <= _more(predicted, share), **others
    )


def at_least(name: str, predicted: float, measured: float | None, share: float = 0.0, **others: str) -> Claim:
    """The measured value must not be below the predicted one, or below it by more than a share of it."""
    relation = f"at most {share:.0%} less" if share else "at least"
    return _claim(
        name, predicted, measured, relation, measured is not None and measured >= _more(predicted, -share), **others
    )


def _more(value: float, share: float) -> float:
    return value + share * abs(value)


def from_json(row: dict[str, Any]) -> Claim:
    return Claim(**row)
