"""The callback in the stock Trainer."""

import json
import types
import warnings

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from common import TokenDataset, loqt_config, make_trainer, tiny_llama, token_batch
from conditions import needs_tensorboard
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import TrainerCallback
from transformers.training_args import ParallelMode

from loqt_peft import LoQTConfig, LoQTTrainerCallback, PerformanceCallback
from loqt_peft.algorithm import switch
from loqt_peft.health import trainer_findings
from loqt_peft.layers import stopwatch
from loqt_peft.layers.capture import GradientCapture
from loqt_peft.layers.find import loqt_layers
from loqt_peft.layers.linear import Linear
from loqt_peft.training import performance


LOGGED = {
    "loqt/updates",
    "loqt/merged_change",
    "loqt/quantization_error_before",
    "loqt/quantization_error_after",
    "loqt/gradient_energy",
    "loqt/seconds",
}


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def loqt_model(**kwargs):
    return get_peft_model(tiny_llama(), loqt_config(**kwargs))


def events_in(folder):
    """What the Trainer wrote for tensorboard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(folder.rglob("events.out.tfevents*"))))
    events.Reload()
    return events


def adapter_state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "loqt" in k}


def updates_of(trainer):
    return [entry for entry in trainer.state.log_history if "loqt/updates" in entry]


@needs_tensorboard
def test_updates_happen_on_schedule_and_are_logged(tmp_path, capsys):
    model = loqt_model(update_interval=3, interval_schedule="exponential", interval_growth=2.0)
    trainer = make_trainer(
        model,
        tmp_path,
        [LoQTTrainerCallback()],
        max_steps=14,
        logging_steps=4,
        report_to="tensorboard",
    )
    trainer.train()
    entries = updates_of(trainer)
    # T = 0, 4, 9; an update of step t is logged when step t + 1 begins to count
    assert [entry["step"] for entry in entries] == [1, 5, 10]
    assert [entry["loqt/updates"] for entry in entries] == [1, 2, 3]
    # the first one merges nothing
    assert LOGGED - {"loqt/merged_change"} <= set(entries[0]) and all(LOGGED <= set(entry) for entry in entries[1:])
    assert all(entry["loqt/quantization_error_after"] < entry["loqt/quantization_error_before"] for entry in entries)
    assert all(0 < entry["loqt/gradient_energy"] <= 1 for entry in entries)
    assert "loqt/merged_change" not in entries[0] and entries[1]["loqt/merged_change"] > 0
    # as the console prints them, and as programs read them
    assert repr(entries[0]["loqt/updates"]) == "1 (P taken)" and json.dumps(entries[0]["loqt/updates"]) == "1"
    memory = next(e["loqt/peak_resident_memory"] for e in trainer.state.log_history if "loss" in e)
    assert repr(memory) == f"{memory / 2**20:,.0f} MiB" and json.dumps(memory).isdigit()
    # the Trainer's own logs are still there, on steps with an update too
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == [4, 8, 12]

    events = events_in(tmp_path)
    assert [event.step for event in events.Scalars("train/loqt/gradient_energy")] == [1, 5, 10]
    assert "LoQT: 14 layers, rank 8" in capsys.readouterr().out


def test_trainer_equals_a_hand_written_loop(tmp_path):
    kwargs = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "max_steps": 5}
    # unquantized, so that the last bits, which differ with torch's fused AdamW, stay last bits
    config = {"update_interval": 2, "quantize_weight": None, "quantize_projection": None}
    trained = loqt_model(**config)
    trainer = make_trainer(trained, tmp_path, [LoQTTrainerCallback()], **kwargs)
    trainer.train()

    written = loqt_model(**config)
    other = make_trainer(written, tmp_path, **kwargs)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in written.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    torch.manual_seed(other.args.seed)
    model, optimizer, batches = accelerator.prepare(written, optimizer, other.get_train_dataloader())
    model.train()
    for step, batch in zip(range(5), batches, strict=False):
        written.begin_step(step)
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        written.end_step(optimizer)
        optimizer.zero_grad()

    for (_, expected), (_, actual) in zip(loqt_layers(written), loqt_layers(trained), strict=True):
        expected, actual = expected.effective_weight("default"), actual.effective_weight("default")
        assert torch.linalg.norm(actual - expected) <= 1e-4 * torch.linalg.norm(expected)


def test_adapter_added_by_transformers_trains_too(tmp_path):
    model = tiny_llama()
    model.add_adapter(loqt_config(update_interval=2))
    make_trainer(model, tmp_path, [LoQTTrainerCallback()], max_steps=3).train()
    assert all(layer.num_updates("default") == 2 for _, layer in loqt_layers(model))


def test_merged_adapter_does_not_train():
    model = loqt_model()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        model.begin_step(0)


def test_accumulation_equals_one_large_batch(tmp_path):
    # 10 batches of an epoch make windows of 4, 4 and 2: the last one is short
    def train(**kwargs):
        model = loqt_model(quantize_weight=None, quantize_projection=None, update_interval=2)
        trainer = make_trainer(
            model,
            tmp_path,
            [LoQTTrainerCallback()],
            dataset=TokenDataset(size=40),
            max_steps=-1,
            num_train_epochs=1,
            max_grad_norm=0.0,
            **kwargs,
        )
        trainer.train()
        assert trainer.state.global_step == 3
        return [layer.effective_weight("default") for _, layer in loqt_layers(model)]

    large = train(per_device_train_batch_size=16)
    accumulated = train(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    for a, b in zip(large, accumulated, strict=True):
        assert torch.linalg.norm(a - b) <= 1e-4 * torch.linalg.norm(a)


def test_evaluation_between_steps_changes_nothing(tmp_path):
    states = []
    for evaluate in (False, True):
        model = loqt_model(update_interval=2)
        trainer = make_trainer(
            model,
            tmp_path,
            [LoQTTrainerCallback()],
            eval_dataset=TokenDataset(size=8, seed=1),
            max_steps=5,
            eval_strategy="steps" if evaluate else "no",
            eval_steps=1,
        )
        trainer.train()
        states.append(adapter_state(model))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


class StopMidWindow(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            control.should_training_stop = True


def test_stop_in_the_middle_of_a_window_drops_the_partial_gradient(tmp_path):
    model = loqt_model(update_interval=2)
    trainer = make_trainer(
        model, tmp_path, [LoQTTrainerCallback(), StopMidWindow()], gradient_accumulation_steps=3, max_steps=6
    )
    trainer.train()
    assert all(layer.capture.gradient is None for _, layer in loqt_layers(model))
    assert trainer.train().global_step >= 2


class SkippedOptimizer(torch.optim.AdamW):
    """Reports its third step as skipped by the fp16 scaler, as accelerate's wrapper does."""

    steps = 0
    step_was_skipped = False

    def step(self, closure=None):
        self.steps += 1
        self.step_was_skipped = self.steps == 3
        if not self.step_was_skipped:
            super().step(closure)


