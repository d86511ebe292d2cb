"""What the methods with shared projections keep for the backward, and that RandLoRA's two ways agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.engine.adapters import adapters_of


class One(nn.Module):
    """A model that is one linear."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.lin(x)
        return result


def moved(method: inlay.Method, width: int = 12, out: int = 8) -> One:
    torch.manual_seed(0)
    model = inlay.attach(One(width, out), method)
    with torch.no_grad():
        for parameter in adapters_of(model).get("default").parameters():
            parameter.normal_()
    return model  # type: ignore[return-value]


@pytest.mark.parametrize("method", [inlay.VeRA(r=3, targets="lin"), inlay.PVeRA(r=3, targets="lin"),
                                    inlay.TinyLoRA(u=3, targets="lin")], ids=lambda method: method.kind)  # fmt: skip
def test_x_is_not_kept(method: inlay.Method) -> None:
    model, x = moved(method), torch.randn(5, 12, requires_grad=True)
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.train()(x)
    assert kept
    assert x.data_ptr() not in kept
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 5, 7, 400])
@pytest.mark.parametrize(("width", "out"), [(12, 8), (8, 12), (10, 10)])
def test_randlora_as_factors_and_as_a_matrix(width: int, out: int, rows: int, dropout: float) -> None:
    model = moved(inlay.RandLoRA(r=3, alpha=1, dropout=dropout, targets="lin"), width, out)
    piece, x, dy = model.lin.inlays.default.randlora, torch.randn(rows, width), torch.randn(rows, out)
    expected = x @ (model.lin.weight + piece.delta()).T + model.lin.bias
    theta = [piece.randlora_lambda, piece.randlora_gamma]
    wanted = torch.autograd.grad(expected, theta, dy)
    found = model.eval()(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(torch.autograd.grad(found, theta, dy), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    if dropout:
        y = model.train()(torch.ones(20_000, width)).mean(0)  # as many rows as it takes: dropout is unbiased
        torch.testing.assert_close(y, model.eval()(torch.ones(width)), rtol=0.05, atol=0.1)
