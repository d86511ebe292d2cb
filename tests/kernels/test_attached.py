"""The fused functions inside models: whatever surrounds a host, it computes what the plain formula computes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine import tiny
from oracles.plain_formulas import (
    ROUNDINGS,
    Net,
    attached,
    close,
    fused,
    gradients,
    kept,
    nodes,
    plainly,
    same,
    size,
    step,
    trained,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from inlay.errors import UnsupportedError

KINDS = pytest.mark.parametrize("kind", ["lora", "dora"])


def checkpoint_blocks(model: Any, reentrant: bool) -> None:
    """Ask transformers to, by either of the names it has had for this."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


# -- inputs ------------------------------------------------------------------------------------------------------------


INPUTS: dict[str, Callable[[], Tensor]] = {
    "vector": lambda: torch.randn(6),
    "rows": lambda: torch.randn(9, 6),
    "four dimensions": lambda: torch.randn(2, 3, 2, 6),
    "no rows": lambda: torch.randn(0, 6),
    "no rows of many": lambda: torch.randn(2, 0, 6),
    "transposed": lambda: torch.randn(6, 9).t(),
    "swapped": lambda: torch.randn(3, 2, 6).transpose(0, 1),
    "expanded": lambda: torch.randn(1, 6).expand(5, 6),
    "sliced": lambda: torch.randn(9, 20)[1::2, 3:15:2],
}


@KINDS
@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_any_shape_and_stride_of_x(kind: str, given: str, p: float) -> None:
    model = attached(kind, dropout=p)
    x = INPUTS[given]().detach().requires_grad_()
    assert fused(model(x)) == 3
    same(model.train(p == 0), x)
    y, found = step(model.train(), x)
    assert y.isfinite().all()
    assert all(one.isfinite().all() for one in found)


@KINDS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("unfrozen", ["", "weight", "bias", "both"])
def test_a_base_that_trains_gets_its_gradients(kind: str, bias: bool, unfrozen: str) -> None:
    model = attached(kind, Net(bias=bias))
    for name, parameter in model.named_parameters():
        if "inlays" not in name and (unfrozen == "both" or name.endswith(unfrozen or "none")):
            parameter.requires_grad_()
    same(model, torch.randn(9, 6, requires_grad=True))


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_a_bf16_base_with_fp32_masters(kind: str) -> None:
    model = attached(kind, Net().bfloat16())
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    x = torch.randn(40, 6).bfloat16().requires_grad_()
    assert model(x).dtype == torch.bfloat16
    same(model, x, 8, torch.bfloat16)
    with kept(*model.parameters()) as found:
        model(x)
    assert all(t.dtype != torch.float32 or t.numel() <= 8 for t in found)  # norms, vectors: nothing of the size of x


# -- surroundings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast_around_the_forward_and_around_the_backward_or_not(kind: str, p: float) -> None:
    model, x = attached(kind, dropout=p), torch.randn(40, 6, requires_grad=True)
    parameters = [*trained(model).values(), x]
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        y = model(x)
        assert y.dtype == torch.bfloat16
        assert fused(y) == 3
        assert not any("AddLowRank" in node for node in nodes(y))  # each host in one function, base and all
        inside = gradients(y, *parameters)
        torch.manual_seed(1)
        again = model(x)
    outside = gradients(again, *parameters)
    assert torch.equal(y, again)
    for one, other in zip(inside, outside, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
    if p == 0:
        with torch.autocast("cpu", torch.bfloat16):
            same(model, x, 8, torch.bfloat16)


@KINDS
@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_whole_transformer_is_the_one_of_the_plain_formula(kind: str, name: str, autocast: bool) -> None:
    model: Any = attached(kind, tiny.build(name), targets="all-linear").eval()
    ids = torch.arange(2, 42).reshape(2, 20)

    def run() -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(input_ids=ids).last_hidden_state
        loss = (y.float() * torch.linspace(-1, 1.3, y.numel()).view(y.shape)).mean()
        return y, list(torch.autograd.grad(loss, list(trained(model).values()), allow_unused=True))

    y, found = run()
    assert fused(y) >= 12
    with plainly():
        truth, expected = run()
    close(y, truth, 16 if autocast else 64, torch.bfloat16 if autocast else None)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)  # BERT's pooler is no part of this output
        if one is not None and other is not None:
            close(one, other, 16 if autocast else 64, torch.bfloat16 if autocast else None)


