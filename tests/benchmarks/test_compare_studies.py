"""benchmarks.compare: the rows of its studies."""

import json
import math
from dataclasses import replace

import pytest
from compare_runs import TINY, tiny_model, tiny_spec
from peft import get_peft_model

from benchmarks.compare.settings import SIZES, Variant, key_of, make_spec
from benchmarks.compare.studies import STUDIES
from benchmarks.compare.variants import LOQT, fitted
from loqt_peft import LoQTConfig
from loqt_peft.layers.find import loqt_layers


def device_bytes(variant):
    """GaLore needs 1000; LoQT 160 for each direction, and 90 with 8-bit moments; 40 of them for gradients."""
    if variant.method == "galore":
        return 1000
    each = (90 if variant.optim == "adamw_bnb_8bit" else 160) - 40 * variant.per_layer
    return each * variant.fields.get("r", TINY.rank)


def test_every_study_has_valid_runs_and_shares_loqts_own(tmp_path):
    base = key_of(tiny_spec(LOQT))
    shared = set()
    for name, study in STUDIES.items():
        variants = study.variants(TINY, device_bytes)
        specs = [tiny_spec(variant) for variant in variants]
        assert len({variant.name for variant in variants}) == len({key_of(spec) for spec in specs}) == len(variants)
        for spec in specs:
            assert json.loads(json.dumps(spec)) == spec
            assert spec["batch"] % spec["micro_batches"] == 0
        if base in map(key_of, specs):
            shared.add(name)
    # P from all micro-batches of several is another run than with one; ranks are parts of the hidden size
    assert shared == set(STUDIES) - {"micro_batches"}
    large = [
        make_spec(v, "60m", 0.01, 0, 10, "text", "float32", "cpu")
        for v in STUDIES["micro_batches"].variants(SIZES["60m"], None)
    ]
    assert key_of(make_spec(LOQT, "60m", 0.01, 0, 10, "text", "float32", "cpu")) in map(key_of, large)


# in units of hidden / 16 = 2
@pytest.mark.parametrize(
    "study, largest, freeing", [("equal_bytes", 10, set()), ("recipe", 14, {18, 24}), ("long", 14, {24})]
)
def test_8_bit_moments_come_with_the_largest_rank_that_fits(study, largest, freeing):
    asked = []
    variants = STUDIES[study].variants(TINY, lambda variant: asked.append(variant) or device_bytes(variant))
    found = {(v.fields["r"], v.per_layer) for v in variants if v.optim == "adamw_bnb_8bit"}
    assert found - {(TINY.rank, False)} == {(largest, False)} | {(r, True) for r in freeing}
    assert len(asked) <= 6 + 5 * len(freeing)


def test_s_that_fits_moves_w_as_much_at_every_rank_and_in_proportion_to_the_width():
    for hidden in (32, 512):
        size = replace(TINY, hidden=hidden)
        fields = [fitted(Variant("", "loqt", {"r": r}), size).fields for r in (2, 8, 32)]
        assert [f["loqt_alpha"] * math.sqrt(f["r"] / hidden) for f in fields] == pytest.approx(
            [16 / hidden] * 3, rel=1e-2
        )
    # what the package calls "auto"
    model = get_peft_model(tiny_model(), LoQTConfig(r=8, loqt_alpha="auto", target_modules="all-linear"))
    s = fitted(Variant("", "loqt", {"r": 8}), TINY).fields["loqt_alpha"]
    assert all(layer.scaling["default"] == pytest.approx(s, abs=5e-4) for _, layer in loqt_layers(model))
