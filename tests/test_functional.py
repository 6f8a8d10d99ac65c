"""The forward and backward pass of a layer, against matrices that are written out."""

import pytest
import torch
from common import single_linear


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


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_only_thin_activations_and_packed_matrices_are_kept(shape):
    layer = drifted(shape, bias=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.randn(50, shape[1], requires_grad=True)
        layer(x)
    assert layer._can_fuse(x, ["default"])
    rows = (50, 8) if layer.right else (50, shape[1])
    packed = {layer.loqt_weight["default"].shape, layer.loqt_P["default"].shape}
    assert {t.shape for t in kept} == {rows, layer.loqt_B["default"].shape} | packed


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
        assert torch.allclose(layer.captured_gradient, expected, rtol=1e-5, atol=1e-5)
