"""What a check of a model finds, and how findings become errors and warnings."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


class LoQTWarning(UserWarning):
    """Every warning of this package but deprecations; a healthy run has none."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not in order.

    Attributes:
        severity (`"error"` or `"warning"`): Whether going on would give a wrong model or none, or only deserves a word.
        code (`str`): A short name for programs, in snake_case; the same for all findings of one kind.
        what (`str`): What is wrong and where, with the value that was found; a sentence.
        remedy (`str`): What to do instead; a sentence.
    """

    severity: Literal["error", "warning"]
    code: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what} {self.remedy}"


def report(findings: Iterable[Finding], stacklevel: int = 2) -> None:
    """Warn of every warning, then raise the errors as one.

    Raises:
        ValueError: If any finding is an error. The message holds all of them.
    """
    errors = []
    for finding in findings:
        if finding.severity == "error":
            errors.append(str(finding))
        else:
            warnings.warn(str(finding), LoQTWarning, stacklevel=stacklevel + 1)
    if errors:
        raise ValueError(errors[0] if len(errors) == 1 else "\n- ".join(["Several things are wrong:", *errors]))


def report_once(holder: object, findings: Iterable[Finding], stacklevel: int = 2) -> None:
    """[`report`] errors always, and of each kind of warning the first.

    Args:
        holder (`object`): What remembers the kinds of which a word was said, as the model.
        findings: What was found.
        stacklevel (`int`): As in `warnings.warn`.

    Raises:
        ValueError: If any finding is an error.
    """
    findings = list(findings)
    told = vars(holder).setdefault("_loqt_told", set())
    new = [finding for finding in findings if finding.severity == "error" or finding.code not in told]
    told.update(finding.code for finding in findings)
    report(new, stacklevel=stacklevel + 1)
