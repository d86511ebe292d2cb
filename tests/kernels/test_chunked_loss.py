"""The chunked loss against the plain formula: loss and gradients, what it keeps, and what it never makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from inlay.errors import UnsupportedError
from inlay.kernels.chunked_loss import IGNORE, linear_cross_entropy, reference

TOKENS, WIDTH, CLASSES = 21, 8, 50


def problem(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x (3, 7, d), W, b and labels of which a third do not count."""
    x = torch.randn(3, 7, WIDTH, dtype=dtype).requires_grad_()
    weight = torch.randn(CLASSES, WIDTH, dtype=dtype).requires_grad_()
    offset = torch.randn(CLASSES, dtype=dtype).requires_grad_() if bias else None
    labels = torch.randint(0, CLASSES, (3, 7))
    return x, weight, offset, labels.masked_fill(torch.arange(7) % 3 == 0, IGNORE)


def gradients(loss: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss * 0.3, [tensor for tensor in inputs if tensor is not None])


@pytest.mark.parametrize("rows", [1, 4, 14, 1000, None])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_those_of_the_plain_formula(rows: int | None, bias: bool) -> None:
    x, weight, offset, labels = problem(torch.float64, bias)
    plain, chunked = reference(x, weight, offset, labels), linear_cross_entropy(x, weight, offset, labels, rows=rows)
    torch.testing.assert_close(chunked, plain)  # float64: 1e-7, of sums in another order
    for found, wanted in zip(gradients(chunked, x, weight, offset), gradients(plain, x, weight, offset), strict=True):
        torch.testing.assert_close(found, wanted)


# Rounding of the dtype, once in the logits' gradient and once in each product: 3 · 2⁻²⁴ and 3 · 2⁻⁹ of numbers that sum
# over 14 tokens or 50 classes.
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precisions_agree_within_their_rounding(dtype: torch.dtype, close: float) -> None:
    x, weight, offset, labels = problem(dtype)
    plain, chunked = reference(x, weight, offset, labels), linear_cross_entropy(x, weight, offset, labels, rows=4)
    assert chunked.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0)
    for found, wanted in zip(gradients(chunked, x, weight, offset), gradients(plain, x, weight, offset), strict=True):
        assert found.dtype == wanted.dtype == dtype
        torch.testing.assert_close(found, wanted, rtol=close, atol=close * float(wanted.abs().max()))


def test_under_autocast_logits_are_in_its_dtype() -> None:
    x, weight, offset, labels = problem()
    with torch.autocast("cpu", torch.bfloat16):
        plain, chunked = reference(x, weight, offset, labels), linear_cross_entropy(x, weight, offset, labels, rows=4)
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0)
    for found, wanted in zip(gradients(chunked, x, weight, offset), gradients(plain, x, weight, offset), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


def test_gradcheck() -> None:
    x, weight, offset, labels = problem(torch.float64)
    assert torch.autograd.gradcheck(lambda *t: linear_cross_entropy(*t, labels, rows=5), (x, weight, offset))
    with pytest.raises(UnsupportedError, match="no second derivative"):
        torch.autograd.grad(linear_cross_entropy(x, weight, offset, labels), x, create_graph=True)


def test_only_what_trains_gets_a_gradient_and_rows_that_do_not_count_get_zero() -> None:
    x, weight, _, labels = problem()
    loss = linear_cross_entropy(x, weight.detach(), None, labels)
    loss.backward()
    assert x.grad is not None
    assert weight.grad is None
    assert torch.equal(x.grad.abs().sum(-1) == 0, labels == IGNORE)
    nothing = linear_cross_entropy(x, weight, None, torch.full_like(labels, IGNORE))
    assert nothing.item() == 0
    assert all(not gradient.any() for gradient in gradients(nothing, x, weight))
    below = torch.where(labels == 7, 8, labels)
    torch.testing.assert_close(
        linear_cross_entropy(x, weight, None, below.masked_fill(labels == IGNORE, 7), ignore=7),
        linear_cross_entropy(x, weight, None, below),
    )


def saved_bytes(run: Any) -> int:
    """Bytes of the distinct storages that the graph holds, parameters left out."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf or not tensor.requires_grad:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    assert kept.requires_grad
    return sum(held.values())


def test_it_keeps_the_gradient_of_x_and_no_logits() -> None:
    x, weight, _, labels = problem()
    every = torch.randint(0, CLASSES, labels.shape)
    assert saved_bytes(lambda: linear_cross_entropy(x, weight.detach(), None, every, rows=4)) == TOKENS * WIDTH * 4
    both = saved_bytes(lambda: linear_cross_entropy(x, weight, None, every, rows=4))
    assert both == (TOKENS * WIDTH + CLASSES * WIDTH) * 4
    assert saved_bytes(lambda: reference(x, weight, None, every)) >= TOKENS * CLASSES * 4


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_nothing_larger_than_a_chunk_of_logits_is_made() -> None:
    x, weight, _, labels = problem()
    with Largest() as largest:
        linear_cross_entropy(x, weight.detach(), None, labels, rows=5).backward()
    assert largest.elements == max(5 * CLASSES, CLASSES * WIDTH)
    assert largest.elements < (labels != IGNORE).sum() * CLASSES


def test_function_transforms_take_the_plain_formula() -> None:
    x, weight, _, labels = problem(torch.float64)
    found = torch.func.grad(lambda x: linear_cross_entropy(x, weight.detach(), None, labels))(x.detach())
    torch.testing.assert_close(found, torch.autograd.grad(reference(x, weight, None, labels), x)[0])
