"""LoQT's rows for the lists of cases of PEFT's tests of custom models, in the manner of LoRA's there."""

import re

import pytest

from loqt_peft import LoQTConfig


BOTH = {"target_modules": ["lin0", "lin1"]}

# Rows are (name, model, arguments of LoQTConfig). Each of them trains and saves, so none has `full_rank_modules`, which
# PEFT's bodies would take for a base model that moves, nor `retain_base="drop"`, which is to refuse what they ask for.
_COMMON = [
    ("MLP lin0", "MLP", {"target_modules": ["lin0"]}),
    ("MLP lin1", "MLP", {"target_modules": ["lin1"]}),
    ("MLP both", "MLP", BOTH),
    ("MLP modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP all linear", "MLP", {"target_modules": None}),
    ("MLP r2 alpha2", "MLP", {**BOTH, "r": 2, "loqt_alpha": 2.0}),
    (
        "MLP rank and alpha pattern",
        "MLP",
        {**BOTH, "r": 2, "rank_pattern": {"lin0": 5}, "alpha_pattern": {"lin1": 1.5}},
    ),
    ("MLP nq", "MLP", {**BOTH, "r": 4, "quantize_weight": None}),
    ("MLP nq dense P", "MLP", {**BOTH, "r": 4, "quantize_weight": None, "quantize_projection": None}),
    ("MLP nf4 dense P", "MLP", {**BOTH, "r": 4, "quantize_weight": "nf4", "quantize_projection": None}),
    ("MLP fp4", "MLP", {**BOTH, "r": 4, "quantize_weight": "fp4", "quantize_projection": "fp4"}),
    ("MLP double_quant", "MLP", {**BOTH, "r": 4, "double_quant": True}),
    ("MLP no bias", "MLPNoBias", {**BOTH, "r": 4}),
    ("MLP2", "MLP2", {**BOTH, "r": 4}),
    ("MLP_LayerNorm", "MLP_LayerNorm", {"target_modules": ["lin0"], "r": 4}),
    ("transformers Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("transformers Conv1D and Linear", "EmbConv1D", {"target_modules": ["conv1d", "lin0"]}),
]

# What they vary has no part in a switch.
_SELECTION = [
    ("MLP target str", "MLP", {"target_modules": "lin0"}),
    ("MLP target also in modules_to_save", "MLP", {**BOTH, "modules_to_save": ["lin1"]}),
    ("MLP all but one", "MLP", {**BOTH, "exclude_modules": ["lin0"]}),
    ("transformers Conv1D all linear", "EmbConv1D", {"target_modules": None}),
]

# What they vary matters in a switch only.
_SWITCH = [
    ("MLP svd", "MLP", {**BOTH, "r": 4, "projection": "svd", "optimizer_state": "reset"}),
    ("MLP eigh", "MLP", {**BOTH, "r": 4, "projection": "eigh", "optimizer_state": "rotate"}),
    ("MLP randomized", "MLP", {**BOTH, "r": 4, "projection": "randomized", "compensation_steps": 0}),
    ("MLP base on device, offload", "MLP", {**BOTH, "r": 4, "retain_base": "device", "offload_gradients": True}),
]

# (name, arguments of the first adapter's LoQTConfig, arguments of the second's)
_PAIRS = [
    ("same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    ("overlapping", BOTH, {"target_modules": ["lin1"], "r": 1}),
    ("nq and nf4", {**BOTH, "quantize_weight": None}, {**BOTH, "double_quant": True, "quantize_projection": None}),
    ("base on device and cpu", {**BOTH, "retain_base": "device"}, {**BOTH, "retain_base": "cpu", "r": 4}),
]

# One for every way in which the tensors of an adapter are stored.
_FORMATS = ["MLP modules_to_save", "MLP nq dense P", "MLP nf4 dense P", "MLP double_quant", "transformers Conv1D"]

# Several switches then lie between the start and the end of a test that trains for three steps. An update on every one
# of them would leave B at zero where nothing is left to compensate, while PEFT asks whether B has moved.
OFTEN = {"update_interval": 2, "interval_schedule": "constant"}


def _id(name):
    return re.sub(r"\W+", "-", name)


FORMATS = {_id(name) for name in _FORMATS}


def _kwargs(kwargs, drifted, **more):
    return {**kwargs, **more, **(OFTEN if drifted else {})}


def single(drifted):
    """Rows for TEST_CASES: test name, model, config class, arguments."""
    return [
        pytest.param(name, model, LoQTConfig, _kwargs(kwargs, drifted), id=_id(name))
        for name, model, kwargs in _COMMON + (_SWITCH if drifted else _SELECTION)
    ]


def pairs(drifted):
    """Rows for MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES: test name, tuner method, config class, arguments twice."""
    # PEFT's rows all ask for random adapters, since those of these tests that compare outputs need two that differ.
    return [
        pytest.param(
            name,
            "loqt",
            LoQTConfig,
            _kwargs(first, drifted, init_weights=False),
            _kwargs(second, drifted, init_weights=False),
            id=_id(name),
        )
        for name, first, second in _PAIRS
    ]
