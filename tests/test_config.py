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
        ("loqt_alpha", "0.5", "positive"),
        ("rank_pattern", {"q_proj": 0}, "at least 1"),
        ("alpha_pattern", {"q_proj": -1.0}, "positive"),
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
