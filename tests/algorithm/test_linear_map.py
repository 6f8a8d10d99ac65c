"""The forward and backward pass of a layer, against matrices that are written out."""

import copy
import weakref
from functools import partial

import pytest
import torch
from common import load_llama, loqt_config, single_linear, tiny_llama, token_batch, train_steps
from peft import get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from loqt_peft.algorithm import linear_map as functional
from loqt_peft.algorithm.operations import cheapest, operations
from loqt_peft.layers.find import loqt_layers
from loqt_peft.training.switching import project_gradient


WAYS = ["branch", "thin", "weight"]
SHAPES = [(96, 64), (64, 96), (64, 64)]


def relative(actual, expected):
    return torch.linalg.norm(actual.float() - expected.float()) / torch.linalg.norm(expected.float())


@pytest.fixture
def force(monkeypatch):
    """Compute the products in one of the ways, whatever is cheapest."""
    return lambda way: monkeypatch.setattr(functional, "cheapest", lambda *args, **kwargs: way)


def drifted(shape, bias, dtype=torch.float32, **kwargs):
    """A layer after two switches, B not zero."""
    torch.manual_seed(0)
    bias = torch.randn(shape[0]) if bias else None
    model, layer = single_linear(torch.randn(shape) / 8, bias, loqt_alpha=0.3, **kwargs)
    model.to(dtype)
    for step in range(2):
        model.begin_step(step)
        model(torch.randn(32, shape[1], dtype=dtype)).square().mean().backward()
        assert model.end_step() is not None
        model.zero_grad()
    with torch.no_grad():
        layer.loqt_B["default"].normal_()
    return layer


def output_and_gradients(layer, forward, x, grad_y):
    layer.zero_grad()
    x = x.detach().clone().requires_grad_(x.requires_grad)
    y = forward(x)
    y.backward(grad_y)
    bias = layer.get_base_layer().bias
    return [y.detach(), x.grad, layer.loqt_B["default"].grad, None if bias is None else bias.grad]


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)])
@pytest.mark.parametrize("storage", ["nf4", None])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("bias, needs_x", [(False, True), (True, True), (True, False)])
def test_layer_equals_the_written_out_matrices(shape, storage, leading, bias, needs_x):
    layer = drifted(shape, bias, quantize_weight=storage, quantize_projection=storage)
    if bias:
        layer.get_base_layer().bias.requires_grad_(True)
    B, P = layer.loqt_B["default"], layer.projection("default")
    W = layer.weight_format("default").unpack(layer.loqt_weight["default"])

    def written_out(x):
        y = x @ (W + 0.3 * (B @ P if layer.right else P @ B)).T
        return y + layer.get_base_layer().bias if bias else y

    x, grad_y = torch.randn(*leading, shape[1], requires_grad=needs_x), torch.randn(*leading, shape[0])
    assert layer._can_fuse(x, ["default"])
    actual, expected = (output_and_gradients(layer, f, x, grad_y) for f in (layer, written_out))
    for mine, theirs in zip(actual, expected, strict=True):
        if theirs is None:
            assert mine is None
        else:
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_equal_separate_products_but_for_rounding(shape, dtype):
    layer = drifted(shape, bias=True)
    x, grad_y = torch.randn(4, 7, shape[1], requires_grad=True), torch.randn(4, 7, shape[0]).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        assert layer._can_fuse(x, ["default"])
        fused = output_and_gradients(layer, layer, x, grad_y)
        separate = output_and_gradients(layer, lambda x: layer._unfused_forward(x, ["default"]), x, grad_y)
    for mine, theirs in zip(fused[:3], separate[:3], strict=True):
        assert mine.dtype == theirs.dtype
        error = torch.linalg.norm(mine.float() - theirs.float()) / torch.linalg.norm(theirs.float())
        assert error <= 4 * torch.finfo(dtype).eps


