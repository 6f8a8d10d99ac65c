"""Which source is measured."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]


def commit() -> str | None:
    """The commit of this checkout, with "-dirty" if it was changed, or the one that a kit was made of."""
    about = ROOT / "kit.json"
    if about.exists():
        return json.loads(about.read_text(encoding="utf-8"))["commit"]
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--match", ""]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
