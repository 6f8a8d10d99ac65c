"""The captured gradient is that of a dense model with the merged weights."""

import copy
import warnings

import pytest
import torch
from common import loqt_config, single_linear, tiny_llama, token_batch, train_steps
from peft import get_peft_model
from torch import nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, GPT2Config, GPT2LMHeadModel

from loqt_peft.layers import gradient_offload
from loqt_peft.layers.capture import GradientCapture
from loqt_peft.layers.find import loqt_layers
from loqt_peft.layers.gradient_offload import HostCopy


def merged_dense_copy(model):
    return copy.deepcopy(model).merge_and_unload().requires_grad_(True)


def assert_captured_equals_dense(model, dense, tolerance, dense_weight=lambda module: module.weight):
    for name, layer in loqt_layers(model.base_model.model):
        expected = dense_weight(dense.get_submodule(name)).grad
        if layer.fan_in_fan_out:
            expected = expected.T
        error = torch.linalg.norm(layer.capture.gradient - expected) / torch.linalg.norm(expected)
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("switches", [0, 2])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("offload", [False, True])
def test_captured_gradient_equals_dense_gradient(switches, micro_batches, checkpointing, offload):
    model = get_peft_model(tiny_llama(), loqt_config(offload_gradients=offload))
    train_steps(model, switches)
    dense = merged_dense_copy(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    model.train()
    assert model.begin_step(switches)
    for i in range(micro_batches):
        tokens = token_batch(100 + i)
        for m in (model, dense):
            (m(input_ids=tokens, labels=tokens).loss / micro_batches).backward()
    assert_captured_equals_dense(model, dense, 1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.01)])
def test_captured_gradient_under_autocast(dtype, tolerance):
    model = get_peft_model(tiny_llama(), loqt_config())
    train_steps(model, 1)
    dense = merged_dense_copy(model)
    model.train()
    model.begin_step(1)
    tokens = token_batch(7)
    with torch.autocast("cpu", dtype=dtype):
        model(input_ids=tokens, labels=tokens).loss.backward()
    dense(input_ids=tokens, labels=tokens).loss.backward()
    assert_captured_equals_dense(model, dense, tolerance)


def test_capture_leaves_the_gradient_of_b_as_it_is():
    model = get_peft_model(tiny_llama(), loqt_config())
    train_steps(model, 1)
    tokens, gradients = token_batch(7), []
    model.train()
    for capture in (True, False):
        if capture:
            model.begin_step(1)
        else:
            model.cancel_step()
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append([layer.loqt_B["default"].grad.clone() for _, layer in loqt_layers(model)])
    # made of the weight's gradient where that is recorded
    for a, b in zip(*gradients, strict=True):
        assert torch.linalg.norm(a - b) <= 1e-6 * torch.linalg.norm(b)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_modules_that_run_several_times(micro_batches):
    base = deberta()
    model = get_peft_model(base, loqt_config(task_type="SEQ_CLS"))
    layers = dict(loqt_layers(model.base_model.model))
    assert any(name.endswith("query_proj") for name in layers) and "classifier" not in layers
    dense = copy.deepcopy(model)
    for _, layer in loqt_layers(dense):
        layer.base_layer.weight.requires_grad_(True)
    model.begin_step(0)
    for i in range(micro_batches):
        tokens, labels = token_batch(i), torch.tensor([0, 1, 0, 1])
        for m in (model, dense):
            m.train()
            (m(input_ids=tokens, labels=labels).loss / micro_batches).backward()
    # before the first switch the base layer is the dense weight, and autograd sums over its calls
    assert_captured_equals_dense(
        model, dense.base_model.model, 1e-5, dense_weight=lambda module: module.base_layer.weight
    )


def test_conv1d_layout():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0
        )
    )
    model = get_peft_model(base, loqt_config())
    assert len(list(loqt_layers(model))) == 8
    before = model(token_batch()).logits
    train_steps(model, 3)
    assert not torch.allclose(model(token_batch()).logits, before)
    dense = merged_dense_copy(model)
    assert torch.allclose(dense(token_batch()).logits, model(token_batch()).logits, atol=1e-5)
    model.begin_step(3)
    model.train()
    dense.train()
    tokens = token_batch(7)
    for m in (model, dense):
        m(input_ids=tokens, labels=tokens).loss.backward()
    assert_captured_equals_dense(model, dense, 1e-5)


