"""What becomes of an optimizer's state when a switch gives B another value."""

import types

import bitsandbytes as bnb
import optimi
import pytest
import schedulefree
import torch
from common import TokenDataset, loqt_config, make_trainer, single_linear, tiny_llama, token_batch
from conditions import needs_torchao, optimizers, transformers_finds_schedulefree
from grokadamw import GrokAdamW
from peft import get_peft_model
from transformers import TrainerCallback

from loqt_peft import LoQTTrainerCallback
from loqt_peft.layers.find import loqt_layers
from loqt_peft.training.optimizer_state import optimizer_findings, treat_optimizer_state


pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
    pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported"),
]

NAMES = [
    "adafactor",
    "adagrad",
    "adamw_bnb_8bit",
    "adamw_torch_8bit",
    "adamw_torch_fused",
    "ademamix",
    "grokadamw",
    "lion_32bit",
    "paged_adamw_32bit",
    "rmsprop",
    "rmsprop_bnb_8bit",
    "schedule_free_adamw",
    "schedule_free_radam",
    "schedule_free_sgd",
    "sgd",
    "stable_adamw",
]
# Given to a loop of the user's own. Not among them: those that by themselves move a parameter at rate 0, since the rate is in
# their state (ASGD, Adafactor with momentum).
CLASSES = {
    "Adadelta": torch.optim.Adadelta,
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "Adan": lambda p: optimi.Adan(p, lr=0.01),
    "GrokAdamW": lambda p: GrokAdamW(p, lr=0.01),
    "LARS": lambda p: bnb.optim.LARS(p, lr=0.01, momentum=0.9),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.01),
    "RAdamScheduleFree": lambda p: schedulefree.RAdamScheduleFree(p, lr=0.01, silent_sgd_phase=False),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "Ranger": lambda p: optimi.Ranger(p, lr=0.01, k=1),
    "Rprop": torch.optim.Rprop,
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "ScheduleFreeWrapper": lambda p: schedulefree.ScheduleFreeWrapper(torch.optim.SGD(p, lr=0.1)),
    "StableAdamW, 16 bits": lambda p: optimi.StableAdamW(p, lr=0.01),
}


@pytest.fixture(autouse=True, scope="module")
def without_compilation():
    # torchao's optimizers and bitsandbytes compile for every new shape
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def loqt_model(**kwargs):
    llama = tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    return get_peft_model(llama, loqt_config(r=64, update_interval=3, **kwargs))


def all_B(model):
    return [layer.loqt_B["default"] for _, layer in loqt_layers(model)]


def change_at_rate_0(model, optimizer):
    """By how much a step of rate 0 moves any B; without gradients, which no rate would be needed for."""
    before = [B.detach().clone() for B in all_B(model)]
    assert all(B.any() for B in before)
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(0.0)
        else:
            group["lr"] = 0.0
    for B in all_B(model):
        B.grad = torch.zeros_like(B)
    optimizer.step()
    return max((B - old).abs().max().item() for B, old in zip(all_B(model), before, strict=True))


def train(model, optimizer, steps=4):
    """The last step is one with an update."""
    model.train()
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    for step in range(steps):
        model.begin_step(step)
        model(input_ids=token_batch(step), labels=token_batch(step)).loss.backward()
        optimizer.step()
        update = model.end_step(optimizer)
        optimizer.zero_grad()
    return update


class KeepOptimizer(TrainerCallback):
    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        self.optimizer = optimizer.optimizer


###############################
# A step at rate 0 after an update
###############################


@pytest.mark.parametrize("optimizer_state", ["keep", "reset"])
@pytest.mark.parametrize("optim", optimizers(NAMES))
def test_optimizers_of_the_trainer_leave_b(optim, optimizer_state):
    model, kept = loqt_model(optimizer_state=optimizer_state), KeepOptimizer()
    kwargs = {"lr_scheduler_type": "constant", "max_steps": 4, "weight_decay": 0.1}
    make_trainer(model, "unused", [LoQTTrainerCallback(), kept], optim=optim, **kwargs).train()
    assert all(layer.num_updates("default") == 2 for _, layer in loqt_layers(model))
    assert change_at_rate_0(model, kept.optimizer) == 0.0


