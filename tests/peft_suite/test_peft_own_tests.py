"""PEFT's own tests of custom models, run with LoQT. The bodies are PEFT's; see adoption.py, cases.py and driving.py.

Each class comes twice. In the first, adapters are as `get_peft_model` makes them, and a body that trains does the
first switch on its way. In the one named Drifted, every adapter has gone through two switches before the body gets it,
and every second step of training is another one.
"""

import functools

import pytest
import torch

from loqt_peft import LoQTConfig
from loqt_peft.layers.layer import LoQTLayer

from . import cases
from .adoption import CaseLists, adopt, exchanged_tests, load, with_marks
from .driving import driven


custom = load("test_custom_models")
common = load("testing_common")

# These begin with "a new adapter gives the base model's output", train for three steps, and compare again. In the
# drifted classes the switches take place in those steps, in the first and the last, rather than before all of them.
STARTS_FROM_IDENTITY = {"test_disable_adapters", "test_disable_adapters_with_merging"}

# The bodies of these skip themselves or are about what LoQT has no equivalent of.
NOT_APPLICABLE = {
    # The body's first lines skip it whatever the config class is.
    "test_disable_adapter_with_bias_warns",
    # Training of biases is an option of LoRA and BOFT; both bodies skip themselves where the config has no `bias`.
    "test_adding_multiple_adapters_with_bias_raises",
    "test_save_load_roundtrip_fsdp_wrapped_learnable_bias",
    # Takes a list of config classes, but makes LoRA adapters whichever it gets, for LoRA's `add_weighted_adapter`.
    "test_add_weighted_adapter_cat_with_rank_pattern",
    # Expect an error where `target_modules` is missing and no default is known; LoQT then targets all linear layers,
    # as OSF does, whose test of that is adopted below.
    "test_default_target_modules_not_set_raises",
    "test_default_target_modules_not_set_model_type_set_raises",
    # Put an entry in the tables of default target modules of LoRA and DeLoRA.
    "test_default_target_modules_list_of_str",
    "test_default_target_modules_str",
}


# These save an adapter and load it into another model of the same class, with other random weights.
ANOTHER_BASE = {
    "test_loading_model_requires_grad_set_correctly",
    "test_loading_model_with_modules_to_save_requires_grad_set_correctly",
    "test_ignore_mismatched_sizes_with_scalar_modules_to_save",
}


@pytest.fixture(autouse=True)
def same_base(request, monkeypatch):
    # LoQT refuses that, so there the weights of an nn.Linear follow from its shape.
    if request.function.__name__ not in ANOTHER_BASE:
        return
    reset_parameters = torch.nn.Linear.reset_parameters

    def seeded(linear):
        torch.manual_seed(0)
        reset_parameters(linear)

    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", seeded)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    # PEFT looks up the names of the models, such as "MLP", on the Hub.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="module")
def without_compilation():
    # bitsandbytes compiles its dequantization for every new shape, which takes longer than all the tests of that shape.
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True)
def training_loop(request, monkeypatch):
    if not getattr(request.cls, "driven", True):
        yield
        return
    drifted = getattr(request.cls, "drifted", False) and request.function.__name__ not in STARTS_FROM_IDENTITY
    with driven(monkeypatch, [custom, common], drifted=drifted):
        yield


def _keep(test, row):
    if test == "test_adapter_dtype_autocast":
        # Twelve variants of each row; what they can depend on is how the tensors are stored.
        return row.id in cases.FORMATS
    if test == "test_active_adapter":
        # The body skips itself there: PEFT has no several active adapters with `modules_to_save`.
        return "modules_to_save" not in row.values[3]
    return True


def _lists(drifted):
    often = functools.partial(LoQTConfig, **cases.OFTEN)
    config_class = pytest.param(often if drifted else LoQTConfig, id="LoQTConfig")
    return CaseLists(
        [
            (custom.TEST_CASES, cases.single(drifted)),
            (custom.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES, cases.pairs(drifted)),
            (custom.ALL_PEFT_CONFIG_CLASSES, [config_class]),
        ],
        [config_class],
        _keep,
    )