def test_evaluation_leaves_the_capture_alone():
    model = get_peft_model(tiny_llama(), loqt_config())
    model.train()
    model.begin_step(0)
    tokens = token_batch(7)
    model(input_ids=tokens, labels=tokens).loss.backward()
    captured = [layer.capture.gradient.clone() for _, layer in loqt_layers(model)]
    model.eval()
    with torch.no_grad():
        model(input_ids=token_batch(8))
    model(input_ids=tokens, labels=tokens)
    for before, (_, layer) in zip(captured, loqt_layers(model), strict=True):
        assert torch.equal(before, layer.capture.gradient)


def deberta():
    # it sends its relative position embeddings through the same query and key projections
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        relative_attention=True,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return DebertaV2ForSequenceClassification(config)


@pytest.mark.parametrize("build, task_type", [(tiny_llama, "CAUSAL_LM"), (deberta, "SEQ_CLS")])
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_projecting_within_the_backward_pass_changes_nothing(build, task_type, checkpointing, micro_batches):
    def train(update_mode, offload):
        config = loqt_config(task_type=task_type, update_mode=update_mode, offload_gradients=offload)
        model = get_peft_model(build(), config)
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
            model.enable_input_require_grads()
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        passes = []
        for step in range(3):
            model.begin_step(step, lambda: len(passes) % micro_batches == micro_batches - 1)
            for micro_batch in range(micro_batches):
                tokens = token_batch(10 * step + micro_batch)
                labels = tokens if task_type == "CAUSAL_LM" else torch.tensor([0, 1, 0, 1])
                (model(input_ids=tokens, labels=labels).loss / micro_batches).backward()
                passes.append(micro_batch)
            held = [layer.capture.gradient for _, layer in loqt_layers(model)]
            assert all((gradient is None) == (update_mode == "backward") for gradient in held)
            optimizer.step()
            model.end_step(optimizer)
            optimizer.zero_grad()
        return {name: tensor for name, tensor in model.state_dict().items() if "loqt" in name}

    expected = train("whole", False)
    for offload in (True, False):
        state = train("backward", offload)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_backward_pass_after_the_last_is_an_error():
    model = get_peft_model(tiny_llama(), loqt_config())
    model.train()
    model.begin_step(0, lambda: True)
    tokens = token_batch()
    model(input_ids=tokens, labels=tokens).loss.backward()
    with pytest.raises(RuntimeError, match="said to be the step's last"):
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert model.begin_step(0, lambda: True)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert model.end_step().num_updates == 1


def test_a_forward_pass_without_a_backward_pass_keeps_the_gradient_to_the_end():
    model = get_peft_model(tiny_llama(), loqt_config())
    model.train()
    tokens = token_batch()
    model.begin_step(0, lambda: True)
    with torch.no_grad():
        model(input_ids=tokens)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(layer.capture.gradient is not None for _, layer in loqt_layers(model))
    assert model.end_step().num_updates == 1


def test_an_unfinished_step_does_not_keep_the_gradients_of_the_next():
    model = get_peft_model(tiny_llama(), loqt_config())
    model.train()
    tokens = token_batch()
    model.begin_step(0, lambda: True)
    # its backward pass never comes
    model(input_ids=tokens)
    model.begin_step(0, lambda: True)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(layer.capture.gradient is None for _, layer in loqt_layers(model))
    assert model.end_step().num_updates == 1


def test_another_adapter_is_no_part_of_the_update():
    model, layer = single_linear(torch.randn(8, 6))
    model.add_adapter("other", loqt_config(target_modules=["0"], task_type=None, init_weights=False))
    x, target = torch.randn(4, 6), torch.randn(4, 8)

    def gradient(with_other, is_last_backward=None):
        model.train().begin_step(0, is_last_backward)
        if with_other:
            # as that of a reference model
            layer.set_adapter(["other"])
            model(x).square().mean().backward()
            layer.set_adapter(["default"])
        (model(x) - target).square().mean().backward()
        return layer.capture.gradient

    assert torch.equal(gradient(True), gradient(False))
    # nor does P wait for it
    assert gradient(True, lambda: True) is None
    assert model.end_step().num_updates == 1


