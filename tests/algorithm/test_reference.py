"""The layer against the slow reference, and against GaLore."""

import pytest
import torch
import torch.nn.functional as F
from common import single_linear
from peft import get_peft_model
from reference import ReferenceLinear, quantize_dequantize, top_singular_vectors
from torch import nn

from loqt_peft import LoQTConfig


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)])
@pytest.mark.parametrize(
    "quantize_weight, quantize_projection, double_quant, error_feedback",
    [
        ("nf4", "nf4", False, False),
        ("nf4", "nf4", False, True),
        ("nf4", "nf4", True, False),
        ("fp4", None, False, False),
        ("fp4", None, True, True),
        (None, "nf4", False, False),
        (None, None, False, False),
    ],
)
@pytest.mark.parametrize("K", [0, 5])
def test_layer_follows_the_reference_through_switches(
    shape, quantize_weight, quantize_projection, double_quant, error_feedback, K
):
    # a seed with which no element lies so near the middle of two levels that its last bits choose between them
    generator = torch.Generator().manual_seed(8)
    W = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    kwargs = {
        "quantize_weight": quantize_weight,
        "quantize_projection": quantize_projection,
        "double_quant": double_quant,
        "error_feedback": error_feedback,
    }
    reference = ReferenceLinear(W, 8, 0.5, K, **kwargs)
    model, layer = single_linear(W, loqt_alpha=0.5, compensation_steps=K, update_interval=4, **kwargs)
    target = torch.randn(shape, generator=generator) / shape[1] ** 0.5

    optimizers = [torch.optim.AdamW([p], lr=1e-2) for p in (reference.B, layer.loqt_B["default"])]
    for step in range(10):
        # a spectrum with gaps: where singular values are close, rounding decides on the vectors
        x = torch.randn(256, shape[1], generator=generator) * 0.85 ** torch.arange(shape[1])
        due = model.begin_step(step)
        assert due == (step in (0, 4, 8))

        weight = reference.weight()
        weight.retain_grad()
        F.mse_loss(x @ weight.T, x @ target.T).backward()
        F.mse_loss(model(x), x @ target.T).backward()
        assert torch.allclose(layer.loqt_B["default"].grad, reference.B.grad, rtol=1e-3, atol=1e-7)

        for optimizer in optimizers:
            optimizer.step()
        merged = reference.weight().detach() + reference.error
        change = reference.low_rank(reference.B).detach()
        if due:
            reference.switch(weight.grad)
        update = model.end_step(optimizers[1])
        assert (update is not None) == due
        if due:
            assert update.merged_change == pytest.approx(relative(change, merged), rel=1e-4)
            left = relative(merged - reference.weight().detach(), merged)
            assert update.quantization_error_after == pytest.approx(left, rel=1e-3, abs=1e-6)
            rounded = quantize_dequantize(merged, quantize_weight, double_quant)
            assert update.quantization_error_before == pytest.approx(relative(merged - rounded, merged), rel=1e-3)
        for optimizer in optimizers:
            optimizer.zero_grad()

        expected, actual = reference.weight().detach(), layer.effective_weight("default")
        assert torch.linalg.norm(actual - expected) <= 1e-5 * torch.linalg.norm(expected)
        assert ("default" in layer.loqt_error) is error_feedback
        if error_feedback:
            left_over = layer.weight_format("default").unpack(layer.loqt_error["default"])
            assert torch.linalg.norm(left_over - reference.error) <= 1e-3 * torch.linalg.norm(reference.error)
        if due:
            # Both are right by now. Rounding to 4 bits turns their last bits into whole levels at the next switch, so they
            # go on from the same one.
            reference.synchronize(layer)
        expected, actual = reference.forward(x).detach(), model(x).detach()
        assert torch.linalg.norm(actual - expected) <= 1e-5 * torch.linalg.norm(expected)


