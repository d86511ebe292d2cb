"""The second half of a gated feed-forward network as one function: LoRA on f(g) ⊙ u, which keeps g, u and h alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from oracles.plain_formulas import SCALE, close, gradients, kept, leaf, lora, size, twin
from torch import Tensor

from inlay.engine.linear import Linear
from inlay.kernels import dropout
from inlay.kernels.gated import GatedLowRank, adapted
from inlay.kernels.lora import LowRankLinear

T, M, OUT, R = 7, 6, 4, 3
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "tanh gelu": torch.nn.GELU("tanh")}


def operands(*shape: int, dtype: torch.dtype = torch.float32, needs: tuple[bool, ...] = (True,) * 5) -> list[Tensor]:
    """g, u, b, A, B; and W, frozen as it always is, last."""
    sizes = [shape or (T, M), shape or (T, M), (OUT,), (R, M), (OUT, R)]
    trained = [leaf(*one, dtype=dtype, grad=need) for one, need in zip(sizes, needs, strict=True)]
    return [*trained, leaf(OUT, M, dtype=dtype, grad=False)]


def fused(f: object, tensors: list[Tensor], mask: Tensor | None = None) -> Tensor:
    g, u, bias, a, b, weight = tensors
    result: Tensor = GatedLowRank.apply(f, g, u, weight, bias, a, b, SCALE, g.dtype, mask, None)
    return result


def plain(f: object, tensors: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """In torch's own operations."""
    g, u, bias, a, b, weight = tensors
    return lora(f(g) * u, weight, bias, a, b, mask)


@pytest.mark.parametrize("activation", ["silu", "gelu", "tanh gelu"])  # relu has no derivative at 0
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_its_derivatives_are_those_of_finite_differences(activation: str, p: float) -> None:
    tensors = operands(2, 3, M, dtype=torch.float64)
    mask = dropout.draw(tensors[0].shape, p, torch.device("cpu")) if p else None
    f, weight = ACTIVATIONS[activation], tensors.pop()
    assert torch.autograd.gradcheck(lambda *t: fused(f, [*t, weight], mask), tensors)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_it_equals_lora_on_the_product_bit_for_bit(activation: str, dtype: torch.dtype, p: float) -> None:
    tensors = [leaf(3, 5, 40), leaf(3, 5, 40), leaf(24), leaf(R, 40), leaf(24, R), leaf(24, 40, grad=False)]
    kinds = [dtype] * 3 + [torch.float64 if dtype == torch.float64 else torch.float32] * 2 + [dtype]
    tensors = [t.detach().to(k).requires_grad_(t.requires_grad) for t, k in zip(tensors, kinds, strict=True)]
    f, mask = ACTIVATIONS[activation], dropout.draw(torch.Size((3, 5, 40)), p, torch.device("cpu")) if p else None
    g, u, bias, a, b, weight = tensors
    y = fused(f, tensors, mask)
    parts = LowRankLinear.apply(f(g) * u, weight, bias, a, b, SCALE, dtype, mask, None, None)
    assert y.dtype == dtype
    assert torch.equal(y, parts)
    for one, other in zip(gradients(y, *tensors), gradients(parts, *tensors), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_it_equals_the_formula_in_torchs_own_operations(dtype: torch.dtype, p: float) -> None:
    tensors = operands(20, M, dtype=dtype)
    mask = dropout.draw(torch.Size((20, M)), p, torch.device("cpu")) if p else None
    alone = [twin(t) for t in tensors]
    y, truth = fused(F.silu, tensors, mask), plain(F.silu, alone, mask)
    close(y, truth, 8)  # products of up to 20 terms; the product is rounded before, and h
    for one, other in zip(gradients(y, *tensors), gradients(truth, *alone), strict=True):
        close(one, other, 8)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=5))[:-1])
def test_every_choice_of_what_is_trained_gives_the_same_gradients(needs: tuple[bool, ...]) -> None:
    tensors = operands(dtype=torch.float64, needs=needs)
    alone = [twin(t) for t in tensors]
    found, expected = gradients(fused(F.silu, tensors), *tensors), gradients(plain(F.silu, alone), *alone)
    for one, other in zip(found, expected, strict=True):
        close(one, other, 16)


