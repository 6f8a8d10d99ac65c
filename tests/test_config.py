import dataclasses
import inspect
import json
import pickle
import re
import warnings

import peft
import pytest
from peft import PeftConfig
from peft.utils import PeftType

import loqt_peft
from loqt_peft import LoQTConfig
from loqt_peft.config import OTHER_NAMES, PAPER


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("r", 0, "at least 1"),
        ("r", 2.5, "integer"),
        ("r", True, "integer"),
        ("loqt_alpha", 0, "positive"),
        ("loqt_alpha", float("nan"), "positive"),
        ("loqt_alpha", "0.5", "positive number, or 'auto'"),
        ("rank_pattern", {"q_proj": 0}, "at least 1"),
        ("alpha_pattern", {"q_proj": -1.0}, "positive"),
        ("alpha_pattern", {"q_proj": "auto"}, "positive"),
        ("quantize_weight", "int8", "'nf4', 'fp4', None"),
        ("quantize_projection", "nf3", "'nf4', 'fp4', None"),
        ("double_quant", "yes", "True or False"),
        ("compensation_steps", -1, "at least 0"),
        ("update_interval", 0, "at least 1"),
        ("interval_schedule", "quadratic", "'exponential', 'linear', 'constant'"),
        ("interval_growth", 0.9, "at least 1"),
        ("interval_growth", float("inf"), "finite"),
        ("max_interval", 0, "at least 1"),
        ("projection", "qr", "'svd', 'eigh', 'randomized', 'random'"),
        ("optimizer_state", "drop", "'keep', 'reset', 'rotate'"),
        ("full_rank_modules", "embed_tokens", "'all' or a list"),
        ("error_feedback", 1, "True or False"),
        ("retain_base", "disk", "'device', 'cpu', 'drop'"),
        ("offload_gradients", 1, "True, False or None"),
        ("update_mode", "layerwise", "'backward', 'stagger', 'whole'"),
        ("init_weights", None, "True or False"),
        ("num_updates", -1, "at least 0"),
    ],
)
def test_bad_value_is_named(field, value, allowed):
    with pytest.raises(ValueError) as error:
        LoQTConfig(**{field: value})
    assert f"{field}={value!r}" in str(error.value) and allowed in str(error.value)