def test_mixed_dtypes_are_left_to_separate_products():
    # PEFT keeps B in float32 beside weights of 16 bits
    layer = drifted((96, 64), bias=False, dtype=torch.bfloat16)
    layer.loqt_B["default"].data = layer.loqt_B["default"].data.float()
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    assert not layer._can_fuse(x, ["default"])
    assert layer(x).dtype == torch.bfloat16


###############################
# The way that the shapes ask for
###############################


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("needs_x, needs_B", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("records", [False, True])
def test_operations_are_those_that_torch_counts(way, shape, needs_x, needs_B, records, force):
    layer = drifted(shape, bias=False, quantize_weight=None, quantize_projection=None)
    layer.loqt_B["default"].requires_grad_(needs_B)
    if records := records and (needs_x or needs_B):
        layer.capture.start("default", partial(project_gradient, layer, "default"))
    force(way)
    x = torch.randn(50, shape[1], requires_grad=needs_x)
    mapping = {torch.ops.aten.addmm_: lambda _, a, b, **kwargs: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        y = layer(x)
        if y.requires_grad:
            y.sum().backward()
    assert counter.get_total_flops() == operations(50, shape, 8, needs_x, needs_B, records)[way]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [10, 50])
def test_nothing_is_computed_for_gradients_that_are_not_recorded(shape, rows):
    layer = drifted(shape, bias=False, quantize_weight=None, quantize_projection=None)
    x = torch.randn(rows, shape[1], requires_grad=True)
    mapping = {torch.ops.aten.addmm_: lambda _, a, b, **kwargs: 2 * a[0] * a[1] * b[1]}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        layer(x)
    assert counter.get_total_flops() == min(operations(rows, shape, 8, False, False).values())


@pytest.mark.parametrize(
    "flags, shape, r, rows, below, above",
    [
        # 2 r m < n r (out + in + max(out, in))
        ({}, (64, 64), 16, 42, "branch", "thin"),
        ({}, (96, 64), 16, 48, "branch", "thin"),
        ({}, (64, 96), 16, 48, "branch", "thin"),
        # n m + r m < n r (out + in)
        ({}, (64, 64), 49, 92, "thin", "weight"),
        ({"records": True}, (64, 64), 16, 38, "branch", "weight"),
        # forward only: m < n (out + in)
        ({"needs_x": False, "needs_B": False}, (64, 64), 16, 32, "branch", "thin"),
        ({"needs_x": False, "needs_B": False}, (4096, 4096), 1024, 2048, "branch", "thin"),
        ({"needs_x": False, "needs_B": False}, (4096, 4096), 4096, 1, "branch", "branch"),
    ],
)
def test_borders_of_the_choice(flags, shape, r, rows, below, above):
    assert cheapest(rows, shape, r, **flags) == below
    assert cheapest(rows + 1, shape, r, **flags) == above
    # a tie does not change the way, and the cost has no jump there
    for n in (rows, rows + 1):
        counted = operations(n, shape, r, **flags)
        assert counted[cheapest(n, shape, r, **flags)] == min(counted.values())


@pytest.mark.parametrize(
    "shape, r, rows", [((64, 64), 16, 42), ((64, 64), 49, 92), ((96, 64), 16, 48), ((64, 96), 16, 48)]
)
def test_both_sides_of_a_border_compute_the_same(shape, r, rows):
    layer = drifted(shape, bias=True, r=r)
    x, grad_y = torch.randn(rows, shape[1], requires_grad=True), torch.randn(rows, shape[0])
    more = [torch.cat([tensor.detach(), torch.zeros(1, tensor.shape[1])]) for tensor in (x, grad_y)]
    below = output_and_gradients(layer, layer, x, grad_y)
    above = output_and_gradients(layer, layer, more[0].requires_grad_(), more[1])
    for name, mine, theirs in zip(("y", "x", "B"), below, above, strict=False):
        assert relative(mine, theirs if name == "B" else theirs[:rows]) <= 1e-6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r", [8, 52, 64])
@pytest.mark.parametrize("records", [False, True])
def test_every_way_equals_the_written_out_matrices(way, shape, r, records, force):
    layer = drifted(shape, bias=True, r=r)
    layer.get_base_layer().bias.requires_grad_(True)
    B, P = layer.loqt_B["default"], layer.projection("default")
    W = layer.weight_format("default").unpack(layer.loqt_weight["default"])
    packed = copy.deepcopy(layer.loqt_weight["default"])
    x, grad_y = torch.randn(5, 20, shape[1], requires_grad=True), torch.randn(5, 20, shape[0])

    def written_out(x):
        return x @ (W + 0.3 * (B @ P if layer.right else P @ B)).T + layer.get_base_layer().bias

    expected = output_and_gradients(layer, written_out, x, grad_y)
    force(way)
    if records:
        layer.capture.start("default", partial(project_gradient, layer, "default"))
    for mine, theirs in zip(output_and_gradients(layer, layer, x, grad_y), expected, strict=True):
        assert mine.shape == theirs.shape and relative(mine, theirs) <= 1e-6
    if records:
        exact = grad_y.reshape(100, -1).T @ x.detach().reshape(100, -1)
        assert torch.equal(layer.capture.gradient, exact)
    assert torch.equal(layer.loqt_weight["default"], packed)


@pytest.mark.parametrize("way", ["thin", "weight"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_a_dense_weight_is_not_written_to(way, shape, force):
    layer = drifted(shape, bias=False, quantize_weight=None, quantize_projection=None)
    W, P = layer.loqt_weight["default"].clone(), layer.loqt_P["default"].clone()
    force(way)
    layer(torch.randn(100, shape[1], requires_grad=True)).sum().backward()
    assert torch.equal(layer.loqt_weight["default"], W) and torch.equal(layer.loqt_P["default"], P)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["thin", "weight"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
@pytest.mark.parametrize("records", [False, True])
def test_16_bits_are_as_near_to_float32_as_separate_products(dtype, way, shape, records, force):
    layer = drifted(shape, bias=False)
    x, grad_y = torch.randn(500, shape[1], requires_grad=True), torch.randn(500, shape[0])
    exact = output_and_gradients(layer, layer, x, grad_y)

    def errors(way):
        force(way)
        if records:
            layer.capture.start("default", partial(project_gradient, layer, "default"))
        with torch.autocast("cpu", dtype=dtype):
            found = output_and_gradients(layer, layer, x, grad_y.to(dtype))
        return [relative(mine, theirs) for mine, theirs in zip(found[:3], exact[:3], strict=True)]

    for mine, theirs in zip(errors(way), errors("branch"), strict=True):
        assert mine <= max(1.5 * theirs, torch.finfo(dtype).eps)


###############################
# What is kept
###############################


def kept_tensors(forward):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = forward()
    return y, kept


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows, r", [(20, 8), (20, 60), (100, 8), (100, 60), (200, 60)])
def test_the_smaller_activations_and_packed_matrices_are_kept(shape, rows, r):
    layer = drifted(shape, bias=False, r=r)
    x = torch.randn(rows, shape[1], requires_grad=True)
    _, kept = kept_tensors(lambda: layer(x))
    assert layer._can_fuse(x, ["default"])
    activations = (rows, r) if layer.right and (r == 8 or rows == 20) else (rows, shape[1])
    packed = {layer.loqt_weight["default"].shape, layer.loqt_P["default"].shape}
    assert {t.shape for t in kept} == {activations, layer.loqt_B["default"].shape} | packed


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_neighbours_keep_their_input_once(layout, dtype):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x):
            # of the layers below
            x = x * 1
            return self.q(x) + self.k(x) + self.v(x)

    config = loqt_config(r=60, target_modules=["q", "k", "v"], task_type=None)
    model = get_peft_model(Attention(), config)
    model.begin_step(0)
    model(torch.randn(100, 64)).square().sum().backward()
    model.end_step()
    x = torch.randn(4, 64, 25).mT if layout == "strided" else torch.randn(4, 25, 64)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        y, kept = kept_tensors(lambda: model(x))
    rows = [tensor for tensor in kept if tensor.shape == (100, 64) and tensor.is_floating_point()]
    assert len(rows) == 3 and len({tensor.untyped_storage().data_ptr() for tensor in rows}) == 1


@pytest.mark.parametrize(
    "refill",
    [lambda x, new: x.copy_(new), lambda x, new: x.data.copy_(new), lambda x, new: x.numpy().__setitem__(..., new)],
)
def test_a_batch_may_be_a_buffer_that_is_filled_anew(refill):
    layer, x, new = drifted((64, 96), bias=True), torch.zeros(100, 96), torch.randn(100, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).sum().backward()
        refill(x, new)
        assert torch.equal(layer(x), layer(new))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [2, 200])
@pytest.mark.parametrize("by", ["x", "B"])
@pytest.mark.parametrize("records", [False, True])
def test_a_second_derivative_of_a_layer_that_trains_is_refused(shape, rows, by, records):
    layer, x = drifted(shape, bias=True), torch.randn(rows, shape[1], requires_grad=True)
    if records:
        layer.capture.start("default", partial(project_gradient, layer, "default"))
    loss = layer(x).square().sum()
    with pytest.raises(RuntimeError, match="has no second derivative: create_graph=True"):
        torch.autograd.grad(loss, x if by == "x" else layer.loqt_B["default"], create_graph=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [2, 200])
def test_a_frozen_layer_has_a_second_derivative(shape, rows):
    layer, x = drifted(shape, bias=True), torch.randn(rows, shape[1], requires_grad=True)
    layer.requires_grad_(False)
    W, bias = layer.effective_weight("default"), layer.get_base_layer().bias

    def penalty(y):
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    assert relative(penalty(layer(x)), penalty(nn.functional.linear(x, W, bias))) <= 1e-5


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_input_lives_no_longer_than_its_layers_need_it(shape, dtype):
    x = torch.randn(shape)
    rows = functional._as_rows(x, dtype, keep=True)
    alive = weakref.ref(x)
    del x, rows
    assert alive() is None


###############################
# Whole models
###############################


@pytest.mark.parametrize("base", ["dense", "4bit-double"])
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("r", [4, 26])
def test_a_model_trains_as_with_separate_products(base, checkpointing, r, force, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model = get_peft_model(load_llama(tmp_path, base), loqt_config(r=r))
    train_steps(model, 2)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    model.train()
    tokens, found, forward = token_batch(5), [], []
    for way in (None, "branch"):
        if way:
            force(way)
        for records in (False, True):
            model.cancel_step()
            if records:
                model.begin_step(2)
            model.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            forward.append(loss.detach())
            found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
            found.append([layer.capture.gradient for _, layer in loqt_layers(model) if records])
    assert len(found[0]) >= 14 and len(found[3]) == 14
    for mine, theirs in zip(found[:4], found[4:], strict=True):
        assert all(relative(a, b) <= 2e-6 for a, b in zip(mine, theirs, strict=True))
    assert torch.allclose(forward[0], forward[2], rtol=1e-6)


@pytest.mark.parametrize("switches", [0, 2])
@pytest.mark.parametrize("captures", [False, True])
def test_output_can_be_written_to(switches, captures):
    # as DeBERTa does with those of its projections
    model, layer = single_linear(torch.randn(12, 8), torch.randn(12))
    for step in range(switches + 1):
        if step < switches or captures:
            model.begin_step(step)
        x = torch.randn(3, 5, 8)
        y = model(x)
        y += 1
        (y * torch.arange(12)).sum().backward()
        if step < switches:
            assert model.end_step() is not None
    if captures:
        expected = torch.arange(12.0).unsqueeze(1) * x.sum((0, 1))
        assert torch.allclose(layer.capture.gradient, expected, rtol=1e-5, atol=1e-5)
