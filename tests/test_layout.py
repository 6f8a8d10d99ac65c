"""Imports run one way: no file reaches itself through others, and no room knows one above it."""

import ast
import functools

import pytest
from common import ROOT


PACKAGE = ROOT / "loqt_peft"
# rooms from the ground up; a file of the package itself is a room by its name
FLOORS = [
    {"_version", "_moved", "advice", "choices", "patience", "findings", "requirements", "compat", "dtensor"},
    {"algorithm"},
    {"saving", "config", "config_checks"},
    {"layers"},
    {"training", "export", "memory", "loading", "packed_base", "plots"},
    {"health"},
    {"model", "callback"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]


def files():
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imported(name, path, names):
    """The files of the package that a file imports, wherever in it, for types too."""
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1] + (node.module or "").split(".") * bool(node.module)
        for alias in node.names:
            target = ".".join([*base, alias.name])
            target = target if target in names else ".".join(base)
            # a folder's face hands on names of its files
            yield target if target in names else f"{target}.__init__".removeprefix(".")


@functools.cache
def graph():
    names = files()
    return {name: set(imported(name, path, names)) for name, path in names.items()}


def test_no_file_reaches_itself():
    arrows = graph()

    def visit(name, trail):
        for target in arrows.get(name, ()):
            assert target not in trail, " -> ".join([*trail[trail.index(target) :], target])
            if target not in done:
                visit(target, [*trail, target])
        done.add(name)

    done = set()
    for name in arrows:
        visit(name, [name])


@pytest.mark.parametrize("name", sorted(files()))
def test_no_room_knows_one_above_it(name):
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    room = name.split(".")[0]
    for target in graph()[name]:
        assert floor_of[target.split(".")[0]] <= floor_of[room], target