@KINDS
@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(kind: str, name: str, reentrant: bool) -> None:
    model: Any = attached(kind, tiny.build(name), targets="all-linear", dropout=0.3)
    ids = torch.arange(2, 22).reshape(2, 10)

    def run() -> list[Tensor]:
        torch.manual_seed(7)
        model.zero_grad()
        model(input_ids=ids).last_hidden_state.square().sum().backward()
        return [p.grad.clone() for p in trained(model).values() if p.grad is not None]

    expected = run()
    with kept(*model.parameters()) as before:
        model(input_ids=ids)
    model.enable_input_require_grads()
    checkpoint_blocks(model, reentrant)
    with kept(*model.parameters()) as after:
        model(input_ids=ids)
    assert size(after) < size(before) / 2
    found = run()
    assert len(found) == len(expected) >= 14
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@KINDS
def test_a_checkpoint_of_a_part_under_autocast(kind: str) -> None:
    model, x = attached(kind, dropout=0.3), torch.randn(9, 6, requires_grad=True)
    parameters = [*trained(model).values(), x]
    found = []
    for through in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            y = through(x)
        found.append(gradients(y, *parameters))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@KINDS
def test_a_graph_can_be_gone_through_twice(kind: str) -> None:
    model, x = attached(kind, dropout=0.3), torch.randn(9, 6, requires_grad=True)
    y = model(x)
    parameters = [*trained(model).values(), x]
    once = torch.autograd.grad(y.sum(), parameters, retain_graph=True)
    twice = torch.autograd.grad(y.sum(), parameters)
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))


@KINDS
def test_a_penalty_on_gradients_is_that_of_the_plain_formula(kind: str) -> None:
    model, x = attached(kind).double(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def penalty() -> tuple[Tensor, ...]:
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [*trained(model).values(), x])

    found = penalty()
    with plainly():
        expected = penalty()
    for one, other in zip(found, expected, strict=True):
        close(one, other, 64)


@KINDS
def test_hooks_see_and_change_what_passes(kind: str) -> None:
    model, x = attached(kind), torch.randn(9, 6, requires_grad=True)
    y, expected = step(model, x)
    seen: list[Any] = []
    for module in (model, model.first, model.last):
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
        module.register_forward_hook(lambda m, args, out: seen.append(out.shape))
        module.register_full_backward_pre_hook(lambda m, dy: seen.append(dy[0].shape))
        module.register_full_backward_hook(lambda m, dx, dy: seen.append((dx[0].shape, dy[0].shape)))
    again, found = step(model, x)
    assert len(seen) == 12
    assert torch.equal(again, y)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    model.first.register_forward_hook(lambda m, args, out: out * 2)
    model.last.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 3,))
    same(model, x)


@KINDS
def test_an_activation_in_place_after_a_host(kind: str) -> None:
    base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 5))
    with refused(kind):
        same(attached(kind, base, targets="0,2"), torch.randn(9, 6, requires_grad=True))


def refused(kind: str) -> contextlib.AbstractContextManager[object]:
    """DoRA keeps its output, and says so where somebody writes into it."""
    wanted = pytest.raises(UnsupportedError, match="precision='exact'") if kind == "dora" else None
    return wanted or contextlib.nullcontext()


@KINDS
def test_what_comes_in_and_what_comes_out_may_be_changed_in_place_as_before(kind: str) -> None:
    """A residual that adds to a host's output in place, as some models do."""
    model = attached(kind)
    x = torch.randn(9, 6, requires_grad=True)

    def run() -> tuple[Tensor, list[Tensor]]:
        y = model.first(x)
        y += 1
        return y, gradients(y, *trained(model.first).values(), x)

    with plainly():
        truth, expected = run()
    with refused(kind):
        y, found = run()
    if kind == "dora":
        return
    close(y, truth, ROUNDINGS)
    for one, other in zip(found, expected, strict=True):
        close(one, other, ROUNDINGS)