def test_copies_of_a_compiled_model_record_for_themselves():
    captures = [GradientCapture()]
    captures.append(copy.deepcopy(captures[0]))
    gradients = [torch.randn(4, 8), torch.randn(4, 8)]
    x = torch.randn(4, 6)
    for capture in captures:
        capture.start("default", lambda gradient: None)
    for capture, gradient in zip(captures, gradients, strict=True):
        torch.ops.loqt_peft.record_gradient(gradient, x, capture._token, capture._number)
    for capture, gradient in zip(captures, gradients, strict=True):
        assert torch.equal(capture.gradient, gradient.T @ x)


def test_what_nobody_counted_is_kept_to_the_end():
    # a compiled module may run several times, and its calls are not counted
    capture = GradientCapture()
    capture.start("default", lambda gradient: None, is_last_backward=lambda: True)
    for _ in range(2):
        capture.add(torch.ones(2, 3))
    assert capture.gradient.tolist() == [[2.0] * 3] * 2


def test_staggered_update_takes_one_block_at_a_time():
    model = get_peft_model(tiny_llama(num_hidden_layers=3), loqt_config(update_mode="stagger", update_interval=7))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    updated = {}
    for step in range(12):
        model.begin_step(step)
        tokens = token_batch(step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        held = {name for name, layer in loqt_layers(model) if layer.capture.gradient is not None}
        before = {name: layer.num_updates("default") for name, layer in loqt_layers(model)}
        optimizer.step()
        update = model.end_step(optimizer)
        optimizer.zero_grad()
        switched = {name for name, layer in loqt_layers(model) if layer.num_updates("default") > before[name]}
        assert switched == held and bool(switched) == (update is not None)
        updated[step] = {name.split(".layers.")[1][0] for name in switched}
    assert {step: blocks for step, blocks in updated.items() if blocks} == {
        0: {"0"}, 1: {"1"}, 2: {"2"}, 7: {"0"}, 8: {"1"}, 9: {"2"},
    }  # fmt: skip


def test_postponed_block_of_a_staggered_update_joins_the_next():
    model = get_peft_model(tiny_llama(), loqt_config(update_mode="stagger", update_interval=9))
    model.train()
    tokens = token_batch()
    model.begin_step(0)
    (model(input_ids=tokens, labels=tokens).loss * float("inf")).backward()
    with pytest.warns(UserWarning, match="7 of 7"):
        model.end_step()
    model.zero_grad()
    model.begin_step(1)
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.end_step()
    assert [layer.num_updates("default") for _, layer in loqt_layers(model)] == [1] * 14


def test_staggering_is_not_taken_for_missing_updates():
    base = tiny_llama(num_hidden_layers=3)
    base.name_or_path = "base"
    model = get_peft_model(base, loqt_config(update_mode="stagger", update_interval=9))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train_steps(model, 4)


def test_update_drops_the_gradient_of_the_old_b():
    model = get_peft_model(tiny_llama(), loqt_config(update_interval=2))
    model.train()
    tokens = token_batch()
    for step, updated in ((0, True), (1, False)):
        model.begin_step(step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.end_step()
        assert all((layer.loqt_B["default"].grad is None) == updated for _, layer in loqt_layers(model))


def test_partial_gradient_of_an_unfinished_step_is_dropped():
    def gradient(unfinished):
        model = get_peft_model(tiny_llama(), loqt_config(update_interval=5))
        model.train()
        if unfinished:
            model.begin_step(0)
            model(input_ids=token_batch(1), labels=token_batch(1)).loss.backward()
        model.begin_step(5)
        model(input_ids=token_batch(2), labels=token_batch(2)).loss.backward()
        return [layer.capture.gradient for _, layer in loqt_layers(model)]

    assert all(torch.equal(a, b) for a, b in zip(gradient(False), gradient(True), strict=True))


def test_unfinished_update_step_does_not_go_on_capturing():
    model = get_peft_model(tiny_llama(), loqt_config(update_interval=5))
    model.train()
    assert model.begin_step(0)
    assert not model.begin_step(1)
    model(input_ids=token_batch(1), labels=token_batch(1)).loss.backward()
    assert all(layer.capture.gradient is None for _, layer in loqt_layers(model))
    assert model.end_step() is None


@pytest.mark.parametrize("is_last_backward", [None, lambda: True])
def test_non_finite_gradient_postpones_the_update_and_changes_nothing(is_last_backward):
    model = get_peft_model(tiny_llama(), loqt_config(update_interval=10))
    train_steps(model, 1)
    state = {k: v.clone() for k, v in model.state_dict().items() if "loqt" in k and "state" not in k}
    model.train()
    model.begin_step(10, is_last_backward)
    loss = model(input_ids=token_batch(1), labels=token_batch(1)).loss * float("inf")
    loss.backward()
    with pytest.warns(UserWarning, match="postponed"):
        assert model.end_step() is None
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    # what was captured is no use any more
    for _, layer in loqt_layers(model):
        assert layer.capture.adapter_name is None and layer.capture.stop() == (None, None)
    model.zero_grad()
    # still pending, and said once only
    assert model.begin_step(11, is_last_backward)
    (model(input_ids=token_batch(1), labels=token_batch(1)).loss * float("inf")).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.end_step() is None
    model.zero_grad()
    assert model.begin_step(12, is_last_backward)
    model(input_ids=token_batch(1), labels=token_batch(1)).loss.backward()
    assert model.end_step().num_updates == 2
    assert not model.begin_step(13)


def test_zero_gradient_keeps_p_warns_once_and_merges():
    class TwoPaths(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.expert = nn.Linear(16, 16), nn.Linear(16, 16)
            self.use_expert = True

        def forward(self, x):
            return self.used(x) + (self.expert(x) if self.use_expert else 0)

    base = TwoPaths()
    model = get_peft_model(base, loqt_config(r=4, task_type=None, target_modules=["used", "expert"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)

    def step(i):
        model.begin_step(i)
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        update = model.end_step(optimizer)
        optimizer.zero_grad()
        return update

    step(0)
    base.use_expert = False
    P, weight = base.expert.projection("default").clone(), base.expert.effective_weight("default").clone()
    with pytest.warns(UserWarning, match="expert is zero"):
        update = step(1)
    assert torch.equal(base.expert.projection("default"), P)
    assert base.expert.num_updates("default") == update.num_updates == 2
    moved = torch.linalg.norm(base.expert.effective_weight("default") - weight) / torch.linalg.norm(weight)
    assert moved <= 0.15
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(2)


def test_random_projections_differ_between_layers_and_updates_and_follow_the_seed():
    def projections(seed, updates):
        model = get_peft_model(tiny_llama(), loqt_config(projection="random"))
        torch.manual_seed(seed)
        train_steps(model, updates)
        return {name: layer.projection("default") for name, layer in loqt_layers(model) if layer.shape == (32, 32)}

    first = projections(0, 1)
    assert len(first) == 8
    assert all(torch.equal(P, first[name]) for name, P in projections(0, 1).items())
    others = [*projections(1, 1).values(), *projections(0, 2).values(), *first.values()]
    different = {tuple(P.flatten().tolist()) for P in others}
    assert len(different) == 24


class LateCopy:
    """Stands in for a copy from a device: until somebody waits for it, the host sees what was in the memory before."""

    log: list[str] = []

    def __init__(self, host, tensor, pinned):
        self.host, self.values = host.zero_(), tensor.clone()

    def queue(self):
        self.log.append("device")
        self.host.copy_(self.values)

    def wait(self):
        self.log.append("host")
        self.host.copy_(self.values)


@pytest.fixture
def late_copies(monkeypatch):
    monkeypatch.setattr(gradient_offload, "_start_copy", LateCopy)
    monkeypatch.setattr(LateCopy, "log", [])
    return LateCopy.log


@pytest.mark.parametrize("update_mode", ["whole", "backward"])
def test_an_update_waits_for_gradients_on_their_way_to_the_host_on_the_device_only(
    late_copies, monkeypatch, update_mode
):
    def train():
        config = loqt_config(update_mode=update_mode, offload_gradients=True)
        model = get_peft_model(tiny_llama(), config).train()
        passes = []
        for step in range(2):
            model.begin_step(step, lambda: len(passes) % 2 == 1)
            for micro_batch in range(2):
                tokens = token_batch(10 * step + micro_batch)
                model(input_ids=tokens, labels=tokens).loss.backward()
                passes.append(micro_batch)
            assert model.end_step().num_updates == step + 1
            model.zero_grad()
        return {name: tensor for name, tensor in model.state_dict().items() if "loqt" in name}

    late = train()
    assert "host" not in late_copies and "device" in late_copies
    monkeypatch.undo()
    expected = train()
    assert all(torch.equal(late[name], expected[name]) for name in expected)


def test_a_gradient_that_is_not_finite_is_noticed_before_it_arrives_on_the_host(late_copies):
    model = get_peft_model(tiny_llama(), loqt_config(update_mode="whole", offload_gradients=True)).train()
    model.begin_step(0)
    (model(input_ids=token_batch(), labels=token_batch()).loss * float("inf")).backward()
    # a sum over several micro-batches cannot become finite again
    model(input_ids=token_batch(1), labels=token_batch(1)).loss.backward()
    with pytest.warns(UserWarning, match="14 of 14 LoQT layers is not finite"):
        assert model.end_step() is None
    assert "host" not in late_copies


def test_a_gradient_that_stays_on_the_device_is_checked_as_it_is():
    model = get_peft_model(tiny_llama(), loqt_config(update_mode="whole", offload_gradients=True)).train()
    model.begin_step(0)
    model(input_ids=token_batch(), labels=token_batch()).loss.backward()
    # a backward pass seems to follow, so that the sum is not sent to the host
    with torch.no_grad():
        model(input_ids=token_batch())
    (model(input_ids=token_batch(1), labels=token_batch(1)).loss * float("inf")).backward()
    with pytest.warns(UserWarning, match="14 of 14 LoQT layers is not finite"):
        assert model.end_step() is None


def test_memory_of_a_copy_is_used_again_once_that_has_arrived(late_copies):
    first = HostCopy(torch.ones(2))
    again = HostCopy(torch.full((2,), 2.0), first)
    assert late_copies == ["device"]
    assert again.for_host().tolist() == [2, 2]


def test_who_looks_at_a_captured_gradient_waits_for_it(late_copies):
    model = get_peft_model(tiny_llama(), loqt_config(update_mode="whole", offload_gradients=True)).train()
    model.begin_step(0)
    model(input_ids=token_batch(), labels=token_batch()).loss.backward()
    gradients = [layer.capture.gradient for _, layer in loqt_layers(copy.deepcopy(model))]
    assert all(gradient.any() for gradient in gradients)
    assert late_copies == ["host"] * 28


class OnDevice(torch.Tensor):
    """Stands in for a tensor of a CUDA device."""

    is_cuda = True


def test_pinned_memory_is_bounded_and_used_again(monkeypatch):
    empty_like, pinned = torch.empty_like, []

    def allocate(tensor, device, pin_memory):
        pinned.append(pin_memory)
        return empty_like(tensor.as_subclass(torch.Tensor), device=device)

    monkeypatch.setattr(torch, "empty_like", allocate)
    monkeypatch.setattr(gradient_offload, "_start_copy", LateCopy)
    monkeypatch.setattr(gradient_offload, "PINNED_BYTES", 2 * 2048 + 1200)
    # 1,200 bytes, for which torch takes 2,048: there is room for two of them
    tensor = torch.ones(300).as_subclass(OnDevice)
    copies = [HostCopy(tensor) for _ in range(3)]
    assert pinned == [True, True, False]
    again = HostCopy(tensor, copies[0])
    assert again.for_host().data_ptr() == copies[0].for_host().data_ptr() and len(pinned) == 3
    # the memory counts once, and as long as somebody holds it
    assert sum(copy.pinned_bytes for copy in (*copies, again)) == 4096
    del copies
    first, second = HostCopy(tensor), HostCopy(tensor)
    assert pinned[3:] == [True, False]
    assert again.pinned_bytes == first.pinned_bytes == 2048 and second.pinned_bytes == 0