@pytest.mark.parametrize("optimizer_state", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("name", optimizers(CLASSES))
def test_optimizers_of_a_loop_leave_b(name, optimizer_state):
    model = loqt_model(optimizer_state=optimizer_state)
    if "16 bits" in name:
        for B in all_B(model):
            B.data = B.data.bfloat16()
    optimizer = CLASSES[name](all_B(model))
    if optimizer_state == "rotate" and "ScheduleFree" in name:
        with pytest.raises(ValueError, match="optimizer_state='rotate' cannot rotate what .* between two copies of B"):
            train(model, optimizer)
        return
    assert train(model, optimizer).num_updates == 2
    assert change_at_rate_0(model, optimizer) == 0.0


def test_evaluation_of_schedule_free_leaves_b():
    model = loqt_model()
    optimizer = schedulefree.AdamWScheduleFree(all_B(model), lr=0.01)
    train(model, optimizer)
    before = [B.detach().clone() for B in all_B(model)]
    optimizer.eval()
    assert all(torch.equal(B, old) for B, old in zip(all_B(model), before, strict=True))


###############################
# Treatment
###############################


def test_average_of_asgd_starts_again():
    model = loqt_model()
    optimizer = torch.optim.ASGD(all_B(model), lr=0.1, t0=0)
    train(model, optimizer)
    assert all(torch.equal(optimizer.state[B]["ax"], B) for B in all_B(model))


def test_adagrad_is_reset_to_what_it_began_with():
    model = loqt_model(optimizer_state="reset")
    optimizer = torch.optim.Adagrad(all_B(model), lr=0.01, initial_accumulator_value=0.5)
    train(model, optimizer)
    for B in all_B(model):
        assert optimizer.state[B]["sum"].eq(0.5).all() and optimizer.state[B]["step"] == 0


def test_grokadamw_keeps_its_state_in_its_groups():
    for optimizer_state in ("reset", "rotate"):
        model = loqt_model(optimizer_state=optimizer_state)
        layer = next(layer for _, layer in loqt_layers(model))
        B, P_old = layer.loqt_B["default"], None
        optimizer = GrokAdamW(all_B(model), lr=0.01)
        train(model, optimizer, steps=3)
        model.begin_step(3)
        model(input_ids=token_batch(3), labels=token_batch(3)).loss.backward()
        optimizer.step()
        P_old = layer.projection("default")
        state = optimizer.param_groups[0]["state"]
        moments = {key: state[B][key].clone() for key in ("exp_avg", "grok_ema")}
        model.end_step(optimizer)
        if optimizer_state == "reset":
            assert not any(B in state for B in all_B(model))
            continue
        P_new = layer.projection("default")
        for key, moment in moments.items():
            assert moment.any()
            assert torch.allclose(state[B][key], moment @ P_old @ P_new.T, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("optimizer_class", [bnb.optim.RMSprop, bnb.optim.Adagrad])
def test_squares_are_not_rotated(optimizer_class):
    # they are the first state of these, and must not get a sign
    model = loqt_model(optimizer_state="rotate")
    optimizer = optimizer_class(all_B(model), lr=0.01)
    train(model, optimizer)
    assert all(optimizer.state[B]["state1"].min() >= 0 for B in all_B(model))
    assert all(optimizer.state[B]["state1"].max() > 0 for B in all_B(model))


@needs_torchao
def test_rotation_of_torchao_moments():
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    model = loqt_model(optimizer_state="rotate")
    optimizer = AdamW8bit(all_B(model), lr=0.01)
    train(model, optimizer, steps=3)
    model.begin_step(3)
    model(input_ids=token_batch(3), labels=token_batch(3)).loss.backward()
    optimizer.step()
    layer = next(layer for _, layer in loqt_layers(model))
    state, P_old = optimizer.state[layer.loqt_B["default"]], layer.projection("default")
    assert isinstance(state["exp_avg"], OptimState8bit)
    moment = state["exp_avg"].dequantize().clone()
    model.end_step(optimizer)
    expected = moment @ P_old @ layer.projection("default").T
    assert isinstance(state["exp_avg"], OptimState8bit)
    assert (state["exp_avg"].dequantize() - expected).norm() <= 0.03 * expected.norm() > 0


def test_every_optimizer_of_torch_is_known():
    # one that a later torch brings shows itself here
    for name in torch.optim.__all__:
        optimizer_class = getattr(torch.optim, name)
        # these work on the whole model's vector, or on sparse gradients
        if name in ("Optimizer", "LBFGS", "SparseAdam") or not isinstance(optimizer_class, type):
            continue
        p = torch.nn.Parameter(torch.ones(4, 4))
        optimizer = optimizer_class([p], lr=0.1)
        for _ in range(2):
            p.grad = torch.ones(4, 4)
            optimizer.step()
        layer = types.SimpleNamespace(
            loqt_B={"default": p}, config={"default": types.SimpleNamespace(optimizer_state="keep")}
        )
        assert optimizer_findings([("layer", layer)], "default", optimizer) == [], name


###############################
# Refusals and warnings
###############################


class SlowWeights(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("anchor", p.detach().clone())


def test_unknown_state_is_named_once():
    model = loqt_model()
    optimizer = SlowWeights(all_B(model), lr=0.1)
    with pytest.warns(UserWarning, match="SlowWeights keeps 'anchor' of B, in the shape of B.*'reset'") as recorded:
        train(model, optimizer)
    assert sum("SlowWeights" in str(warning.message) for warning in recorded) == 1
    # who asks is told, as often as he asks
    for _ in range(2):
        found = optimizer_findings(list(loqt_layers(model)), "default", optimizer)
        assert [finding.code for finding in found] == ["unknown_optimizer_state"]


def test_the_step_of_an_optimizer_is_no_state_of_a_b_of_one_element():
    model, layer = single_linear(torch.ones(1, 1), r=1, optimizer_state="keep")
    optimizer = torch.optim.AdamW(layer.loqt_B.parameters())
    for step in range(2):
        model.begin_step(step)
        model(torch.ones(3, 1)).sum().backward()
        optimizer.step()
        assert optimizer_findings(list(loqt_layers(model)), "default", optimizer) == []
        model.end_step(optimizer)


@pytest.mark.parametrize("optimizer_state", ["reset", "rotate"])
def test_update_without_the_optimizer(optimizer_state):
    model = loqt_model(optimizer_state=optimizer_state)
    model.begin_step(0)
    model(input_ids=token_batch(), labels=token_batch()).loss.backward()
    with pytest.warns(UserWarning, match=f"optimizer_state='{optimizer_state}' has no effect"):
        model.end_step()


@transformers_finds_schedulefree
def test_rotated_copies_are_refused_at_the_start():
    trainer = make_trainer(
        loqt_model(optimizer_state="rotate"), "unused", [LoQTTrainerCallback()], optim="schedule_free_adamw"
    )
    with pytest.raises(ValueError, match="AdamWScheduleFree has of a first moment"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_centered_rmsprop_cannot_be_rotated():
    model = loqt_model(optimizer_state="rotate")
    optimizer = torch.optim.RMSprop(all_B(model), centered=True)
    with pytest.raises(ValueError, match="centered RMSprop"):
        train(model, optimizer)


@pytest.mark.parametrize(
    "optim",
    [
        "apollo_adamw",
        "apollo_adamw_layerwise",
        "galore_adafactor",
        "galore_adamw",
        "galore_adamw_layerwise",
    ],
)
def test_low_rank_optimizers_are_refused(optim):
    trainer = make_trainer(
        loqt_model(), "unused", [LoQTTrainerCallback()], optim=optim, optim_target_modules="all-linear"
    )
    with pytest.raises(ValueError, match="GaLore and APOLLO .* do not see B.*Use optim='adamw_torch'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_low_rank_group_of_b_is_refused():
    from galore_torch import GaLoreAdamW

    model = loqt_model()
    group = {"params": all_B(model), "rank": 4, "update_proj_gap": 10, "scale": 0.25, "proj_type": "std"}
    with pytest.warns(FutureWarning):
        optimizer = GaLoreAdamW([group], lr=0.01)
    with pytest.raises(ValueError, match="makes a low rank of the gradients of B"):
        train(model, optimizer)


def optimizer_like(name, module, model, **attributes):
    """One that does not exist on this machine's devices."""
    optimizer = type(name, (torch.optim.SGD,), {"__module__": module})(all_B(model), lr=0.1)
    vars(optimizer).update(attributes)
    return optimizer


def test_copy_on_the_host_is_refused():
    model = loqt_model()
    optimizer = optimizer_like("CPUOffloadOptimizer", "torchao.optim.cpu_offload", model)
    with pytest.raises(ValueError, match="steps a copy of B on the CPU"):
        train(model, optimizer)


def test_moments_apart_from_the_parameters_cannot_be_reset():
    model = loqt_model(optimizer_state="reset")
    optimizer = optimizer_like("AdaLomo", "lomo_optim.adalomo", model, exp_avg_sq_row={})
    with pytest.raises(ValueError, match="optimizer_state='reset' cannot reset AdaLomo"):
        train(model, optimizer)


def test_lomo_equals_sgd():
    # it steps within the backward pass that gradients are captured in
    states = []
    for optim in ("lomo", "sgd"):
        model = loqt_model(quantize_weight=None, quantize_projection=None)
        kwargs = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 1.0, "max_steps": 6}
        make_trainer(
            model, "unused", [LoQTTrainerCallback()], dataset=TokenDataset(), optim=optim, weight_decay=0.0, **kwargs
        ).train()
        states.append([layer.effective_weight("default") for _, layer in loqt_layers(model)])
    for lomo, sgd in zip(*states, strict=True):
        assert torch.linalg.norm(lomo - sgd) <= 1e-5 * torch.linalg.norm(sgd)


def test_a_switch_forgets_nothing_of_other_parameters():
    model = loqt_model(optimizer_state="reset", full_rank_modules="all")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer)
    held = {id(p) for p in optimizer.state}
    assert not any(id(B) in held for B in all_B(model))
    assert id(model.get_base_model().get_input_embeddings().weight) in held


def test_treatment_of_a_wrapped_optimizer():
    model = loqt_model(optimizer_state="reset")
    optimizer = torch.optim.AdamW(all_B(model))
    train(model, optimizer, steps=2)
    layer = next(layer for _, layer in loqt_layers(model))
    treat_optimizer_state(layer, "default", types.SimpleNamespace(optimizer=optimizer))
    assert layer.loqt_B["default"] not in optimizer.state