@pytest.mark.parametrize("K", [0, 5])
def test_with_error_feedback_errors_do_not_add_up(K):
    torch.manual_seed(0)
    W = torch.randn(96, 64) / 8
    errors = {}
    for feedback in (False, True):
        # P turns with each of the twelve switches, so that compensation has something else to take up; nothing is learned
        model, layer = single_linear(W, compensation_steps=K, update_interval=1, error_feedback=feedback)
        errors[feedback] = []
        torch.manual_seed(1)
        for step in range(12):
            model.begin_step(step)
            (model(torch.randn(32, 64)) * torch.randn(32, 96)).sum().backward()
            model.end_step()
            errors[feedback].append(relative(layer.effective_weight("default") - W, W))
    assert errors[True][0] == errors[False][0]
    if K:
        assert errors[False][-1] > 1.3 * errors[False][0]
    assert max(errors[True]) < 1.1 * errors[True][0]
    # what is lost of an error in 4 bits is a tenth of a tenth
    kept = layer.effective_weight("default") + layer.weight_format("default").unpack(layer.loqt_error["default"])
    assert relative(kept - W, W) < 0.04


def relative(X, Y):
    return (torch.linalg.norm(X) / torch.linalg.norm(Y)).item()


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_training_b_under_a_constant_projection_is_galore(optimizer_class):
    # Paper §3.2: with W dense and P fixed, stepping B on PB moves W as GaLore's projected optimizer does.
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(24, 40, bias=False), nn.Tanh(), nn.Linear(40, 16, bias=False))
    config = LoQTConfig(
        r=4,
        loqt_alpha=1.0,
        target_modules=["0", "2"],
        quantize_weight=None,
        quantize_projection=None,
        projection="svd",
        update_interval=1000,
    )
    model = get_peft_model(
        nn.Sequential(*(nn.Linear(24, 40, bias=False), nn.Tanh(), nn.Linear(40, 16, bias=False))), config
    )
    layers = [model.base_model.model[0], model.base_model.model[2]]
    weights = [dense[0].weight, dense[2].weight]
    with torch.no_grad():
        for layer, weight in zip(layers, weights, strict=True):
            layer.base_layer.weight.copy_(weight)

    def batch():
        x = torch.randn(32, 24)
        return x, torch.sin(x[:, :16] * 3)

    # step 0 gives P to both
    x, y = batch()
    model.begin_step(0)
    F.mse_loss(model(x), y).backward()
    model.end_step()
    model.zero_grad()
    F.mse_loss(dense(x), y).backward()
    projections = [top_singular_vectors(weight.grad, 4) for weight in weights]
    dense.zero_grad()

    lr = 0.1 if optimizer_class is torch.optim.SGD else 1e-2
    compact = [nn.Parameter(torch.zeros_like(layer.loqt_B["default"])) for layer in layers]
    galore = optimizer_class(compact, lr=lr, weight_decay=0)
    loqt = optimizer_class([layer.loqt_B["default"] for layer in layers], lr=lr, weight_decay=0)
    for step in range(1, 21):
        x, y = batch()
        assert not model.begin_step(step)
        F.mse_loss(model(x), y).backward()
        loqt.step()
        loqt.zero_grad()

        F.mse_loss(dense(x), y).backward()
        before = [p.detach().clone() for p in compact]
        for p, weight, P in zip(compact, weights, projections, strict=True):
            p.grad = weight.grad @ P.T if weight.shape[0] >= weight.shape[1] else P.T @ weight.grad
        galore.step()
        with torch.no_grad():
            for p, old, weight, P in zip(compact, before, weights, projections, strict=True):
                change = p - old
                weight += change @ P if weight.shape[0] >= weight.shape[1] else P @ change
        dense.zero_grad()

    for layer, weight in zip(layers, weights, strict=True):
        learned = torch.linalg.norm(layer.low_rank_weight("default"))
        assert learned > 0
        assert torch.linalg.norm(layer.effective_weight("default") - weight) <= 1e-4 * learned


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_outputs_move_by_the_reported_quantization_error(shape):
    torch.manual_seed(0)
    W = torch.randn(shape) / 8
    model, layer = single_linear(W)
    for step in range(3):
        x = torch.randn(32, shape[1])
        before_weight, before = layer.effective_weight("default"), model(x).detach()
        model.begin_step(step)
        model(x).square().mean().backward()
        # no optimizer step: whatever moves the weight now is the switch
        update = model.end_step()
        model.zero_grad()
        moved = torch.linalg.norm(layer.effective_weight("default") - before_weight)
        reported = update.quantization_error_after * torch.linalg.norm(before_weight)
        assert torch.allclose(moved, reported, rtol=1e-4)
        assert torch.linalg.norm(model(x) - before) <= reported * torch.linalg.matrix_norm(x, 2) * (1 + 1e-4)
        assert update.quantization_error_after <= update.quantization_error_before
