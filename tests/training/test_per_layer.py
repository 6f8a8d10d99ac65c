"""Per-layer updates move the parameters to the same bits as the ordinary optimizer, and refuse what they cannot do."""

import gc
import types
import weakref

import bitsandbytes as bnb
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from common import TokenDataset, loqt_config, make_trainer, tiny_llama
from conditions import TRAINER_LOGS_NORMS_WITHOUT_CLIPPING
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from loqt_peft import LoQTTrainerCallback, PerformanceCallback, per_layer, per_layer_optimizer
from loqt_peft.training.per_layer import check_training_arguments, remove_hooks


@pytest.fixture(autouse=True)
def as_it_begins():
    # a Trainer leaves behind whether its last backward ended a step, and the overrides of bitsandbytes
    GradientState()._set_sync_gradients(True)
    bnb.optim.GlobalOptimManager.get_instance().initialize()


###############################
# With the Trainer
###############################


class GradientsInBackward(TrainerCallback):
    """Counts how many gradients the model holds at once, on steps of one micro-batch."""

    most = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        parameters = [p for p in model.parameters() if p.requires_grad]
        for p in parameters:
            p.register_hook(lambda grad: setattr(self, "most", max(self.most, 1 + sum_of_gradients(parameters))))


def sum_of_gradients(parameters):
    return sum(p.grad is not None for p in parameters)


