"""pack: the same bits from a second copy of the weights, wherever rows are few; the ordinary way elsewhere."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine.small import randomise
from engine.tiny import build
from torch import Tensor, nn

import inlay
from inlay.engine.host import hosts
from inlay.errors import TargetError, UnsupportedError
from inlay.kernels import packed

pytestmark = pytest.mark.skipif(packed.missing() is not None, reason=f"pack: {packed.missing()}")
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    """Two linears in bf16, of sizes that are multiples of nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(37, 53), nn.Tanh(), nn.Linear(53, 11, bias=False)).bfloat16().eval()


def inputs(rows: int = 3) -> Tensor:
    return torch.randn(rows, 37, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product with a packed weight."""
    seen: list[int] = []
    product = packed.product

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(x.numel() // x.shape[-1])
        return product(x, weight, bias)

    monkeypatch.setattr(packed, "product", counted)
    return seen


@pytest.mark.parametrize("shape", [(1, 37), (5, 37), (128, 37), (2, 3, 37), (37,), (2, 1, 4, 37)])
@torch.no_grad()
def test_the_bits_are_those_of_the_linear(shape: tuple[int, ...], calls: list[int]) -> None:
    model, x = net(), torch.randn(*shape).bfloat16()
    expected = model(x)
    assert torch.equal(inlay.pack(model)(x), expected)
    assert len(calls) == 2


@pytest.mark.parametrize("sizes", [(64, 64), (1000, 384), (384, 1000), (1, 7), (7, 1), (513, 33)])
@torch.no_grad()
def test_weights_of_any_size(sizes: tuple[int, int]) -> None:
    linear = nn.Linear(*sizes).bfloat16()
    x = torch.randn(4, sizes[0]).bfloat16()
    expected = linear(x)
    assert torch.equal(inlay.pack(linear)(x), expected)


def _autocast(model: nn.Module) -> Any:
    with torch.autocast("cpu", torch.float16):
        return model(inputs())


ORDINARY: dict[str, Callable[[nn.Module], Any]] = {
    "many rows": lambda model: model(inputs(129)),
    "no rows": lambda model: model(inputs(0)),
    "autocast to fp16": _autocast,
}


@pytest.mark.parametrize("name", ORDINARY)
@torch.no_grad()
def test_what_goes_the_ordinary_way(name: str, calls: list[int]) -> None:
    model = net()
    expected = ORDINARY[name](model)
    assert torch.equal(ORDINARY[name](inlay.pack(model)), expected)
    assert not calls


def test_with_gradients_it_is_the_ordinary_linear(calls: list[int]) -> None:
    model = net()
    gradients = torch.autograd.grad(model(inputs()).sum(), [*model.parameters()])
    found = torch.autograd.grad(inlay.pack(model)(inputs()).sum(), [*model.parameters()])
    assert all(map(torch.equal, found, gradients))
    assert not calls


METHODS = [
    inlay.LoRA(r=2, targets="all-linear"),
    inlay.DoRA(r=2, targets="all-linear"),
    inlay.IA3(targets="0,2", feedforward="2"),
    inlay.Adapter(targets="0"),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
@torch.no_grad()
def test_under_adapters(method: inlay.Method, calls: list[int]) -> None:
    model = inlay.attach(net(), method)
    randomise(model)
    expected = model(inputs())
    inlay.pack(model)
    torch.testing.assert_close(model(inputs()), expected, rtol=2e-2, atol=2e-2)  # two roundings to bf16 apart
    with inlay.disabled(model):
        assert torch.equal(model(inputs()), net()(inputs()))
    assert calls


@torch.no_grad()
def test_trained_copies_and_merged_weights_are_seen(calls: list[int]) -> None:
    model = inlay.pack(inlay.attach(net(), [inlay.LoRA(r=2, targets="2"), inlay.FullFineTuning(targets="0")]))
    randomise(model)
    ordinary = inlay.attach(net(), [inlay.LoRA(r=2, targets="2"), inlay.FullFineTuning(targets="0")])
    ordinary.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(inputs()), ordinary(inputs()), rtol=2e-2, atol=2e-2)
    for one in (model, ordinary):
        inlay.merge(one)
    assert torch.equal(model(inputs()), ordinary(inputs()))
    for one in (model, ordinary):
        inlay.unmerge(one)
        inlay.activate(one)
    assert torch.equal(model(inputs()), ordinary(inputs()))


@torch.no_grad()
def test_a_weight_that_changes_is_packed_again(calls: list[int]) -> None:
    model = inlay.pack(net())
    before = model(inputs())
    model[0].weight.mul_(2)
    assert not torch.equal(model(inputs()), before)
    assert torch.equal(model(inputs()), inlay.pack(model, on=False)(inputs()))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_have_weights_of_their_own(how: Callable[[nn.Module], nn.Module], calls: list[int]) -> None:
    model = inlay.pack(net())
    expected = model(inputs())
    other = how(model)
    assert torch.equal(other(inputs()), expected)
    other[0].weight.zero_()
    assert torch.equal(model(inputs()), expected)
    assert not torch.equal(other(inputs()), expected)
    assert len(calls) == 8


def test_state_and_life(calls: list[int]) -> None:
    """It is in no state dict, and goes with `on=False` or with the last adapter."""
    model = net()
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    inlay.pack(model)
    inlay.pack(model)
    assert list(model.state_dict()) == keys
    inlay.pack(model, on=False)
    assert [type(module) for module in model.modules()] == classes
    inlay.pack(model, on=False)
    inlay.attach(inlay.pack(model), inlay.LoRA(r=2, targets="2"), name="one")
    inlay.attach(model, inlay.LoRA(r=2, targets="0"), name="two")
    inlay.detach(model, "one")
    with torch.no_grad():
        model(inputs())
    assert len(calls) == 2
    inlay.pack(model, on=False)
    assert [path for path, _, _ in hosts(model)] == ["0"]
    inlay.pack(model)
    inlay.detach(model)
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_saving_and_loading_on_a_packed_model(tmp_path: Any) -> None:
    model = inlay.attach(inlay.pack(net()), inlay.LoRA(r=2, targets="all-linear"))
    randomise(model)
    with torch.no_grad():
        expected = model(inputs())
        inlay.save(model, tmp_path)
        other = inlay.load(inlay.pack(net()), tmp_path)
        assert inlay.active(other) == ("default",)
        assert torch.equal(other(inputs()), expected)


@torch.no_grad()
def test_generating_and_rows(calls: list[int]) -> None:
    model = build("llama").bfloat16().eval()
    for name in ("law", "poems"):
        inlay.attach(model, inlay.LoRA(r=2, targets="all-linear"), name=name)
        randomise(model, name)
    inlay.activate(model, "law")
    expected = model(IDS).last_hidden_state
    with inlay.per_row(model, ["law", "poems"]):
        mixed = model(IDS).last_hidden_state
    inlay.pack(model)
    torch.testing.assert_close(model(IDS).last_hidden_state, expected, rtol=5e-2, atol=5e-2)
    with inlay.per_row(model, ["law", "poems"]):
        torch.testing.assert_close(model(IDS).last_hidden_state, mixed, rtol=5e-2, atol=5e-2)
    assert calls


def test_compiled_it_is_one_graph_of_the_ordinary_linear(calls: list[int]) -> None:
    model = inlay.pack(net())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(inputs()), net()(inputs()))
    assert not calls


def test_what_cannot_be_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match="no linear in bfloat16"):
        inlay.pack(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TargetError, match="Embedding has no linear"):
        inlay.pack(nn.Embedding(2, 2).bfloat16())
    monkeypatch.setattr(packed, "missing", lambda: "no instructions")
    with pytest.raises(UnsupportedError, match="pack: no instructions"):
        inlay.pack(net())