@pytest.mark.parametrize("shape", [(M,), (0, M), (2, 0, M), (2, 3, 2, M)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    tensors = operands(*shape, dtype=torch.float64)
    y = fused(F.silu, tensors)
    assert y.shape == (*shape[:-1], OUT)
    for one, other in zip(gradients(y, *tensors), gradients(plain(F.silu, tensors), *tensors), strict=True):
        close(one, other, 16)


def test_strided_inputs_and_gradients() -> None:
    wide = leaf(M, 9, 2, dtype=torch.float64)
    _, _, *rest = operands(dtype=torch.float64)
    results = []
    for compute in (fused, plain):
        g, u = wide[..., 0].t(), wide[..., 1].t()
        y = compute(F.silu, [g, u, *rest])
        results.append(torch.autograd.grad(y.t()[::2].square().sum(), [wide, *rest[:-1]]))
    for one, other in zip(*results, strict=True):
        close(one, other, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_it_keeps_g_and_u_and_h_and_neither_the_activation_nor_the_product(dtype: torch.dtype, p: float) -> None:
    g, u, bias, a, b, weight = operands(dtype=dtype)
    base = Linear(weight, bias, dtype)
    with kept(weight, bias, a, b) as found:
        adapted(F.silu, g, u, base, a, b, SCALE, p)
    assert [t.data_ptr() for t in found[:2]] == [g.data_ptr(), u.data_ptr()]
    assert [t.shape for t in found[2:]] == [(T, R), *([(math.ceil(T * M / 8),)] if p else [])]
    assert size(found) == (2 * T * M + T * R) * g.element_size() + (math.ceil(T * M / 8) if p else 0)
    with kept(weight, bias, a, b, g, u) as others:
        lora(F.silu(g) * u, weight, bias, a, b)
    assert sum(t.shape == (T, M) for t in others) == 2  # f(g) and the product, which are kept besides otherwise


def test_h_is_not_kept_for_a_frozen_b() -> None:
    g, u, bias, a, b, weight = operands(needs=(True, True, False, True, False))
    with kept(weight, bias, a, b) as found:
        fused(F.silu, [g, u, bias, a, b, weight])
    assert [t.data_ptr() for t in found] == [g.data_ptr(), u.data_ptr()]


def test_the_same_seed_gives_the_same_mask_as_lora_draws_for_the_product() -> None:
    g, u, bias, a, b, weight = operands(40, M)
    base = Linear(weight, bias, g.dtype)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(adapted(F.silu, g, u, base, a, b, SCALE, 0.5))
    torch.manual_seed(3)
    mask = dropout.draw(g.shape, 0.5, g.device)
    expected = LowRankLinear.apply(F.silu(g) * u, weight, bias, a, b, SCALE / 0.5, g.dtype, mask, None, None)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], expected)
    assert not torch.equal(results[0], adapted(F.silu, g, u, base, a, b, SCALE, 0.5))


def test_a_second_derivative_is_refused() -> None:
    tensors = operands(dtype=torch.float64)
    first = torch.autograd.grad(fused(F.silu, tensors).square().sum(), tensors[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_gradient_can_be_taken_twice_and_leaves_what_came_in_alone() -> None:
    tensors = operands(dtype=torch.float32)
    before = [t.detach().clone() for t in tensors]
    y = fused(F.silu, tensors, dropout.draw(torch.Size((T, M)), 0.4, torch.device("cpu")))
    dy = torch.randn_like(y)
    copy = dy.clone()
    once = torch.autograd.grad(y, tensors[:-1], dy, retain_graph=True)
    twice = torch.autograd.grad(y, tensors[:-1], dy)
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))
    assert torch.equal(dy, copy)
    assert all(torch.equal(t, old) for t, old in zip(tensors, before, strict=True))


def test_autocast_around_the_forward_and_around_the_backward_or_not() -> None:
    """What the linears before gave is bfloat16 already; A and B, and the frozen weight, are float32."""
    tensors = operands(40, M)
    g, u = (t.detach().bfloat16().requires_grad_() for t in tensors[:2])
    bias, a, b, weight = tensors[2:]
    base = Linear(weight, bias, weight.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted(F.silu, g, u, base, a, b, SCALE)
        inside = gradients(y, g, u, bias, a, b)
        again = adapted(F.silu, g, u, base, a, b, SCALE)
    outside = gradients(again, g, u, bias, a, b)
    alone = [twin(t) for t in (g, u, bias, a, b, weight)]
    truth = plain(F.silu, alone)
    assert y.dtype == torch.bfloat16
    close(y, truth, 8)
    for one, other, expected in zip(inside, outside, gradients(truth, *alone), strict=True):
        assert torch.equal(one, other)
        close(one, expected, 8, torch.bfloat16)


def test_a_quantised_weight_is_decoded_and_not_kept() -> None:
    g, u, bias, a, b, _ = operands(dtype=torch.float64)
    codes = torch.randint(-99, 99, (OUT, M), dtype=torch.int8)
    base = Linear(codes, bias, g.dtype, lambda weight, dtype: weight.to(dtype) / 64)
    parts = [g, u, bias, a, b]
    with kept(*parts, codes) as found:
        y = adapted(F.silu, g, u, base, a, b, SCALE)
    assert [t.shape for t in found] == [(T, R)]
    truth = plain(F.silu, [*parts, codes.double() / 64])
    close(y, truth, 8)
    for one, other in zip(gradients(y, *parts), gradients(truth, *parts), strict=True):
        close(one, other, 16)
