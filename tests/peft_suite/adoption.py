"""Imports PEFT's tests and turns its test classes into ones that run the same bodies with LoQT.

A test of PEFT is a function and a list of cases. The functions are taken as they are; only the lists, attached to them
by `pytest.mark.parametrize`, are exchanged.
"""

import functools
import importlib
import importlib.machinery
import inspect
import sys
import types
from contextlib import contextmanager

import peft
import pytest

from .fetch import fetch


PACKAGE = "peft_sdist_tests"


@contextmanager
def _diffusers_stand_in():
    # PEFT's helpers import one class of diffusers, for an isinstance check in tests of image models. To require a
    # package of that size for it would be out of proportion. The stand-in goes as soon as the import is done, so that
    # nothing else takes diffusers to be installed.
    if importlib.util.find_spec("diffusers") is not None:
        yield
        return
    module = types.ModuleType("diffusers")
    module.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
    module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = module
    try:
        yield
    finally:
        del sys.modules["diffusers"]


@functools.cache
def load(name):
    """Imports one of PEFT's test modules. They import each other relatively, hence the package around them."""
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(fetch())]
        sys.modules[PACKAGE] = package
    with _diffusers_stand_in():
        return importlib.import_module(f"{PACKAGE}.{name}")


def _is_config_class(value):
    return inspect.isclass(value) and issubclass(value, peft.PeftConfig)


def _exchange(mark, lists, test):
    """The mark with LoQT's cases, or None if its list has nothing to do with the choice of a tuner."""
    if mark.name != "parametrize":
        return None
    names, values = mark.args[:2]
    for theirs, ours in lists:
        if values is theirs:
            return pytest.mark.parametrize(names, [row for row in ours if lists.keep(test, row)]).mark
    # A few tests name the config classes they run with in place.
    if names == "config_cls" and all(_is_config_class(value) for value in values):
        return pytest.mark.parametrize(names, lists.config_classes).mark
    return None


class CaseLists(list):
    """Pairs of (one of PEFT's lists of cases, LoQT's list).

    `config_classes` stands for the lists that tests have in place; `keep` tells whether a test is to get a row.
    """

    def __init__(self, pairs, config_classes=(), keep=lambda test, row: True):
        super().__init__(pairs)
        self.config_classes = config_classes
        self.keep = keep


def with_marks(function, marks):
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    functools.update_wrapper(copy, function)
    # `__wrapped__` would make pytest read the signature and marks of the original.
    del copy.__wrapped__
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.pytestmark = marks
    return copy


def tests_of(cls):
    return {name: getattr(cls, name) for name in dir(cls) if name.startswith("test")}


def exchanged_tests(cls, lists):
    """The tests of a class of PEFT's that are parametrized over tuners, with LoQT as the only tuner."""
    adopted = {}
    for name, function in tests_of(cls).items():
        old = getattr(function, "pytestmark", [])
        new = [_exchange(mark, lists, name) for mark in old]
        if any(mark is not None for mark in new):
            adopted[name] = with_marks(function, [n or o for n, o in zip(new, old, strict=True)])
    return adopted


def adopt(name, cls, tests, **attributes):
    """A subclass of one of PEFT's test classes that holds the given tests and none of the others."""
    others = dict.fromkeys(set(tests_of(cls)) - set(tests))
    return type(name, (cls,), {**others, **tests, **attributes, "adopted_from": cls})