@pytest.mark.parametrize(
    "kwargs, field",
    [
        ({"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern"),
        ({"full_rank_modules": ["head"], "modules_to_save": ["head"]}, "full_rank_modules"),
        ({"quantize_weight": None, "error_feedback": True}, "error_feedback=True is not allowed: False with quantize"),
    ],
)
def test_bad_combination_is_named(kwargs, field):
    with pytest.raises(ValueError, match=field):
        LoQTConfig(**kwargs)


def test_round_trip_through_json(tmp_path):
    config = LoQTConfig(
        r=7, target_modules=["b", "a"], full_rank_modules=["x"], interval_schedule="linear", num_updates=3
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LOQT"
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is LoQTConfig
    assert loaded == config


def test_every_field_is_documented():
    own = set(LoQTConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    assert all(LoQTConfig.__dataclass_fields__[name].metadata.get("help") for name in own)


def test_registration():
    assert PeftType.LOQT == PeftType("LOQT") == "LOQT"
    assert PeftType["LOQT"] is PeftType.LOQT
    assert PeftType.LOQT in list(PeftType)
    assert pickle.loads(pickle.dumps(PeftType.LOQT)) is PeftType.LOQT
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LOQT] == "loqt_"
    # importing twice must not register twice
    before = list(PeftType)
    loqt_peft.register()
    assert list(PeftType) == before


@pytest.mark.parametrize(
    "size, r, scale, compensation_steps",
    [("60m", 128, 0.4, 5), ("130m", 256, 0.5, 5), ("350m", 256, 0.5, 5), ("1b", 512, 0.25, 10)],
)
def test_recipe_of_the_paper(size, r, scale, compensation_steps):
    config = LoQTConfig.paper(size)
    assert (config.r, config.loqt_alpha, config.compensation_steps) == (r, scale, compensation_steps)
    assert (config.quantize_weight, config.quantize_projection, config.projection) == ("nf4", "nf4", "svd")
    assert config.full_rank_modules == "all" and config.task_type == "CAUSAL_LM"
    # the gaps are 100 + 1.2^i, rounded down
    gaps = [int(100 + 1.2**i) for i in range(30)]
    steps = [sum(gaps[:i]) for i in range(30)]
    assert config.schedule.update_steps(steps[-1] + 1) == steps
    changed = LoQTConfig.paper(size, r=8, quantize_weight=None)
    assert (changed.r, changed.quantize_weight, changed.loqt_alpha) == (8, None, scale)


@pytest.mark.parametrize("size", ["60M", "1B", "130m"])
def test_size_of_the_paper_in_any_case(size):
    assert LoQTConfig.paper(size) == LoQTConfig.paper(size.lower())


@pytest.mark.parametrize("size", ["7b", 60, None])
def test_what_is_no_size_of_the_paper(size):
    with pytest.raises(ValueError, match=f"size={size!r} is not allowed"):
        LoQTConfig.paper(size)


###############################
# Habits from other methods
###############################


@pytest.mark.parametrize(
    "kwargs, named",
    [
        ({"loqt_alpha": 32}, "loqt_alpha=32"),
        ({"alpha_pattern": {"q_proj": 16.0}}, r"alpha_pattern\['q_proj'\]=16.0"),
    ],
)
def test_scale_of_lora_brings_a_warning(kwargs, named):
    with pytest.warns(
        UserWarning, match=f"^{named}: .* is not divided by r .* 0.25 to 0.5 in pretraining and 2 on GLUE"
    ):
        LoQTConfig(**kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"loqt_alpha": 2}, {"loqt_alpha": 4.0}, {"loqt_alpha": "auto"}])
def test_sensible_scales_bring_none(kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoQTConfig(**kwargs)
        for size in PAPER:
            LoQTConfig.paper(size)


def test_saved_adapter_of_a_large_scale_loads_in_silence(tmp_path):
    with pytest.warns(UserWarning, match="loqt_alpha=16"):
        LoQTConfig(loqt_alpha=16).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PeftConfig.from_pretrained(tmp_path).loqt_alpha == 16


@pytest.mark.parametrize(
    "name, hint",
    [
        ("lora_alpha", "`loqt_alpha`: s itself, not divided by r"),
        ("rank", "`r`"),
        ("lora_dropout", "Leave it out"),
        ("use_dora", "Leave it out"),
        ("update_proj_gap", "`update_interval`"),
        # slips of the pen
        ("update_intervall", "Is it `update_interval` that is meant?"),
    ],
)
def test_name_of_another_method_is_answered(name, hint):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'") as error:
        LoQTConfig(**{name: 1})
    assert hint in str(error.value)


def test_every_answer_names_fields_that_there_are():
    assert not OTHER_NAMES.keys() & LoQTConfig.__dataclass_fields__.keys()
    named = {name for hint in OTHER_NAMES.values() for name in re.findall(r"`(\w+)`", hint)}
    assert named <= LoQTConfig.__dataclass_fields__.keys()


def test_unknown_keys_of_a_saved_config_are_left_out(tmp_path):
    # PEFT's way with a config that a later version has written
    LoQTConfig(r=7).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 16, "of_the_future": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['lora_alpha', 'of_the_future'\]"):
        assert PeftConfig.from_pretrained(tmp_path).r == 7
    assert list(inspect.signature(LoQTConfig).parameters) == [f.name for f in dataclasses.fields(LoQTConfig) if f.init]


def test_unknown_size_of_the_paper():
    with pytest.raises(ValueError, match="size='7b' is not allowed: one of '60m', '130m', '350m', '1b'"):
        LoQTConfig.paper("7b")
