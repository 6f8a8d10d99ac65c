import json
import pickle

import peft
import pytest
from peft import PeftConfig
from peft.utils import PeftType

import loqt_peft
from loqt_peft import LoQTConfig


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
    loqt_peft._register_peft_type()
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


def test_unknown_size_of_the_paper():
    with pytest.raises(ValueError, match="size='7b' is not allowed: one of '60m', '130m', '350m', '1b'"):
        LoQTConfig.paper("7b")