@KINDS
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_shapes_alone(kind: str, p: float) -> None:
    """On the device without memory, which has no autocast to ask about."""
    with torch.device("meta"):
        model, x = attached(kind, dropout=p), torch.randn(9, 6, requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert (y.shape, y.device.type) == (attached(kind)(torch.randn(9, 6)).shape, "meta")
    assert all(parameter.grad is not None for parameter in trained(model).values())


@KINDS
def test_copies_and_inference_mode(kind: str) -> None:
    model, x = attached(kind), torch.randn(9, 6)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    with torch.inference_mode():
        assert torch.equal(model(x), y)
        born = attached(kind)  # where every tensor is made in inference mode
        assert born(x).shape == y.shape
    with torch.no_grad():
        assert torch.equal(model(x), y)
    same(model, x)


# -- torch.func, forward mode, compiling -------------------------------------------------------------------------------


@KINDS
def test_vmap_over_a_batch_and_over_parameters(kind: str) -> None:
    model, x = attached(kind), torch.randn(4, 9, 6)
    close(vmap(model)(x), model(x), ROUNDINGS)
    parameters = {name: torch.stack([p.detach(), p.detach() * 1.1]) for name, p in trained(model).items()}
    together = vmap(lambda values: functional_call(model, values, (x,)))(parameters)
    for i in range(2):
        close(together[i], functional_call(model, {n: p[i] for n, p in parameters.items()}, (x,)), ROUNDINGS)


@KINDS
def test_gradients_of_each_sample(kind: str) -> None:
    model, x = attached(kind), torch.randn(4, 6)
    parameters = {name: p.detach() for name, p in trained(model).items()}

    def loss(values: dict[str, Tensor], one: Tensor) -> Tensor:
        result: Tensor = functional_call(model, values, (one,)).square().sum()
        return result

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(4):
        expected = torch.autograd.grad(model(x[i]).square().sum(), list(trained(model).values()))
        for name, other in zip(parameters, expected, strict=True):
            close(found[name][i], other, ROUNDINGS)


@KINDS
def test_functional_gradients_of_every_parameter_with_the_base(kind: str) -> None:
    model, x = attached(kind).requires_grad_(True), torch.randn(4, 6)
    found = grad(lambda values: functional_call(model, values, (x,)).square().sum())(
        {name: p.detach() for name, p in model.named_parameters()}
    )
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for one, other in zip(found.values(), expected, strict=True):
        close(one, other, ROUNDINGS)


@KINDS
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in jvp
def test_forward_mode_is_the_transpose_of_the_backward(kind: str) -> None:
    """⟨J t, w⟩ = ⟨t, Jᵀ w⟩ with J by forward mode and Jᵀ by the fused backward, for tangents of x and the adapter."""
    model, x = attached(kind).double(), torch.randn(4, 6, dtype=torch.float64)
    values = {name: p.detach() for name, p in trained(model).items()}
    tangents = {name: torch.randn_like(p) for name, p in values.items()}
    dx = torch.randn_like(x)

    def function(values: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = functional_call(model, values, (x,))
        return result

    y, forward = jvp(function, (values, x), (tangents, dx))
    w = torch.randn_like(y)
    own = x.clone().requires_grad_()
    backward = torch.autograd.grad(model(own), [*trained(model).values(), own], w)
    expected = sum((one * other).sum() for one, other in zip(backward, [*tangents.values(), dx], strict=True))
    assert float((forward * w).sum()) == pytest.approx(float(expected), rel=1e-9)
    _, transpose = vjp(lambda x: function(values, x), x)
    close(transpose(w)[0], backward[-1], ROUNDINGS)
    _, along_x = jvp(lambda x: function(values, x), (x,), (dx,))
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(model(forward_ad.make_dual(x, dx))).tangent, along_x, ROUNDINGS)


@KINDS
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_compiles_in_one_graph(kind: str, p: float) -> None:
    torch.compiler.reset()
    model, x = attached(kind, dropout=p).train(p > 0), torch.randn(9, 6, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = step(compiled, x), step(model, x)
    if p == 0:
        close(found[0], expected[0], ROUNDINGS)
        for one, other in zip(found[1], expected[1], strict=True):
            close(one, other, ROUNDINGS)
