"""Parts of the reference that come from the code: every field of `LoQTConfig`, every command with its options."""

import argparse
import dataclasses

from docutils import nodes
from peft import PeftConfig
from sphinx.util.docutils import SphinxDirective

from loqt_peft import LoQTConfig
from loqt_peft.cli.main import build_parser


def fields_table() -> str:
    """Markdown: name, default and meaning of each field that users set."""
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(LoQTConfig):
        if field.name in inherited or "not by the user" in field.metadata["help"]:
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        help_text = field.metadata["help"].replace("|", r"\|")
        lines.append(f"| `{field.name}` | `{default!r}` | {help_text} |")
    return "\n".join(lines)


def _option(action: argparse.Action) -> str:
    names = ", ".join(action.option_strings) or action.metavar or action.dest
    value = ""
    if action.option_strings and action.nargs != 0:
        value = "{" + ", ".join(map(str, action.choices)) + "}" if action.choices else (action.metavar or "VALUE")
    return f"{names} {value}".strip()


def commands_text() -> str:
    """Markdown: each command of `loqt`, as its `--help` describes it."""
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parts = []
    for name, parser in commands.choices.items():
        parts += [f"## loqt {name}", "", parser.description, "", "| | |", "|---|---|"]
        for action in parser._actions:
            if action.dest != "help":
                parts.append(f"| `{_option(action)}` | {(action.help or '').replace('|', chr(92) + '|')} |")
        parts.append("")
    return "\n".join(parts)


class _FromCode(SphinxDirective):
    text = staticmethod(lambda: "")

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(self.text(), allow_section_headings=True)


class ConfigFields(_FromCode):
    text = staticmethod(fields_table)


class Commands(_FromCode):
    text = staticmethod(commands_text)


def setup(app):
    app.add_directive("config-fields", ConfigFields)
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
