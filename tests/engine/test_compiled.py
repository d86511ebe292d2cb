"""torch.compile: one graph for a model with adapters, and none compiled again where only numbers change."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine.small import randomise
from torch import Tensor, nn
from torch._dynamo.utils import counters

import inlay

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""Compiled or not, fp32 sums of a few dozen numbers around one."""
BACKEND = "aot_eager"
"""Traces forward and backward as the default does and guards the same; only the code that is run is not generated."""
METHODS: dict[str, Callable[[], inlay.Method]] = {
    "lora": lambda: inlay.LoRA(r=2, targets="re:first|gate|last"),
    "dora": lambda: inlay.DoRA(r=2, targets="re:first|gate|last"),
    "ia3": lambda: inlay.IA3(targets="re:first|gate|last", feedforward="last"),
}


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    logging.disable(logging.DEBUG)  # of which the compiler writes very many lines
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    logging.disable(logging.NOTSET)
    torch.compiler.reset()


def graphs() -> int:
    """How many graphs were compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def ids(rows: int = 3, tokens: int = 5) -> Tensor:
    return torch.randint(11, (rows, tokens), generator=torch.Generator().manual_seed(7))


class Net(nn.Module):
    """A table, two linears that read one x, and a third."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.first, self.gate, self.last = nn.Linear(6, 8), nn.Linear(6, 8, bias=False), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        result: Tensor = self.last(torch.tanh(self.first(x)) * self.gate(x))
        return result


def adapted(*names: str, method: Callable[[], inlay.Method] = METHODS["lora"]) -> nn.Module:
    model: nn.Module = Net()
    for name in names:
        inlay.attach(model, method(), name)
        randomise(model, name)
    inlay.activate(model, *names[:1])
    return model


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    return torch.compile(model, fullgraph=True, backend=BACKEND, **options)  # type: ignore[return-value]


def gradients(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(model(x).square().mean(), trained, allow_unused=True))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", METHODS)
def test_one_graph(kind: str, grad: bool) -> None:
    model = adapted("law", method=METHODS[kind])
    fast = compiled(model)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(fast(ids()), model(ids()), **CLOSE)
        fast(ids())
    if grad:
        torch.testing.assert_close(gradients(fast, ids()), gradients(model, ids()), **CLOSE)
    assert graphs() == 1


def test_each_set_of_adapters_compiles_once() -> None:
    model = adapted("law", "poems")
    fast = compiled(model)
    sets: list[tuple[str, ...]] = [("law",), ("poems",), (), ("law", "poems")]
    for number, names in enumerate(sets * 2):
        inlay.activate(model, *names)
        torch.testing.assert_close(fast(ids()), model(ids()), **CLOSE)
        assert graphs() == min(number + 1, len(sets))


def changes(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """What a switchable model goes through without being compiled again."""
    return {
        "switched": lambda: inlay.activate(model, "poems"),
        "both": lambda: inlay.activate(model, "poems", "law"),
        "none": lambda: inlay.activate(model),
        "weighed": lambda: inlay.weigh(model, {"law": 0.3, "poems": -1.2}),
        "changed in place": lambda: randomise(model, "poems"),
        "back": lambda: inlay.activate(model, "law"),
    }


@pytest.mark.parametrize("grad", [True, False])
def test_a_switchable_model_is_compiled_once(grad: bool) -> None:
    model = inlay.switchable(adapted("law", "poems"))
    fast = compiled(model)
    seen: list[Tensor] = []
    with torch.set_grad_enabled(grad):
        fast(ids())
        for change in changes(model).values():
            change()
            expected = model(ids())
            torch.testing.assert_close(fast(ids()), expected, **CLOSE)
            assert all(not torch.allclose(expected, before, atol=1e-3) for before in seen)
            seen.append(expected)
        with inlay.disabled(model):
            torch.testing.assert_close(fast(ids()), model(ids()), **CLOSE)
        with inlay.using(model, "poems"):
            torch.testing.assert_close(fast(ids()), model(ids()), **CLOSE)
    assert graphs() == 1


def test_a_switchable_model_computes_what_it_did_before() -> None:
    model = adapted("law", "poems")
    switched = inlay.switchable(copy.deepcopy(model))
    fast = compiled(switched)
    for names in [("law",), (), ("poems", "law")]:
        inlay.activate(model, *names)
        inlay.activate(switched, *names)
        torch.testing.assert_close(fast(ids()), model(ids()), **CLOSE)
    assert graphs() == 1


def test_batches_of_other_sizes_compile_once_more_at_most() -> None:
    model = inlay.switchable(adapted("law", "poems"))
    fast = compiled(model)
    for rows, tokens in [(3, 5), (4, 5), (7, 5), (2, 5), (4, 5), (9, 5)]:
        x = ids(rows, tokens)
        inlay.activate(model, "law" if rows % 2 else "poems")
        torch.testing.assert_close(fast(x), model(x), **CLOSE)
        assert graphs() <= 2


@pytest.mark.parametrize("switching", [True, False])
def test_a_training_step(switching: bool) -> None:
    """Loss, gradients and an optimiser's steps, adapters taking turns."""
    model = adapted("law", "poems")
    if switching:
        inlay.switchable(model)
    plain, fast = copy.deepcopy(model), compiled(model)
    optimisers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (plain, model)]
    for name in ("law", "poems", "law", "poems"):
        for m, run, optimiser in zip((plain, model), (plain, fast), optimisers, strict=True):
            inlay.activate(m, name)
            optimiser.zero_grad()
            run(ids()).square().mean().backward()
            optimiser.step()
    here, there = (dict(m.named_parameters()) for m in (model, plain))
    torch.testing.assert_close(here, there, **CLOSE)
    assert graphs() == (1 if switching else 2)