def test_skipped_optimizer_step_postpones_the_update():
    model = loqt_model(update_interval=2)
    optimizer = SkippedOptimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    done = []
    for step in range(6):
        model.begin_step(step)
        model(input_ids=token_batch(step), labels=token_batch(step)).loss.backward()
        optimizer.step()
        before = adapter_state(model)
        if (update := model.end_step(optimizer)) is not None:
            done.append((step, update.num_updates))
        elif step == 2:
            after = adapter_state(model)
            assert all(torch.equal(before[k], after[k]) for k in before if "loqt_state" not in k)
        optimizer.zero_grad()
    assert done == [(0, 1), (3, 2), (4, 3)]


def test_postponed_update_survives_a_checkpoint(tmp_path):
    model = loqt_model(update_interval=5)
    model.train()
    model.begin_step(5)
    (model(input_ids=token_batch(), labels=token_batch()).loss * float("nan")).backward()
    with pytest.warns(UserWarning, match="postponed"):
        model.end_step()
    model.save_pretrained(tmp_path)
    resumed = loqt_model(update_interval=5)
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    assert resumed.begin_step(6)


###############################
# Memory and speed
###############################


class Clock(TrainerCallback):
    """Two seconds for the first step, four for the second and so on, and many for everything else."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def on_step_begin(self, args, state, control, **kwargs):
        self.now += 2.0 * (state.global_step + 1)

    def on_prediction_step(self, args, state, control, **kwargs):
        self.now += 100.0

    def saving(self, save_pretrained):
        def save(*args, **kwargs):
            self.now += 1000.0
            return save_pretrained(*args, **kwargs)

        return save


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(performance, "time", clock)
    return clock


@needs_tensorboard
@pytest.mark.parametrize("loqt", [True, False])
def test_memory_and_speed_are_logged(tmp_path, clock, monkeypatch, loqt):
    model = loqt_model() if loqt else tiny_llama()
    monkeypatch.setattr(model, "save_pretrained", clock.saving(model.save_pretrained))
    trainer = make_trainer(
        model,
        tmp_path,
        [LoQTTrainerCallback() if loqt else PerformanceCallback(), clock],
        eval_dataset=TokenDataset(size=12, seed=1),
        max_steps=6,
        gradient_accumulation_steps=2,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        report_to="tensorboard",
    )
    trainer.train()
    assert clock.now > 3000
    # 2 micro-batches of 4 sequences of 16 tokens in each of two steps
    expected = [256 / (2 + 4), 256 / (6 + 8), 256 / (10 + 12)]
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loqt/tokens_per_second"] for entry in entries] == expected
    assert all(entry["loqt/peak_resident_memory"] > 2**26 for entry in entries)

    # next to the loss, where the reporters get it
    events = events_in(tmp_path)
    for name in ("loqt/tokens_per_second", "loqt/peak_resident_memory"):
        logged = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert logged == [(entry["step"], pytest.approx(entry[name])) for entry in entries]
    assert not any(
        "tokens_per_second" in key for entry in trainer.state.log_history if "eval_loss" in entry for key in entry
    )

    # nothing is left on the model, and training again counts anew
    assert model._forward_pre_hooks == {}
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loqt/tokens_per_second"] for entry in entries] == expected


def test_embedded_inputs_count_as_tokens(tmp_path, clock):
    model = tiny_llama()
    embeddings = torch.randn(8, 16, 32)

    class Embedded(TokenDataset):
        def __getitem__(self, index):
            return {"inputs_embeds": embeddings[index], "labels": self.tokens[index]}

    callbacks = [PerformanceCallback(), clock]
    trainer = make_trainer(model, tmp_path, callbacks, Embedded(8), max_steps=1, logging_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loqt/tokens_per_second"] == 32.0


def test_memory_of_a_device(monkeypatch):
    calls = []
    for name, value in (("max_memory_allocated", 3), ("max_memory_reserved", 5), ("reset_peak_memory_stats", None)):
        monkeypatch.setattr(torch.cuda, name, lambda device, n=name, v=value: calls.append((n, device)) or v)
        # not every torch that works has those of `torch.accelerator`
        monkeypatch.delattr(torch.accelerator, name, raising=False)
    device = torch.device("cuda", 1)
    memory = PerformanceCallback._take_peak_memory(device)
    assert memory == {"loqt/peak_memory_allocated": 3, "loqt/peak_memory_reserved": 5}
    assert calls[-1] == ("reset_peak_memory_stats", device) and len(calls) == 3


def test_counting_tokens_breaks_no_graph():
    net, callback = torch.nn.Embedding(4, 4), PerformanceCallback()
    callback._count_tokens(net, torch.device("cpu"))
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for _ in range(3):
        compiled(torch.ones(2, 4, dtype=torch.int64))
    assert callback._tokens.item() == 3 * 8
    assert counter.frame_count == 1


@pytest.mark.parametrize("optimizer_state", ["keep", "reset", "rotate"])
def test_optimizer_state_at_a_switch(optimizer_state):
    model = loqt_model(optimizer_state=optimizer_state, update_interval=3)
    layer = next(layer for _, layer in loqt_layers(model))
    B = layer.loqt_B["default"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(4):
        model.begin_step(step)
        model(input_ids=token_batch(step), labels=token_batch(step)).loss.backward()
        optimizer.step()
        P_old = layer.projection("default")
        moment, second = (optimizer.state[B][key].clone() for key in ("exp_avg", "exp_avg_sq"))
        model.end_step(optimizer)
        optimizer.zero_grad()
    assert layer.loqt_B["default"] is B
    if optimizer_state == "reset":
        assert B not in optimizer.state
        return
    P_new = layer.projection("default")
    expected = moment if optimizer_state == "keep" else moment @ P_old @ P_new.T
    assert moment.abs().max() > 0
    assert torch.allclose(optimizer.state[B]["exp_avg"], expected, rtol=1e-4, atol=1e-8)
    assert torch.equal(optimizer.state[B]["exp_avg_sq"], second)


@pytest.mark.parametrize("optimizer_class", [bnb.optim.AdamW8bit, bnb.optim.PagedAdamW8bit, bnb.optim.Lion8bit])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_8bit_moments_are_rotated(optimizer_class):
    # large enough for 8-bit states: 64 x 64 numbers and more
    llama = tiny_llama(hidden_size=64, intermediate_size=100)
    model = get_peft_model(llama, loqt_config(optimizer_state="rotate", update_interval=3, r=64))
    layers = [layer for _, layer in loqt_layers(model)]
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def moment_of(layer, key="state1", number="1"):
        state = optimizer.state[layer.loqt_B["default"]]
        assert state[key].dtype == torch.uint8
        absmax, levels = (state[name + number].double() for name in ("absmax", "qmap"))
        values = levels[state[key].long()].flatten()
        blocks = nn.functional.pad(values, (0, -values.numel() % 256)).view(-1, 256)
        return (blocks * absmax.unsqueeze(1)).flatten()[: values.numel()].view(state[key].shape).float()

    model.train()
    for step in range(4):
        model.begin_step(step)
        model(input_ids=token_batch(step), labels=token_batch(step)).loss.backward()
        optimizer.step()
        before = [(layer.projection("default"), moment_of(layer)) for layer in layers]
        model.end_step(optimizer)
        optimizer.zero_grad()
        if step == 0:
            # there was no subspace to turn out of
            assert all(not moment_of(layer).any() for layer in layers)
    for layer, (P_old, moment) in zip(layers, before, strict=True):
        P_new = layer.projection("default")
        expected = moment @ P_old @ P_new.T if layer.right else P_new.T @ P_old @ moment
        assert expected.abs().max() > 0
        # 8 bits: 1.4% of the largest number of a block, at most
        error = (moment_of(layer) - expected).abs()
        assert error.max() <= 0.015 * expected.abs().max()
        assert error.norm() <= 0.03 * expected.norm()


def test_rotation_is_the_identity_when_p_stays():
    model = loqt_model(optimizer_state="rotate", update_interval=3, quantize_projection=None)
    layer = next(layer for _, layer in loqt_layers(model))
    P = layer.projection("default")
    assert P.abs().max() == 0
    model.begin_step(0)
    model(input_ids=token_batch(), labels=token_batch()).loss.backward()
    model.end_step()
    P = layer.projection("default")
    assert torch.allclose(P @ P.T, torch.eye(8), atol=1e-5)


###############################
# Refusals
###############################


def begin(model, callbacks=None, optimizer=None, **kwargs):
    trainer = make_trainer(model, "unused", callbacks or [LoQTTrainerCallback()], **kwargs)
    if optimizer is not None:
        trainer.optimizer = optimizer
    trainer.train()


def test_model_without_loqt_is_refused():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="no LoQT layers"):
        begin(model)


def test_adapter_that_does_not_train_is_refused():
    model = get_peft_model(tiny_llama(), loqt_config(full_rank_modules="all"))
    for _, layer in loqt_layers(model):
        layer.loqt_B["default"].requires_grad_(False)
    with pytest.raises(ValueError, match="active and trainable"):
        begin(model)


@pytest.mark.parametrize("other", [LoQTTrainerCallback, PerformanceCallback])
def test_two_callbacks_are_refused(other):
    with pytest.raises(ValueError, match="two of them"):
        begin(loqt_model(), [LoQTTrainerCallback(), other()])


def test_optimizer_without_b_is_refused():
    model = loqt_model(full_rank_modules="all")
    optimizer = torch.optim.AdamW([model.get_base_model().get_input_embeddings().weight])
    with pytest.raises(ValueError, match="does not hold B of 14 of 14"):
        begin(model, optimizer=optimizer)


@pytest.mark.parametrize("optim", ["ademamix", "ademamix_8bit"])
def test_two_first_moments_cannot_be_rotated(optim):
    with pytest.raises(ValueError, match="optimizer_state='rotate' cannot rotate the two first moments of AdEMAMix"):
        begin(loqt_model(optimizer_state="rotate"), optim=optim)


def test_8bit_optimizer_trains(tmp_path):
    model = loqt_model(optimizer_state="reset")
    make_trainer(model, tmp_path, [LoQTTrainerCallback()], optim="adamw_bnb_8bit").train()
    assert next(loqt_layers(model))[1].num_updates("default") == 4


def test_data_parallel_is_refused():
    trainer = make_trainer(loqt_model(), "unused")
    trainer.args._n_gpu = 2
    assert trainer.args.parallel_mode == ParallelMode.NOT_DISTRIBUTED
    with pytest.raises(ValueError, match="torchrun"):
        LoQTTrainerCallback().on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


@pytest.mark.parametrize("distributed_type", [DistributedType.MEGATRON_LM])
def test_sharded_training_is_refused(monkeypatch, distributed_type):
    trainer = make_trainer(loqt_model(), "unused")
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", distributed_type)
    with pytest.raises(ValueError, match=f"{distributed_type.value} is not supported"):
        LoQTTrainerCallback().on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_auto_find_batch_size_is_refused_after_a_switch(tmp_path):
    model = loqt_model()
    args = make_trainer(model, "unused", auto_find_batch_size=True).args
    assert trainer_findings(model, args) == []
    begin(model, max_steps=1)
    with pytest.raises(ValueError, match="auto_find_batch_size"):
        begin(model, max_steps=1, auto_find_batch_size=True)


@pytest.mark.parametrize("step", [-1, 1.5, None])
def test_steps_that_are_none(step):
    with pytest.raises(ValueError, match="step="):
        loqt_model().begin_step(step)


def test_no_warning_in_a_healthy_run():
    base = tiny_llama()
    base.name_or_path = "base"
    model = get_peft_model(base, LoQTConfig(r=4, task_type="CAUSAL_LM", update_interval=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            model.begin_step(step)
            model(input_ids=token_batch(step), labels=token_batch(step)).loss.backward()
            optimizer.step()
            model.end_step(optimizer)
            optimizer.zero_grad()


###############################
# What an update says of itself
###############################


def steps_with_updates(model, steps=4, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    updates = []
    for step in range(steps):
        model.begin_step(step, lambda: True)
        model(input_ids=token_batch(step), labels=token_batch(step)).loss.backward()
        optimizer.step()
        updates.append(model.end_step(optimizer))
        optimizer.zero_grad()
    return [update for update in updates if update is not None]


def test_change_is_compared_with_the_error(tmp_path):
    trainer = make_trainer(loqt_model(update_interval=2), tmp_path, [LoQTTrainerCallback()], max_steps=3)
    trainer.train()
    first, second = updates_of(trainer)
    # the first merges nothing
    assert "loqt/change_to_error" not in first
    assert second["loqt/change_to_error"] == second["loqt/merged_change"] / second["loqt/quantization_error_after"]


def test_there_is_no_error_without_quantization():
    updates = steps_with_updates(loqt_model(update_interval=2, quantize_weight=None))
    assert [update.change_to_error for update in updates] == [None, None]
    assert all("loqt/change_to_error" not in update.metrics() for update in updates)


@pytest.mark.parametrize(
    "lr, fields, warns",
    [
        (2e-4, {}, True),
        (2e-4, {"error_feedback": True}, False),
        (2e-4, {"quantize_weight": None}, False),
        (1e-2, {}, False),
    ],
)
def test_change_that_quantization_loses(lr, fields, warns):
    # of a base that lies on its 4-bit grid, as after an update, a small change is rounded away
    model = loqt_model(update_interval=2, compensation_steps=0, **fields)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        updates = steps_with_updates(model, steps=8, lr=lr)
    lost = [str(warning.message) for warning in recorded if "change_to_error" in str(warning.message)]
    # once, though each of three updates lost it
    assert len(lost) == warns and len(updates) == 4
    if warns:
        assert "loqt_alpha, a longer update_interval, or error_feedback=True helps" in lost[0]
        assert all(update.change_to_error < 1 for update in updates[1:])


class DeviceClock:
    """A device that works off a queue, and events in it: what `torch.cuda` has, in seconds."""

    def __init__(self):
        self.done = 0.0

    def work(self, function, seconds):
        def queued(*args, **kwargs):
            self.done += seconds
            return function(*args, **kwargs)

        return queued

    def current_stream(self, device):
        return self

    def Event(self, enable_timing):
        clock = self

        class Event:
            def record(self, stream):
                self.at = clock.done

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return 1000 * (other.at - self.at)

        return Event()


@pytest.mark.parametrize("projection", ["svd", "random"])
@pytest.mark.parametrize("update_mode", ["backward", "whole"])
@pytest.mark.parametrize("device", ["that works by itself", "cpu"])
def test_seconds_are_those_of_the_update(monkeypatch, device, update_mode, projection):
    clock = DeviceClock()
    if device == "cpu":
        monkeypatch.setattr(stopwatch, "time", types.SimpleNamespace(perf_counter=lambda: clock.done))
    else:
        monkeypatch.setattr(stopwatch, "device_module", lambda device: clock)
    monkeypatch.setattr(switch, "project", clock.work(switch.project, 2.0))
    monkeypatch.setattr(switch, "random_projection", clock.work(switch.random_projection, 0.5))
    monkeypatch.setattr(switch, "compensate", clock.work(switch.compensate, 3.0))
    # what is no part of it
    monkeypatch.setattr(Linear, "forward", clock.work(Linear.forward, 100.0))
    monkeypatch.setattr(GradientCapture, "record", clock.work(GradientCapture.record, 100.0))

    updates = steps_with_updates(loqt_model(update_interval=2, update_mode=update_mode, projection=projection))
    assert [update.seconds for update in updates] == [14 * (3.0 + (2.0 if projection == "svd" else 0.5))] * 2
