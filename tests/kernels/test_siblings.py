"""Several LoRAs on one x as one function, against each by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from oracles.plain_formulas import close, gradients, kept, leaf, same_mask, size, twin
from torch import Tensor

from inlay.engine.linear import Linear
from inlay.kernels import dropout, low_rank
from inlay.kernels.siblings import Member, adapted

T, IN = 7, 6
OUTS, RANKS, SCALES = (4, 5, 3), (3, 1, 2), (0.7, 1.3, 0.2)
"""All different, so that a part that is taken for another one's shows."""


def family(
    dtype: torch.dtype = torch.float32,
    masters: torch.dtype | None = None,
    bias: bool = True,
    freeze: str = "",
    members: int = 3,
) -> list[Member]:
    made = []
    for out, r, scale in zip(OUTS[:members], RANKS, SCALES, strict=False):
        weight = leaf(out, IN, dtype=dtype, grad=False)
        base = Linear(weight, leaf(out, dtype=dtype) if bias else None, dtype)
        a, b = (leaf(r, IN, grad="a" not in freeze), leaf(out, r, grad="b" not in freeze))
        a, b = (t.detach().to(masters or dtype).requires_grad_(t.requires_grad) for t in (a, b))
        made.append(Member(base, a, b, scale))
    return made


def tensors_of(members: Sequence[Member]) -> list[Tensor]:
    """What may be trained."""
    return [t for m in members for t in (m.base.bias, m.a, m.b) if t is not None]


def twins(members: Sequence[Member]) -> list[Member]:
    """The same values in the precision of an oracle."""
    return [
        Member(Linear(m.base.weight.double(), twin(m.base.bias), torch.float64), twin(m.a), twin(m.b), m.scale)
        for m in members
    ]


def one_by_one(x: Tensor, members: Sequence[Member], mask: Tensor | None = None, p: float = 0.0) -> list[Tensor]:
    """In torch's own operations, all with this mask."""
    dropped = same_mask(x, mask)
    return [
        F.linear(x, m.base.weight, m.base.bias) + m.scale / (1 - p) * low_rank.linear(dropped, m.a, m.b)
        for m in members
    ]


def drawn(x: Tensor, p: float, seed: int = 5) -> Tensor | None:
    """The mask that the function draws after this seed."""
    torch.manual_seed(seed)
    mask = dropout.draw(x.shape, p, x.device) if p else None
    torch.manual_seed(seed)
    return mask


