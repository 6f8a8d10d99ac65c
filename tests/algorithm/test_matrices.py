"""Storage formats, projections and compensation on bare matrices."""

import pytest
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit
from reference import dequantize, top_singular_vectors

from loqt_peft.algorithm.compensation import compensate
from loqt_peft.algorithm.projection import (
    captured_energy,
    expand,
    is_right,
    orthonormalize,
    project,
    projection_shape,
    random_projection,
)
from loqt_peft.algorithm.quantization import DenseFormat, FourBitFormat, storage_format
from loqt_peft.choices import PROJECTIONS


SHAPES = [(64, 64), (48, 32), (40, 80), (7, 5), (3, 50), (300, 70), (1, 1)]


###############################
# Storage
###############################


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_equals_bitsandbytes(shape, quant_type, double_quant, dtype):
    matrix = torch.randn(shape).to(dtype)
    storage = FourBitFormat(shape, quant_type, double_quant)
    packed = storage.pack(matrix)
    assert packed.dtype == torch.uint8 and packed.shape == (storage.nbytes,)
    codes, state = quantize_4bit(matrix, blocksize=64, quant_type=quant_type, compress_statistics=double_quant)
    assert torch.equal(storage.unpack(packed, dtype), dequantize(codes, state))

    x = torch.randn(4, shape[1], dtype=dtype, requires_grad=True)
    bias = torch.randn(shape[0], dtype=dtype)
    y = storage.linear(x, packed, bias)
    expected = torch.nn.functional.linear(x.detach(), storage.unpack(packed, dtype), bias)
    assert torch.allclose(y, expected, atol=2e-2 if dtype != torch.float32 else 1e-5)
    y.sum().backward()
    expected = torch.ones_like(y) @ storage.unpack(packed, dtype)
    assert torch.allclose(x.grad, expected, atol=5e-2 if dtype != torch.float32 else 1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_block(value):
    # a run that diverged must not end in an error about an index
    matrix = torch.randn(8, 64)
    storage = FourBitFormat((8, 64))
    expected = storage.unpack(storage.pack(matrix))
    matrix[3, 5] = value
    actual = storage.unpack(storage.pack(matrix))
    assert not torch.isfinite(actual[3]).all()
    others = torch.arange(8) != 3
    assert torch.equal(actual[others], expected[others])


def test_nf4_on_the_cpu_rounds_every_value_to_the_level_that_bitsandbytes_takes():
    levels = get_4bit_type("nf4", device="cpu")
    bounds = (levels[1:] + levels[:-1]) / 2
    # both neighbours in float32 of every bound, level and edge of a bin
    points = torch.cat([bounds, levels, torch.linspace(-1, 1, 65)])
    infinity = torch.tensor(torch.inf)
    points = torch.cat([points, points.nextafter(infinity), points.nextafter(-infinity)]).clamp(-1, 1)
    # absmax 1, so that the values are not rescaled; more blocks than are quantized at once
    blocks = torch.cat([points, torch.rand(62 - len(points) % 62) * 2 - 1]).view(-1, 62)
    blocks = torch.cat([blocks, torch.rand(3000, 62) * 2 - 1])
    matrix = torch.cat([torch.full((len(blocks), 1), -1.0), blocks, torch.ones(len(blocks), 1)], dim=1)
    storage = FourBitFormat(tuple(matrix.shape))
    codes, state = quantize_4bit(matrix, blocksize=64, quant_type="nf4")
    packed = storage.pack(matrix)
    assert torch.equal(packed[: codes.numel()], codes.flatten())
    assert torch.equal(storage.unpack(packed), dequantize(codes, state))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_empty_is_zero(shape, double_quant):
    storage = FourBitFormat(shape, "nf4", double_quant)
    assert not storage.unpack(storage.empty()).any()
    assert not storage.unpack(storage.pack(torch.zeros(shape))).any()


def test_size_is_what_4_bits_promise():
    n = 1024 * 1024
    assert FourBitFormat((1024, 1024)).nbytes == n // 2 + 4 * n // 64
    assert FourBitFormat((1024, 1024), double_quant=True).nbytes == n // 2 + n // 64 + 4 * n // 64 // 256 + 16


def test_dense_format():
    matrix = torch.randn(6, 4)
    storage = storage_format((6, 4), None, True, torch.bfloat16)
    assert storage == DenseFormat((6, 4), torch.bfloat16)
    packed = storage.pack(matrix)
    assert torch.equal(storage.unpack(packed), matrix.to(torch.bfloat16).float())
    # not a view of what it was made from
    assert DenseFormat((6, 4)).pack(matrix).data_ptr() != matrix.data_ptr()


###############################
# Projection
###############################


def gradient_with_spectrum(shape, decay=0.8):
    k = min(shape)
    U, _ = torch.linalg.qr(torch.randn(shape[0], k))
    V, _ = torch.linalg.qr(torch.randn(shape[1], k))
    return U @ torch.diag(decay ** torch.arange(k)) @ V.T


@pytest.mark.parametrize("method", ["svd", "eigh", "randomized"])
@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)])
@pytest.mark.parametrize("r", [1, 6, 32])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 65536.0])
def test_projection_spans_the_leading_singular_vectors(method, shape, r, scale):
    G = gradient_with_spectrum(shape)
    P = project(scale * G, r, method)
    right = is_right(shape)
    assert P.shape == projection_shape(shape, r) and P.dtype == torch.float32
    gram = P @ P.T if right else P.T @ P
    assert torch.allclose(gram, torch.eye(r), atol=1e-5)
    exact = top_singular_vectors(G, r)
    overlap = (P @ exact.T if right else P.T @ exact).square().sum() / r
    # eigenvalues below float32's resolution of the Gram matrix have arbitrary vectors
    assert overlap > (1 - 1e-4 if r <= 6 else 0.98)
    energy = captured_energy(G, P) / G.square().sum()
    singular_values = torch.linalg.svdvals(G)
    assert torch.allclose(energy, singular_values[:r].square().sum() / singular_values.square().sum(), atol=1e-4)


