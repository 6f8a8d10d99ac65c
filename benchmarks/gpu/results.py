"""The file of results: written anew after every figure, so that a killed run loses nothing that it has measured."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .claims import Claim, from_json
from .source import commit


if TYPE_CHECKING:
    from .settings import Settings


DONE, RUNNING, FAILED, LATE = "done", "running", "failed", "over its budget"
# may differ between machines of one kind
DETAILS = ("driver", "memory_bytes", "cores")


class Results:
    """The file of results of one machine.

    Args:
        path (`Path`): A JSON file; need not exist.
        form (`str`): `"full"` or `"tiny"`.

    Raises:
        ValueError: If the file holds results of another form.
    """

    def __init__(self, path: Path, form: str) -> None:
        self.path = Path(path)
        self.data: dict[str, Any] = {"form": form, "environment": {}, "measurements": {}}
        if self.path.exists():
            self.data = json.loads(self.path.read_text(encoding="utf-8"))
        if self.data["form"] != form:
            raise ValueError(
                f"{self.path} holds results of the {self.data['form']} form, and this is the {form} one: "
                "choose another file with --output, or delete it."
            )

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # whoever is killed in the middle leaves the old file
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.path)

    def set_environment(self, environment: dict[str, Any]) -> None:
        """Note machine and versions.

        Raises:
            ValueError: If the file was begun on another device, or with other versions.
        """
        known = self.data["environment"]
        compared = [key for key in environment if known and key not in DETAILS]
        differing = [key for key in compared if known.get(key) != environment[key]]
        if differing:
            listed = ", ".join(f"{key} {known.get(key)!r}, now {environment[key]!r}" for key in differing)
            raise ValueError(
                f"{self.path} was begun elsewhere ({listed}): choose another file with --output, or delete it."
            )
        self.data["environment"] = environment
        self.save()

    def begin(self, name: str) -> None:
        begun = {"status": RUNNING, "began": time.time(), "commit": commit(), "figures": {}, "claims": []}
        self.data["measurements"][name] = begun
        self.save()

    def end(self, name: str, status: str, error: str = "") -> None:
        row = self.data["measurements"][name]
        row["status"], row["seconds"] = status, round(time.time() - row["began"], 1)
        if error:
            row["error"] = error
        self.save()

    def figure(self, name: str, what: str, value: Any) -> None:
        self.data["measurements"][name]["figures"][what] = value
        self.save()

    def claim(self, name: str, claim: Claim) -> None:
        self.data["measurements"][name]["claims"].append(asdict(claim))
        self.save()

    def status(self, name: str) -> str | None:
        return self.data["measurements"].get(name, {}).get("status")

    def running(self) -> str | None:
        """The measurement that is under way, or was when its process ended."""
        return next((name for name in self.data["measurements"] if self.status(name) == RUNNING), None)

    def claims(self, name: str) -> list[Claim]:
        return [from_json(row) for row in self.data["measurements"].get(name, {}).get("claims", [])]


class Recorder:
    """Where a measurement writes what it finds, as soon as it has found it.

    Attributes:
        settings ([`Settings`]): Device and sizes.
    """

    def __init__(self, results: Results, name: str, settings: Settings) -> None:
        self.settings = settings
        self._results, self._name = results, name

    def figure(self, what: str, value: Any) -> None:
        self._results.figure(self._name, what, value)
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"  {what}: {shown}", flush=True)

    def claim(self, claim: Claim) -> None:
        self._results.claim(self._name, claim)
        print(f"  {claim.name}: {claim.verdict}", flush=True)