def _parametrized(name, cls, drifted, **attributes):
    tests = exchanged_tests(cls, _lists(drifted))
    tests = {key: test for key, test in tests.items() if key not in NOT_APPLICABLE}
    return adopt(name, cls, tests, drifted=drifted, **attributes)


class Models(custom.MockTransformerWrapper):
    @classmethod
    def from_pretrained(cls, model_id, dtype=None):
        if model_id != "MLPNoBias":
            return super().from_pretrained(model_id, dtype=dtype)
        torch.manual_seed(0)
        return custom.MLP(bias=False).to(dtype or torch.float32)


TestCustomModel = _parametrized("TestCustomModel", custom.TestPeftCustomModel, False, transformers_class=Models)
TestCustomModelDrifted = _parametrized(
    "TestCustomModelDrifted", custom.TestPeftCustomModel, True, transformers_class=Models
)
TestActiveAdapters = _parametrized("TestActiveAdapters", custom.TestMultipleActiveAdapters, False)
TestActiveAdaptersDrifted = _parametrized("TestActiveAdaptersDrifted", custom.TestMultipleActiveAdapters, True)
TestGrad = _parametrized("TestGrad", custom.TestRequiresGrad, False)
TestGradDrifted = _parametrized("TestGradDrifted", custom.TestRequiresGrad, True)
TestFsdp = _parametrized("TestFsdp", custom.TestPeftFsdpStateDict, False, transformers_class=Models)
TestFsdpDrifted = _parametrized("TestFsdpDrifted", custom.TestPeftFsdpStateDict, True, transformers_class=Models)


# Trained by a plain loop that never calls LoQT, an adapter made at random is an ordinary one: P is there, B learns.
WITHOUT_CALLBACK = [
    "test_training_custom_models",
    "test_only_params_are_updated",
    "test_parameters_after_loading_model",
    "test_inference_safetensors",
]


def _without_callback():
    rows = [
        pytest.param(*row.values[:3], {**row.values[3], "init_weights": False}, id=row.id)
        for row in cases.single(False)
    ]
    tests = exchanged_tests(custom.TestPeftCustomModel, CaseLists([(custom.TEST_CASES, rows)]))
    tests = {name: tests[name] for name in WITHOUT_CALLBACK}
    return adopt("TestWithoutCallback", custom.TestPeftCustomModel, tests, transformers_class=Models, driven=False)


TestWithoutCallback = _without_callback()


# Bodies that make adapters of one fixed tuner, though what they check holds for any: the name they call the config
# class by means LoQTConfig while they run.
FIXED_TUNER = {
    custom.TestPeftCustomModel: [
        "test_delete_adapter_with_multiple_adapters_works",
        "test_delete_adapter_multiple_adapters_with_modules_to_save",
        "test_weight_bias_attributes",
        "test_existing_model_card",
        "test_non_existing_model_card",
        "test_ignore_mismatched_sizes_with_scalar_modules_to_save",
        "test_adapter_name_makes_no_difference",
    ],
    custom.TestRequiresGrad: [
        "test_requires_grad_modules_to_save_default",
        "test_requires_grad_modules_to_save_disabling",
        "test_requires_grad_modules_to_save_multiple_adapters",
        "test_requires_grad_follows_inference_mode_modules_to_save",
        "test_requires_grad_lora_different_targets",
        "test_requires_grad_lora_same_targets",
        "test_requires_grad_fourierft_different_targets",
        "test_requires_grad_fourierft_same_targets",
    ],
    custom.TestDefaultTargetModules: ["test_default_target_modules_osf"],
}


def _config_in_the_place_of_others(**kwargs):
    kwargs.pop("n_frequency", None)
    if "init_lora_weights" in kwargs:
        kwargs["init_weights"] = kwargs.pop("init_lora_weights")
    return LoQTConfig(**kwargs, **cases.OFTEN)


@pytest.fixture
def loqt_by_other_names(monkeypatch):
    for name in ("LoraConfig", "FourierFTConfig", "OSFConfig"):
        monkeypatch.setattr(custom, name, _config_in_the_place_of_others)


