"""Writes the tables that come from the code into README and pages: `python docs/tables.py`.

With `--check` it only says whether they are there.
"""

import re
import sys
from pathlib import Path

from loqt_peft.advice import table
from loqt_peft.memory import estimate_memory, parse_bytes


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "pretraining" / "configs"
CARDS = ("8GiB", "12GiB", "16GiB", "24GiB", "48GiB", "80GiB")
SIZES = ("1b", "7b", "13b")
LENGTHS = (256, 2048)


def fitting_rank(size: str, card: str, length: int) -> str:
    """The largest rank, by halves of the hidden size, that fits; with `+` if only with checkpointing."""
    path = CONFIGS / f"llama_{size}.json"
    hidden = {"1b": 2048, "7b": 4096, "13b": 5120}[size]
    for divisor in (2, 4, 8, 16):
        for checkpointing in (False, True):
            needed = estimate_memory(
                path,
                levers=False,
                rank=hidden // divisor,
                optimizer="adamw_8bit",
                double_quant=True,
                per_layer=True,
                gradient_checkpointing=checkpointing,
                sequence_length=length,
            ).required
            if needed <= parse_bytes(card):
                return f"{hidden // divisor}{' +' if checkpointing else ''}"
    return "–"


def memory_table() -> str:
    """The largest rank that fits, by card, model and length of a sequence."""
    columns = [(size, length) for size in SIZES for length in LENGTHS]
    lines = [
        "| largest rank that fits | " + " | ".join(f"{s.upper()}, {n:,}" for s, n in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for card in CARDS:
        cells = (fitting_rank(size, card, length) for size, length in columns)
        lines.append(f"| {card.replace('GiB', ' GiB')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES = {"README.md": ("memory", memory_table), "docs/settings.md": ("advice", table)}


def with_table(text: str, name: str, made: str) -> str:
    """A page with a table as it is now."""
    place = re.compile(f"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
    return place.sub(lambda _: f"\n{made.strip()}\n\n", text)


def main() -> None:
    for page, (name, make) in TABLES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        new = with_table(text, name, make())
        if new == text:
            continue
        if "--check" in sys.argv:
            sys.exit(f"{page} is older than the code: python docs/tables.py")
        (ROOT / page).write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
