"""The same operations on a device and on the CPU, and what only a device can get wrong.

Skipped without a CUDA device. `LOQT_TEST_DEVICE=cpu` puts the CPU in its place: the tests then show that they run, and find
no difference.
"""

import copy
import itertools
import math
from contextlib import nullcontext

import bitsandbytes as bnb
import pytest
import torch
import torch.distributed as dist
from common import loqt_config, tiny_llama, token_batch, train_steps
from gpu_device import DEVICE, needs_device, on_cuda, sleep, synchronize
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loqt_peft.algorithm.compensation import compensate
from loqt_peft.algorithm.projection import captured_energy, project, random_projection, squared_norm
from loqt_peft.algorithm.quantization import DenseFormat, FourBitFormat
from loqt_peft.layers.find import loqt_layers


pytestmark = needs_device

SHAPES = [(64, 128), (128, 64), (48, 32)]
FORMATS = list(itertools.product(("nf4", "fp4"), (False, True)))
# of float32 sums in another order
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def relative(actual, expected):
    """‖actual − expected‖ / ‖expected‖, on the CPU."""
    expected = expected.detach().float().cpu()
    return (torch.linalg.norm(actual.detach().float().cpu() - expected) / torch.linalg.norm(expected)).item()


def matrix(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, min(shape) + 1) ** -1.0
    left = torch.randn(shape[0], min(shape), generator=generator)
    return left * spectrum @ torch.randn(min(shape), shape[1], generator=generator)


def drifted_model(steps=2, dtype=torch.float32, **config):
    """A model on the CPU that has been through `steps` updates."""
    model = get_peft_model(tiny_llama().to(dtype), loqt_config(**{"full_rank_modules": "all", **config}))
    train_steps(model, steps)
    return model


def on_device(model):
    """A copy on the device; the model itself stays where it is."""
    return copy.deepcopy(model).to(DEVICE)


def forward_backward(model, seed=5, device=None):
    """Logits, and the gradients of what trains by name."""
    model.train()
    tokens = token_batch(seed).to(device or model.device)
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output.logits.detach().cpu(), gradients


###############################
# Operations
###############################


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant_type, double_quant", FORMATS)
def test_pack_and_unpack(shape, quant_type, double_quant):
    W = torch.randn(shape)
    storage = FourBitFormat(shape, quant_type, double_quant)
    packed = storage.pack(W)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = storage.unpack(packed, dtype)
        torch.testing.assert_close(storage.unpack(packed.to(DEVICE), dtype).cpu(), expected, rtol=1e-2, atol=1e-5)
    assert relative(storage.unpack(packed.to(DEVICE)), storage.unpack(packed)) < 1e-5
    # a number that lies between two levels may go to either
    other = storage.pack(W.to(DEVICE)).cpu()
    assert other.shape == packed.shape
    codes = math.prod(shape) // 2
    assert (other[:codes] != packed[:codes]).float().mean() < 0.02
    error, expected = (relative(storage.unpack(p), W) for p in (other, packed))
    assert abs(error - expected) <= 1e-3 * expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.02), (torch.float16, 0.01)])
@pytest.mark.parametrize("rows", [1, 48])
def test_product_with_a_packed_matrix_and_its_derivative(shape, dtype, tolerance, rows):
    for quant_type, double_quant in FORMATS:
        storage = FourBitFormat(shape, quant_type, double_quant)
        packed = storage.pack(torch.randn(shape))
        x, grad = torch.randn(rows, shape[1]), torch.randn(rows, shape[0])
        W = storage.unpack(packed)
        own = x.to(DEVICE, dtype).requires_grad_()
        y = storage.linear(own, packed.to(DEVICE))
        y.backward(grad.to(DEVICE, dtype))
        assert relative(y, x @ W.T) < tolerance
        assert relative(own.grad, grad @ W) < tolerance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["svd", "eigh", "randomized"])
