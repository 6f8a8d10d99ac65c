"""The commands and their errors."""

from __future__ import annotations

import argparse
import sys

from .doctor import add_doctor_parser
from .estimate import add_estimate_parser
from .export import add_export_parser


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loqt", description="What can be done from the command line.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_export_parser(commands)
    add_estimate_parser(commands)
    add_doctor_parser(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        `int`:
            The exit status: 0, what the command returns (`doctor`: 1 if there is something to mend), or 2 after an error of
            the user's, which is printed in one line.
    """
    options = build_parser().parse_args(arguments)
    # a wheel of a few kB, but not of the standard library
    from safetensors import SafetensorError

    try:
        return options.run(options) or 0
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
