"""Writes the table of loqt_peft/advice.py into the pages: `python docs/tables.py`; with `--check` only says whether it is there."""

import re
import sys
from pathlib import Path

from loqt_peft.advice import table


PAGES = (Path(__file__).parent / "settings.md",)
PLACE = re.compile("(?<=<!-- advice -->\n).*?(?=<!-- /advice -->)", re.DOTALL)


def with_table(text: str) -> str:
    """A page with the table as it is now."""
    return PLACE.sub(lambda _: f"\n{table()}\n", text)


def main() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if with_table(text) == text:
            continue
        if "--check" in sys.argv:
            sys.exit(f"{page} is older than loqt_peft/advice.py: python docs/tables.py")
        page.write_text(with_table(text), encoding="utf-8")


if __name__ == "__main__":
    main()