def test_projection(shape, method):
    G, r = matrix(shape), 8
    own, reference = project(G.to(DEVICE), r, method), project(G, r, method)
    assert own.shape == reference.shape and own.dtype == torch.float32
    energies = [(captured_energy(G, P.cpu()) / squared_norm(G)).item() for P in (own, reference)]
    assert energies[0] == pytest.approx(energies[1], rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_projection_is_orthonormal_and_follows_its_seed(shape):
    P, again, other = (random_projection(shape, 8, seed, DEVICE) for seed in (0, 0, 1))
    assert relative(P @ P.T if shape[1] <= shape[0] else P.T @ P, torch.eye(8)) < 1e-5
    assert torch.equal(P, again) and not torch.equal(P, other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant_type, double_quant", [*FORMATS, (None, False)])
def test_compensation(shape, quant_type, double_quant):
    W = torch.randn(shape)
    P = project(matrix(shape), 8, "svd")
    storage = (
        DenseFormat(shape, torch.bfloat16) if quant_type is None else FourBitFormat(shape, quant_type, double_quant)
    )
    expected = compensate(W, P, storage, 0.5, 5)
    own = compensate(W.to(DEVICE), P.to(DEVICE), storage, 0.5, 5)
    for key in ("error_before", "error_after"):
        assert getattr(own, key).item() == pytest.approx(getattr(expected, key).item(), rel=0.01)
    assert own.error_after <= own.error_before


###############################
# A model
###############################

CONFIGS = [
    {},
    {"quantize_weight": "fp4", "quantize_projection": "fp4", "double_quant": True},
    {"quantize_weight": None, "quantize_projection": None},
    {"double_quant": True, "error_feedback": True},
    {"projection": "random"},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("updates", [0, 2])
def test_forward_and_gradients(config, updates):
    model = drifted_model(updates, init_weights=updates > 0, **config)
    logits, gradients = forward_backward(model)
    own_logits, own_gradients = forward_backward(on_device(model))
    torch.testing.assert_close(own_logits, logits, **CLOSE)
    assert own_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert relative(own_gradients[name], gradient) < 1e-3, name


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("is_last_backward", [None, lambda: True])
def test_a_switch(config, is_last_backward):
    model = drifted_model(**config)
    own = on_device(model)
    updates, weights = [], []
    for each, device in ((model, "cpu"), (own, DEVICE)):
        each.train()
        each.begin_step(2, is_last_backward)
        tokens = token_batch(7).to(device)
        each(input_ids=tokens, labels=tokens).loss.backward()
        updates.append(each.end_step())
        weights.append({name: layer.effective_weight("default") for name, layer in loqt_layers(each)})
    assert updates[0].num_updates == updates[1].num_updates == 3
    for figure in ("merged_change", "quantization_error_before", "quantization_error_after", "gradient_energy"):
        expected = getattr(updates[0], figure)
        # random directions are other ones on another device
        if expected and config.get("projection") != "random":
            assert getattr(updates[1], figure) == pytest.approx(expected, rel=0.02), figure
    for name, weight in weights[0].items():
        assert relative(weights[1][name], weight) < 0.15, name
    assert {layer.loqt_weight["default"].device.type for _, layer in loqt_layers(own)} == {DEVICE}


@pytest.mark.parametrize("config", CONFIGS[:4])
@pytest.mark.parametrize("first, second", [(DEVICE, "cpu"), ("cpu", DEVICE)])
def test_saved_on_one_and_loaded_on_the_other(tmp_path, config, first, second):
    model = drifted_model(full_rank_modules=None, **config)
    if first != "cpu":
        model = on_device(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama().to(second), tmp_path, is_trainable=True)
    saved, own = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    seals = [key for key in saved if "loqt_seal" in key]
    assert seals and saved.keys() == own.keys()
    for key in saved.keys() - set(seals):
        assert torch.equal(own[key].cpu(), saved[key].cpu()), key
    assert loaded.device.type == second
    (logits, gradients), (own_logits, own_gradients) = forward_backward(model), forward_backward(loaded)
    torch.testing.assert_close(own_logits, logits, **CLOSE)
    for name, gradient in gradients.items():
        assert relative(own_gradients[name], gradient) < 1e-3, name


def test_disabling_the_adapter_gives_the_base_back():
    llama = tiny_llama().to(DEVICE)
    tokens = token_batch(3).to(DEVICE)
    before = llama(input_ids=tokens).logits.detach().clone()
    model = get_peft_model(llama, loqt_config())
    for step in range(2):
        model.begin_step(step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.end_step()
    assert not torch.equal(model(input_ids=tokens).logits, before)
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, before, **CLOSE)
    torch.testing.assert_close(model.unload()(input_ids=tokens).logits, before, rtol=0, atol=0)


###############################
# Optimizer states
###############################


def moment_of(state):
    """The first moment, float32 on the CPU."""
    key = "exp_avg" if "exp_avg" in state else "state1"
    synchronize()
    if state[key].dtype != torch.uint8:
        return state[key].detach().float().cpu().clone()
    levels, absmax = state["qmap1"].cpu(), state["absmax1"].cpu()
    values = levels[state[key].cpu().long()].flatten()
    blocks = nn.functional.pad(values, (0, -values.numel() % 256)).view(-1, 256) * absmax.unsqueeze(1)
    return blocks.flatten()[: values.numel()].view(state[key].shape)


OPTIMIZERS = [
    torch.optim.AdamW,
    bnb.optim.AdamW32bit,
    bnb.optim.AdamW8bit,
    bnb.optim.PagedAdamW32bit,
    bnb.optim.PagedAdamW8bit,
]


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_moments_are_rotated(optimizer_class):
    # large enough for 8-bit states: 64 x 64 numbers and more
    llama = tiny_llama(hidden_size=64, intermediate_size=100).to(DEVICE)
    model = get_peft_model(llama, loqt_config(optimizer_state="rotate", update_interval=3, r=64))
    layers = [layer for _, layer in loqt_layers(model)]
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for step in range(4):
        model.begin_step(step)
        tokens = token_batch(step).to(DEVICE)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        states = [optimizer.state[layer.loqt_B["default"]] for layer in layers]
        before = [
            (layer.projection("default").cpu(), moment_of(state)) for layer, state in zip(layers, states, strict=True)
        ]
        model.end_step(optimizer)
        optimizer.zero_grad()
    in_8_bits = [state.get("state1", torch.empty(0)).dtype == torch.uint8 for state in states]
    assert all(in_8_bits) == ("8bit" in optimizer_class.__name__)
    for layer, state, (P_old, moment) in zip(layers, states, before, strict=True):
        P_new = layer.projection("default").cpu()
        expected = moment @ P_old @ P_new.T if layer.right else P_new.T @ P_old @ moment
        assert expected.abs().max() > 0
        assert relative(moment_of(state), expected) <= 0.03


###############################
# What only a device can get wrong
###############################


def leave_in_pinned_memory(model, value):
    """Let the next tensors in pinned memory find old ones in their place, full of `value`."""
    if on_cuda:
        shapes = [layer.shape for _, layer in loqt_layers(model)]
        old = [torch.full(shape, value, pin_memory=True) for shape in shapes]
        assert all(map(torch.Tensor.is_pinned, old))


def late_update(factor, late, left, **config):
    """An update after a backward pass that a sleeping kernel keeps waiting, and so all copies to the host."""
    model = on_device(drifted_model(**config))
    tokens = token_batch(11).to(DEVICE)
    model.train()
    # what is loaded on first use waits for the device by itself
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad()
    model.begin_step(2)
    loss = model(input_ids=tokens, labels=tokens).loss * factor
    synchronize()
    leave_in_pinned_memory(model, left)
    if late:
        sleep()
    loss.backward()
    return model, model.end_step()


@pytest.mark.parametrize("update_mode", ["backward", "whole"])
def test_a_late_gradient_that_is_not_finite_postpones_the_update(update_mode):
    config = {"update_mode": update_mode, "offload_gradients": True}
    with pytest.warns(UserWarning, match="is not finite; the update is postponed"):
        model, update = late_update(torch.nan, late=True, left=1.0, **config)
    assert update is None
    for name, layer in loqt_layers(model):
        assert layer.update_pending("default") and layer.num_updates("default") == 2, name
        assert torch.isfinite(layer.projection("default")).all()


@pytest.mark.parametrize("update_mode", ["backward", "whole"])
def test_a_late_gradient_makes_the_same_update(update_mode):
    config = {"update_mode": update_mode, "offload_gradients": True}
    expected, _ = late_update(1.0, late=False, left=1.0, **config)
    model, update = late_update(1.0, late=True, left=torch.nan, **config)
    assert update is not None and update.num_updates == 3
    weights = {name: layer.effective_weight("default") for name, layer in loqt_layers(expected)}
    for name, layer in loqt_layers(model):
        assert relative(layer.effective_weight("default"), weights[name]) < 0.02, name


@pytest.mark.parametrize("is_last_backward", [None, lambda: True])
def test_fp16_with_a_skipped_step(is_last_backward):
    model = on_device(drifted_model())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    # the first step overflows, and is skipped
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**40)
    updates, before = [], {name: layer.effective_weight("default") for name, layer in loqt_layers(model)}
    model.train()
    for step in (2, 3):
        model.begin_step(step, is_last_backward)
        tokens = token_batch(step).to(DEVICE)
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = model(input_ids=tokens, labels=tokens).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update(2.0**10)
        with pytest.warns(UserWarning, match="the update is postponed") if step == 2 else nullcontext():
            updates.append(model.end_step(optimizer))
        if step == 2:
            assert all(torch.equal(layer.effective_weight("default"), before[n]) for n, layer in loqt_layers(model))
        optimizer.zero_grad()
    assert updates[0] is None and updates[1].num_updates == 3
    assert 0 < updates[1].gradient_energy <= 1


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group(
        "nccl" if on_cuda else "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def test_ddp_of_one_process_goes_on_from_a_drifted_adapter(tmp_path, process_group):
    drifted_model(full_rank_modules=None).save_pretrained(tmp_path / "adapter")

    def go_on(wrap):
        llama = tiny_llama().to(DEVICE)
        model = PeftModel.from_pretrained(llama, tmp_path / "adapter", is_trainable=True)
        wrapped, tokens = wrap(model), token_batch(9).to(DEVICE)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        model.train()
        for step in (2, 3):
            model.begin_step(step)
            wrapped(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            assert model.end_step(optimizer).num_updates == step + 1
            optimizer.zero_grad()
        return get_peft_model_state_dict(model)

    alone, wrapped = go_on(lambda model: model), go_on(DistributedDataParallel)
    for key in (key for key in alone if "loqt_B" in key):
        torch.testing.assert_close(wrapped[key], alone[key], rtol=1e-3, atol=1e-4)