def run(folder, per_layer_updates, config=None, llama=None, loqt=True, resume=None, callbacks=(), **kwargs):
    """Train for five steps, the last of them a short one; everything that training left behind."""
    bnb.optim.GlobalOptimManager.get_instance().initialize()
    model = tiny_llama(**{"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, **(llama or {})})
    callback = PerformanceCallback()
    if loqt:
        config = {"r": 4, "update_interval": 2, "full_rank_modules": "all", **(config or {})}
        model, callback = get_peft_model(model, loqt_config(**config)), LoQTTrainerCallback()
    defaults = {"max_grad_norm": 0.0, "max_steps": -1, "num_train_epochs": 1, "logging_steps": 1, "weight_decay": 0.1}
    accumulation = kwargs.get("gradient_accumulation_steps", 1)
    dataset = TokenDataset(4 * (4 * accumulation + 1))
    trainer = make_trainer(model, folder, [callback, *callbacks], dataset, **{**defaults, **kwargs})
    if per_layer_updates:
        trainer.optimizer_cls_and_kwargs = per_layer_optimizer(trainer.args)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == 5
    figures = ("step", "loss", "learning_rate", "grad_norm", "loqt/updates", "loqt/gradient_energy")
    history = [{key: entry[key] for key in figures if key in entry} for entry in trainer.state.log_history]
    norms = [entry.pop("grad_norm") for entry in history if "grad_norm" in entry]
    return model.state_dict(), trainer.optimizer.state_dict(), history, norms


def assert_same(actual, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        for this, that in zip(actual, expected, strict=True):
            assert_same(this, that)
    else:
        assert actual == expected


def tensors_of(state):
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_of(value)]
    return [state] if isinstance(state, torch.Tensor) else []


# large enough for bitsandbytes to keep 8-bit states: 64 x 64 numbers
LARGE = {"llama": {"hidden_size": 64}, "config": {"r": 64}}


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"optim": "adamw_torch"},
        {"optim": "adamw_bnb_8bit", "gradient_accumulation_steps": 2, **LARGE},
        {"optim": "paged_adamw_8bit", **LARGE},
        {"config": {"optimizer_state": "reset"}},
        {"config": {"optimizer_state": "rotate"}},
        {"optim": "adamw_bnb_8bit", "llama": {"hidden_size": 64}, "config": {"r": 64, "optimizer_state": "rotate"}},
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"loqt": False},
        {"loqt": False, "optim": "adamw_bnb_8bit", "llama": {"hidden_size": 64}},
        {"loqt": False, "llama": {"tie_word_embeddings": True}},
        {"loqt": False, "llama": {"tie_word_embeddings": True}, "gradient_checkpointing": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_same_bits_as_the_ordinary_optimizer(tmp_path, case):
    *expected, expected_norms = run(tmp_path, False, **case)
    *actual, norms = run(tmp_path, True, **case)
    assert_same(actual, expected)
    dtypes = {v.dtype for state in actual[1]["state"].values() for v in tensors_of(state)}
    assert (torch.uint8 in dtypes) is ("8bit" in case.get("optim", ""))
    # norms of the same gradients, summed in another order
    if TRAINER_LOGS_NORMS_WITHOUT_CLIPPING:
        assert norms == pytest.approx(expected_norms, rel=1e-6)
    assert len(norms) == 5 and min(norms) > 0


# right before an update, and right after one
@pytest.mark.parametrize("optim, steps", [("adamw_torch_fused", (2, 3)), ("adamw_bnb_8bit", (3,))])
def test_checkpoints_are_those_of_the_ordinary_optimizer(tmp_path, optim, steps):
    case = {"optim": optim, "save_steps": 1, **(LARGE if "bnb" in optim else {})}
    expected = run(tmp_path / "ordinary", False, save_strategy="steps", **case)
    run(tmp_path / "per-layer", True, save_strategy="steps", **case)
    for saved_by in ("ordinary", "per-layer"):
        for resumed_per_layer in (False, True):
            for step in steps:
                path = str(tmp_path / saved_by / f"checkpoint-{step}")
                *actual, norms = run(tmp_path / "resumed", resumed_per_layer, resume=path, **case)
                assert_same(actual, expected[:3])
                if TRAINER_LOGS_NORMS_WITHOUT_CLIPPING:
                    assert norms == pytest.approx(expected[3], rel=1e-6)


class InterruptOnce(TrainerCallback):
    """Ctrl-C in the middle of the fourth backward."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3 and not hasattr(self, "handle"):
            parameters = [p for p in model.parameters() if p.requires_grad]
            self.handle = parameters[len(parameters) // 2].register_hook(self.interrupt)

    def interrupt(self, grad):
        self.handle.remove()
        raise KeyboardInterrupt


def test_interrupted_training_goes_on_from_its_checkpoint_only(tmp_path):
    trainers = []
    for callbacks in ([], [InterruptOnce()]):
        model = get_peft_model(tiny_llama(), loqt_config(update_interval=2, full_rank_modules="all"))
        trainer = make_trainer(
            model,
            tmp_path,
            [LoQTTrainerCallback(), *callbacks],
            max_steps=5,
            max_grad_norm=0.0,
            save_strategy="steps",
            save_steps=1,
        )
        trainer.optimizer_cls_and_kwargs = per_layer_optimizer(trainer.args)
        trainers.append(trainer)
    straight, interrupted = trainers
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    half = state_of(interrupted.model)
    with pytest.raises(RuntimeError, match="load the last checkpoint"):
        interrupted.train()
    assert_same(state_of(interrupted.model), half)
    interrupted.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(state_of(interrupted.model), state_of(straight.model))
    assert_same(interrupted.optimizer.state_dict(), straight.optimizer.state_dict())


def test_one_gradient_at_a_time(tmp_path):
    ordinary, layer_by_layer = GradientsInBackward(), GradientsInBackward()
    run(tmp_path, False, callbacks=[ordinary])
    run(tmp_path, True, callbacks=[layer_by_layer])
    # 7 matrices B, 3 norms, embeddings and head
    assert (ordinary.most, layer_by_layer.most) == (12, 1)


###############################
# In a loop
###############################


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def backward(net, seed=0):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    net(x).square().sum().backward()


def state_of(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


OPTIMIZERS = [torch.optim.AdamW, torch.optim.Adam, bnb.optim.AdamW8bit, bnb.optim.PagedAdamW8bit, bnb.optim.Lion]


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS, ids=lambda cls: cls.__name__)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_loop_of_ones_own(optimizer_class):
    nets, norms = [], []
    for cls in (optimizer_class, per_layer(optimizer_class)):
        net = small_net()
        optimizer = cls(net.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(3):
            backward(net, step)
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        nets.append(state_of(net))
    assert_same(nets[1], nets[0])
    assert norms[3:] == [0, 0, 0]
    assert torch.allclose(optimizer.grad_norm, norms[2], rtol=1e-6)


def test_closure():
    nets = []
    for cls in (torch.optim.AdamW, per_layer(torch.optim.AdamW)):
        net = small_net()

        def closure(net=net):
            backward(net)
            return 7

        assert cls(net.parameters(), lr=0.1).step(closure) == 7
        nets.append(state_of(net))
    assert_same(nets[1], nets[0])
    assert not torch.equal(nets[0]["0.weight"], small_net()[0].weight)


def test_hooks_on_the_step_run_once_a_step():
    class AdamW(torch.optim.AdamW):
        pass

    # torch hooks the step of a class when it is first instantiated
    AdamW([nn.Parameter(torch.zeros(1))])
    net = small_net()
    optimizer = per_layer(AdamW)(net.parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    backward(net)
    assert calls == []
    optimizer.step()
    assert calls == ["pre", "post"]


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, bnb.optim.AdamW8bit])
def test_step_steps_what_no_hook_stepped(optimizer_class):
    results = []
    for cls in (optimizer_class, per_layer(optimizer_class)):
        net = small_net()
        # no hook: it did not require a gradient
        net[0].bias.requires_grad_(False)
        optimizer = cls(net.parameters(), lr=0.1)
        net[0].bias.requires_grad_(True)
        # no call of the hook: it had no gradient in the last micro-batch
        GradientState()._set_sync_gradients(False)
        backward(net, 0)
        GradientState()._set_sync_gradients(True)
        net[2](torch.ones(1, 8)).sum().backward()
        left = sum_of_gradients(net.parameters())
        optimizer.step()
        results.append(state_of(net))
    assert left == 2
    assert_same(results[1], results[0])
    assert optimizer.grad_norm > 0


def test_overrides_of_bitsandbytes_are_respected():
    for cls in (bnb.optim.AdamW, per_layer(bnb.optim.AdamW)):
        bnb.optim.GlobalOptimManager.get_instance().initialize()
        net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        optimizer = cls([{"params": [net[1].weight]}, {"params": [net[0].bias, net[0].weight]}], optim_bits=8)
        optimizer.mng.register_module_override(net[0], "weight", {"optim_bits": 32})
        net(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        dtypes = [optimizer.state[layer.weight]["state1"].dtype for layer in net]
        assert dtypes == [torch.float32, torch.uint8]


def test_the_newest_optimizer_steps_and_a_dead_one_does_not():
    net = small_net()
    old = per_layer(torch.optim.AdamW)(net.parameters(), lr=0.1)
    new = per_layer(torch.optim.AdamW)(net.parameters(), lr=0.1)
    backward(net)
    assert len(new.state) == 4 and len(old.state) == 0

    reference = weakref.ref(new)
    del new
    gc.collect()
    assert reference() is None
    before = state_of(net)
    backward(net)
    assert_same(state_of(net), before)
    assert sum_of_gradients(net.parameters()) == 4

    old.register_hooks()
    backward(net)
    assert len(old.state) == 4
    remove_hooks(net.parameters())
    backward(net)
    assert sum_of_gradients(net.parameters()) == 4


def test_an_ordinary_optimizer_after_a_per_layer_one(tmp_path):
    model = get_peft_model(tiny_llama(), loqt_config())
    first = make_trainer(model, tmp_path, [LoQTTrainerCallback()], max_grad_norm=0.0, max_steps=1)
    first.optimizer_cls_and_kwargs = per_layer_optimizer(first.args)
    first.train()
    second = make_trainer(model, tmp_path, [LoQTTrainerCallback()], max_steps=2)
    second.train()
    assert len(second.optimizer.state) == 14


def test_model_with_hooks_can_be_pickled(tmp_path):
    net = small_net()
    optimizer = per_layer(torch.optim.AdamW)(net.parameters())
    torch.save(net, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    backward(loaded)
    assert len(optimizer.state) == 0


###############################
# A second gradient
###############################


class Interrupt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise KeyboardInterrupt


def test_interrupted_backward_does_not_step_twice():
    net = small_net()
    optimizer = per_layer(torch.optim.AdamW)(net.parameters())
    saved = optimizer.state_dict()
    with pytest.raises(KeyboardInterrupt):
        net[2](Interrupt.apply(net[:2](torch.ones(1, 4)))).sum().backward()
    half = state_of(net)
    assert len(optimizer.state) == 2
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="load the last checkpoint"):
        backward(net)
    assert_same(state_of(net), half)

    # both ways on
    optimizer.zero_grad()
    optimizer.step()
    assert_same(state_of(net), half)
    backward(net)
    optimizer.load_state_dict(saved)
    backward(net)
    optimizer.step()


def test_second_backward_in_one_step_is_refused():
    net = small_net()
    optimizer = per_layer(torch.optim.AdamW)(net.parameters())
    backward(net)
    with pytest.raises(RuntimeError, match="sum of the losses"):
        backward(net)
    optimizer.zero_grad()
    optimizer.step()
    backward(net)
    # as a gradient that no hook saw
    net[0].bias.grad = torch.ones(8)
    with pytest.raises(RuntimeError, match="second gradient"):
        optimizer.step()


def shared_segments(use_reentrant, cls):
    net = nn.Linear(4, 4, bias=False)
    nn.init.eye_(net.weight)
    optimizer = cls(net.parameters(), lr=0.1)
    x = torch.ones(1, 4, requires_grad=True)
    for _ in range(2):
        x = checkpoint(net, x, use_reentrant=use_reentrant)
    x.square().sum().backward()
    optimizer.step()
    return net.weight


def test_parameter_shared_by_checkpointed_segments():
    expected = shared_segments(False, torch.optim.AdamW)
    assert torch.equal(shared_segments(False, per_layer(torch.optim.AdamW)), expected)
    with pytest.raises(RuntimeError, match="'use_reentrant': False"):
        shared_segments(True, per_layer(torch.optim.AdamW))


###############################
# Refusals
###############################


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.LBFGS, per_layer(torch.optim.AdamW), "adamw_torch"])
def test_classes_that_are_refused(cls):
    with pytest.raises(ValueError, match="optimizer_class=.* is not allowed"):
        per_layer(cls)


def arguments(tmp_path, **kwargs):
    return make_trainer(tiny_llama(), tmp_path, **{"max_grad_norm": 0.0, **kwargs}).args


def test_optim_that_is_refused(tmp_path):
    with pytest.raises(ValueError, match="optim='adafactor'"):
        per_layer_optimizer(arguments(tmp_path, optim="adafactor"))


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 .* Set max_grad_norm=0"),
        ({"fp16": True}, "fp16=True .* Use bf16=True"),
        ({"world_size": 2}, "2 processes"),
        ({"auto_find_batch_size": True}, "per_device_train_batch_size"),
    ],
)
def test_arguments_that_are_refused(changes, match):
    allowed = {"max_grad_norm": 0.0, "fp16": False, "world_size": 1, "auto_find_batch_size": False}
    check_training_arguments(types.SimpleNamespace(**allowed))
    with pytest.raises(ValueError, match=match):
        per_layer_optimizer(types.SimpleNamespace(**{**allowed, **changes}))


@pytest.mark.parametrize("loqt", [True, False])
def test_clipping_is_refused_when_training_begins(tmp_path, loqt):
    model = get_peft_model(tiny_llama(), loqt_config()) if loqt else tiny_llama()
    trainer = make_trainer(model, tmp_path, [LoQTTrainerCallback() if loqt else PerformanceCallback()])
    trainer.optimizer_cls_and_kwargs = (per_layer(torch.optim.AdamW), {"lr": 0.01})
    before = state_of(model)
    with pytest.raises(ValueError, match="max_grad_norm=1.0"):
        trainer.train()
    assert_same(state_of(model), before)


def test_gradient_scaler_is_refused(monkeypatch):
    net = small_net()
    for cls in (torch.optim.AdamW, bnb.optim.AdamW8bit):
        optimizer = per_layer(cls)(net.parameters())
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(net(torch.ones(1, 4)).sum()).backward()
        with pytest.raises(ValueError, match="GradScaler is not allowed"):
            scaler.step(optimizer)

    Accelerator(cpu=True)
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
    with pytest.raises(ValueError, match="mixed_precision='fp16'"):
        per_layer(torch.optim.AdamW)(net.parameters())


def test_several_processes_are_refused(monkeypatch):
    net = small_net()
    optimizer = per_layer(torch.optim.AdamW)(net.parameters())
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    before = state_of(net)
    with pytest.raises(ValueError, match="2 processes.*before they are averaged"):
        backward(net)
    assert_same(state_of(net), before)
    with pytest.raises(ValueError, match="2 processes"):
        per_layer(torch.optim.AdamW)(net.parameters())
    assert optimizer.grad_norm is None