def weighted(outputs: Sequence[Tensor]) -> Tensor:
    """All outputs beside one another, for one gradient of all."""
    return torch.cat(tuple(outputs), -1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("members", [1, 2, 3])
def test_its_derivatives_are_those_of_finite_differences(bias: bool, p: float, members: int) -> None:
    x, made = leaf(2, 3, IN, dtype=torch.float64), family(torch.float64, bias=bias, members=members)

    def compute(*_: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        return adapted(x, made, p)

    assert torch.autograd.gradcheck(compute, [x, *tensors_of(made)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_it_equals_each_by_itself_with_the_one_mask(dtype: torch.dtype, masters: bool, p: float) -> None:
    x = leaf(4, 10, IN, dtype=dtype)
    made = family(dtype, torch.float32 if masters and dtype == torch.bfloat16 else dtype)
    mask, other_x, others = drawn(x, p), twin(x), twins(made)
    found, truth = adapted(x, made, p), one_by_one(other_x, others, mask, p)
    for y, expected in zip(found, truth, strict=True):
        assert y.dtype == dtype
        close(y, expected, 8)
    parts = [x, *tensors_of(made)]
    expected = gradients(weighted(truth), other_x, *tensors_of(others))
    for tensor, one, other in zip(parts, gradients(weighted(found), *parts), expected, strict=True):
        assert one.dtype == tensor.dtype
        close(one, other, 8, dtype)  # sums of up to 40 terms, and of three members


@pytest.mark.parametrize("p", [0.1, 0.4])
def test_all_of_them_drop_the_same_entries(p: float) -> None:
    """Members alike in everything give the same to rounding, as they would not with a mask of each."""
    x, member = leaf(50, IN), family(members=1)[0]
    first, *others = adapted(x, [member, member, member], p)
    for other in others:
        close(other, first)
    with pytest.raises(AssertionError, match="is more than"):
        close(adapted(x, [member, member, member], p)[0], first)  # another call: another mask
    torch.manual_seed(9)
    again = adapted(x, [member, member], p)
    torch.manual_seed(9)
    assert all(torch.equal(one, other) for one, other in zip(again, adapted(x, [member, member], p), strict=True))


@pytest.mark.parametrize("unread", [(0,), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_member_that_nobody_reads_has_no_gradient_and_gives_none(unread: tuple[int, ...], p: float) -> None:
    x, made = leaf(T, IN, dtype=torch.float64), family(torch.float64)
    mask = drawn(x, p)
    read = [n for n in range(3) if n not in unread]
    found, truth = adapted(x, made, p), one_by_one(x, made, mask, p)
    parts = [x, *tensors_of(made)]
    sums = [torch.cat([outputs[n] for n in read], -1).square().sum() for outputs in (found, truth)]
    results = [torch.autograd.grad(total, parts, allow_unused=True) for total in sums]
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, other, 16)
    assert sum(one is None for one in results[0]) == 3 * len(unread)


@pytest.mark.parametrize("freeze", ["", "a", "b"])
@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_frozen_changes_nothing_for_the_rest(freeze: str, need_x: bool, bias: bool) -> None:
    x, made = leaf(T, IN, dtype=torch.float64, grad=need_x), family(torch.float64, freeze=freeze, bias=bias)
    if freeze == "" and bias:
        made[1].a.requires_grad_(False)  # one of them only
    if not need_x and freeze == "b" and not bias:
        made[0].b.requires_grad_()
    parts = [x, *tensors_of(made)]
    found, truth = gradients(weighted(adapted(x, made)), *parts), gradients(weighted(one_by_one(x, made)), *parts)
    for one, other in zip(found, truth, strict=True):
        close(one, other, 16)


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (2, 0, IN), (2, 3, 2, IN)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x, made = leaf(*shape, dtype=torch.float64), family(torch.float64)
    found, truth = adapted(x, made), one_by_one(x, made)
    assert [y.shape for y in found] == [(*shape[:-1], out) for out in OUTS]
    parts = [x, *tensors_of(made)]
    for one, other in zip(gradients(weighted(found), *parts), gradients(weighted(truth), *parts), strict=True):
        close(one, other, 16)


def test_strided_inputs_and_gradients_and_outputs_changed_in_place() -> None:
    wide, made = leaf(IN, 9, dtype=torch.float64), family(torch.float64)
    results = []
    for compute in (adapted, one_by_one):
        q, k, v = compute(wide.t(), made)
        q.mul_(2)
        total = (q.t()[::2]).square().sum() + k[1::3].sum() + v.t().exp().sum()
        results.append(torch.autograd.grad(total, [wide, *tensors_of(made)]))
    for one, other in zip(*results, strict=True):
        close(one, other, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("freeze", ["", "a", "b"])
def test_it_keeps_x_and_all_h_and_one_mask(dtype: torch.dtype, p: float, freeze: str) -> None:
    x, made = leaf(T, IN, dtype=dtype), family(dtype, freeze=freeze)
    with kept(*(t for m in made for t in (m.base.weight, m.base.bias, m.a, m.b))) as found:
        adapted(x, made, p)
    expected = [] if freeze == "a" else [(T, IN)]
    expected += [] if freeze == "b" else [(T, sum(RANKS))]
    assert [tuple(t.shape) for t in found] == expected + ([(math.ceil(T * IN / 8),)] if p else [])
    elements = sum(math.prod(shape) for shape in expected)
    assert size(found) == elements * x.element_size() + (math.ceil(T * IN / 8) if p else 0)
    assert freeze == "a" or found[0].data_ptr() == x.data_ptr()


def test_a_second_derivative_is_refused() -> None:
    x, made = leaf(T, IN, dtype=torch.float64), family(torch.float64)
    first = torch.autograd.grad(weighted(adapted(x, made)).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_gradients_of_many_outputs_at_once() -> None:
    x, made = leaf(T, IN, dtype=torch.float64), family(torch.float64)
    parts, y = [x, *tensors_of(made)], weighted(adapted(x, made, 0.4))
    dys = torch.randn(4, *y.shape, dtype=torch.float64)
    together = torch.autograd.grad(y, parts, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for one, other in zip(together, torch.autograd.grad(y, parts, dy, retain_graph=True), strict=True):
            close(one[i], other, 16)


def test_autocast_around_the_forward() -> None:
    x, made = leaf(40, IN), family()
    parts = [x, *tensors_of(made)]
    with torch.autocast("cpu", torch.bfloat16):
        found = adapted(x, made)
        inside = gradients(weighted(found), *parts)
        again = adapted(x, made)
    outside = gradients(weighted(again), *parts)
    truth = one_by_one(twin(x), twins(made))
    for y, expected in zip(found, truth, strict=True):
        assert y.dtype == torch.bfloat16
        close(y, expected, 8)
    for one, other in zip(inside, outside, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_quantised_weights_are_decoded_and_not_kept() -> None:
    """Each with the function that gives its values; some may be plain."""

    def decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype) / 64

    x, made = leaf(T, IN, dtype=torch.float64), family(torch.float64)
    codes = [torch.randint(-99, 99, (out, IN), dtype=torch.int8) for out in OUTS[:2]]
    bases = [Linear(w, m.base.bias, torch.float64, decode) for w, m in zip(codes, made[:2], strict=True)]
    quantised = [m._replace(base=base) for m, base in zip(made, [*bases, made[2].base], strict=True)]
    plain = [m._replace(base=b._replace(weight=b.weight.double() / (64 if b.decode else 1)))
             for m in quantised for b in [m.base]]  # fmt: skip
    parts = [x, *tensors_of(made)]
    with kept(*parts, *codes, made[2].base.weight) as found:
        y = weighted(adapted(x, quantised))
    assert [t.shape for t in found] == [(T, sum(RANKS))]
    truth = weighted(one_by_one(x, plain))
    close(y, truth, 8)
    for one, other in zip(gradients(y, *parts), gradients(truth, *parts), strict=True):
        close(one, other, 16)