def _check_requires_grad(self, model, *params_expected):
    # LoQT's only parameter of a layer in the place of LoRA's two, or of FourierFT's one.
    expected = {
        name.replace("lora_A.", "loqt_B.").replace("lora_B.", "loqt_B.").replace("fourierft_spectrum.", "loqt_B.")
        for name in params_expected
    }
    expected = {name.removesuffix(".weight") if "loqt_B." in name else name for name in expected}
    custom.TestRequiresGrad.check_requires_grad(self, model, *expected)


def _fixed_tuner(cls, drifted):
    name = cls.__name__ + "FixedTuner" + ("Drifted" if drifted else "")
    row = pytest.param(_config_in_the_place_of_others(target_modules=["lin0"], init_weights=False), id="LoQTConfig")
    tests = {}
    for key in FIXED_TUNER[cls]:
        test = getattr(cls, key)
        marks = [pytest.mark.usefixtures("loqt_by_other_names").mark]
        if key == "test_adapter_name_makes_no_difference":
            marks.append(pytest.mark.parametrize("config0", [row]).mark)
        tests[key] = with_marks(test, marks)
    more = {"check_requires_grad": _check_requires_grad} if hasattr(cls, "check_requires_grad") else {}
    return adopt(name, cls, tests, drifted=drifted, **more)


TestCustomModelFixedTuner = _fixed_tuner(custom.TestPeftCustomModel, False)
TestCustomModelFixedTunerDrifted = _fixed_tuner(custom.TestPeftCustomModel, True)
TestGradFixedTuner = _fixed_tuner(custom.TestRequiresGrad, False)
TestGradFixedTunerDrifted = _fixed_tuner(custom.TestRequiresGrad, True)
TestTargetModulesFixedTuner = _fixed_tuner(custom.TestDefaultTargetModules, False)


def test_nothing_is_left_out():
    # A later PEFT may bring new tests, classes of tests or lists of cases.
    adopted = [cls for cls in globals().values() if hasattr(cls, "adopted_from")]

    for cls in vars(custom).values():
        if not getattr(cls, "__name__", "").startswith("Test"):
            continue
        for name in set(exchanged_tests(cls, _lists(False))) - NOT_APPLICABLE:
            takers = [ours for ours in adopted if ours.adopted_from is cls and getattr(ours, name)]
            assert len(takers) >= 2, f"{cls.__name__}.{name} is not run"
    assert NOT_APPLICABLE <= {name for cls in vars(custom).values() for name in dir(cls) if name.startswith("test")}


@pytest.mark.parametrize("test_name, model_id, config_cls, config_kwargs", cases.single(True))
def test_drifted_adapters_have_switched(test_name, model_id, config_cls, config_kwargs, monkeypatch):
    # What the drifted classes stand on: without it they would pass for the wrong reason.
    model = Models.from_pretrained(model_id).eval()
    inputs = custom.TestPeftCustomModel().prepare_inputs_for_testing()
    base_output = model(**inputs)
    with driven(monkeypatch, [custom], drifted=True):
        model = custom.get_peft_model(model, config_cls(**config_kwargs))
        model.add_adapter("other", config_cls(**config_kwargs))
    layers = [module for module in model.modules() if isinstance(module, LoQTLayer)]
    assert layers
    for layer in layers:
        assert layer.num_updates("default") == layer.num_updates("other") == 2
    for adapter_name in ("default", "other"):
        model.set_adapter(adapter_name)
        assert not torch.allclose(model(**inputs), base_output)
    with model.disable_adapter():
        assert torch.equal(model(**inputs), base_output)


def test_training_loops_switch(monkeypatch):
    with driven(monkeypatch, [custom], drifted=False):
        model = custom.get_peft_model(Models.from_pretrained("MLP"), LoQTConfig(target_modules=["lin0"], r=4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(9, 10)).sum().backward()
            optimizer.step()
    assert model.base_model.model.lin0.num_updates("default") == 1