@pytest.mark.parametrize("shape", [(100, 40), (40, 100), (40, 40)])
def test_svd_resolves_what_float32_holds(shape):
    # the weakest direction wanted is 2e-5 of the strongest: in a Gram matrix of float32 it is nothing
    G, r = gradient_with_spectrum(shape, decay=0.7), 30
    P = project(G, r, "svd")
    exact = top_singular_vectors(G.double(), r).float()
    overlap = (P @ exact.T if is_right(shape) else P.T @ exact).square().sum() / r
    assert overlap > 1 - 1e-4


def test_randomized_projection_leaves_the_random_state_alone_and_repeats():
    G = torch.randn(40, 30)
    before = torch.get_rng_state()
    P = project(G, 5, "randomized")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(project(G, 5, "randomized"), P)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_random_projection_follows_the_seed_alone(shape):
    before = torch.get_rng_state()
    P = random_projection(shape, 5, seed=3)
    torch.set_rng_state(before)
    right = is_right(shape)
    assert torch.allclose(P @ P.T if right else P.T @ P, torch.eye(5), atol=1e-5)
    torch.randn(3)
    assert torch.equal(random_projection(shape, 5, seed=3), P)
    torch.set_rng_state(before)
    random_projection(shape, 5, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.allclose(random_projection(shape, 5, seed=4), P, atol=0.1)
    with pytest.raises(ValueError, match="r=31"):
        random_projection(shape, 31, seed=0)


def test_gradient_of_low_rank_still_gives_r_directions():
    G = torch.randn(40, 2) @ torch.randn(2, 30)
    for method in ("svd", "eigh", "randomized"):
        P = project(G, 6, method)
        assert torch.allclose(P @ P.T, torch.eye(6), atol=1e-4), method


@pytest.mark.parametrize("build", ["rank 1", "one row", "dominated", "zero"])
@pytest.mark.parametrize("shape", [(1024, 512), (512, 1024)])
def test_randomized_projection_of_degenerate_gradients(build, shape):
    # in float32 the Gram matrices of so wide a basis lose rank
    one = torch.randn(shape[0], 1) @ torch.randn(1, shape[1])
    G = {
        "rank 1": one,
        "one row": one * (torch.arange(shape[0]) == 3).unsqueeze(1),
        "dominated": 1e4 * one + 1e-2 * torch.randn(shape),
        "zero": torch.zeros(shape),
    }[build]
    P = project(G, 128, "randomized")
    inner = P @ P.T if is_right(shape) else P.T @ P
    assert torch.allclose(inner, torch.eye(128), atol=1e-4)
    stored = FourBitFormat(tuple(P.shape))
    assert captured_energy(G, stored.unpack(stored.pack(P))) >= 0.9 * G.square().sum()


@pytest.mark.parametrize("method", PROJECTIONS)
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_largest_entry_of_each_direction_is_positive(method, shape):
    # with the signs that a decomposition happens to give, NF4, which is not symmetric, would round another P
    G = torch.randn(shape)
    for gradient in (G, -G):
        P = random_projection(shape, 12, seed=0) if method == "random" else project(gradient, 12, method)
        directions = P if is_right(shape) else P.T
        assert (directions.amax(dim=1) >= -directions.amin(dim=1)).all()


@pytest.mark.parametrize("r", [0, 31])
def test_rank_out_of_range(r):
    with pytest.raises(ValueError, match=f"r={r}"):
        project(torch.randn(40, 30), r)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
def test_pseudo_inverse_equals_pinv(shape):
    right = shape[0] < shape[1]

    def pseudo_inverse(P):
        Q, T = orthonormalize(P, right)
        return Q.T @ T if right else T.T @ Q.T

    P = FourBitFormat(shape).unpack(FourBitFormat(shape).pack(torch.randn(shape)))
    assert torch.allclose(pseudo_inverse(P), torch.linalg.pinv(P), atol=1e-4)
    # a direction that 4 bits have rounded away
    if right:
        P[3] = 0
    else:
        P[:, 3] = 0
    assert torch.allclose(pseudo_inverse(P), torch.linalg.pinv(P), atol=1e-4)
    basis = orthonormalize(P, right)[0]
    inner = basis @ basis.T if right else basis.T @ basis
    expected = torch.eye(6)
    expected[3, 3] = 0
    assert torch.allclose(inner, expected, atol=1e-5)


###############################
# Compensation
###############################


@pytest.mark.parametrize("shape", [(64, 48), (48, 64)])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compensation_reports_the_error_that_it_leaves(shape, steps, dtype):
    W, P = torch.randn(shape), project(torch.randn(shape), 12, "svd")
    storage = FourBitFormat(shape)
    P = FourBitFormat(tuple(P.shape)).unpack(FourBitFormat(tuple(P.shape)).pack(P))
    result = compensate(W, P, storage, 0.5, steps, dtype)
    assert result.B.dtype == dtype
    approximation = storage.unpack(result.weight) + 0.5 * expand(P, result.B.float(), is_right(shape))
    assert torch.allclose(result.error_after, (W - approximation).square().sum(), rtol=1e-4)
    assert torch.allclose(result.error_before, (W - storage.unpack(storage.pack(W))).square().sum(), rtol=1e-5)
    assert result.error_after < result.error_before


@pytest.mark.parametrize("seed", range(8))
def test_more_iterations_never_end_worse(seed):
    # few directions: most of these iterations go up and down
    torch.manual_seed(seed)
    W, P = torch.randn(32, 24), project(torch.randn(32, 24), 3, "svd")
    storage = FourBitFormat(W.shape)
    results = [compensate(W, P, storage, 0.5, steps) for steps in range(8)]
    errors = [result.error_after.item() for result in results]
    assert errors == sorted(errors, reverse=True)
    for result in results:
        left = W - storage.unpack(result.weight) - 0.5 * expand(P, result.B, is_right(W.shape))
        assert torch.allclose(left.square().sum(), result.error_after, rtol=1e-4)


def test_no_steps_no_compensation():
    W, P = torch.randn(64, 48), project(torch.randn(64, 48), 24, "svd")
    result = compensate(W, P, FourBitFormat(W.shape), 0.5, 0)
    assert not result.B.any() and result.error_after == result.error_before


def test_rounding_to_16_bits_is_compensated_too():
    W, P = torch.randn(64, 48), project(torch.randn(64, 48), 24, "svd")
    result = compensate(W, P, DenseFormat((64, 48), torch.bfloat16), 0.5, 5)
    assert 0 < result.error_after < result.error_before
    exact = compensate(W, P, DenseFormat((64, 48), torch.float32), 0.5, 5)
    assert exact.error_after == 0 and not exact.B.any()
