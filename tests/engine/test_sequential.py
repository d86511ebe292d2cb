"""An `nn.Sequential` can be a host: it runs its layers one after the other, and not what holds the pieces."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay


class Net(nn.Module):
    """x + ff(x), the network an nn.Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(x + self.ff(x))
        return y


@pytest.fixture
def net() -> Any:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def test_an_adapter_after_it_starts_as_the_base_and_computes_its_formula(net: Any) -> None:
    plain = copy.deepcopy(net)
    inlay.attach(net, inlay.Adapter(targets=["ff"], bottleneck=4))
    assert torch.equal(net(X), plain(X))
    piece = net.ff.inlays.default.adapter
    with torch.no_grad():
        for parameter in piece.parameters():
            parameter.normal_()
    h = plain.ff(X)
    torch.testing.assert_close(net(X), plain.out(X + h + piece.bottleneck(h)))
    inlay.detach(net)
    assert type(net.ff) is nn.Sequential
    assert torch.equal(net(X), plain(X))


def test_its_layers_are_those_that_it_had(net: Any) -> None:
    layers = list(net.ff)
    inlay.attach(net, inlay.Adapter(targets=["ff"], bottleneck=4))
    assert list(net.ff) == layers
    assert len(net.ff) == 3
    assert net.ff[-1] is layers[-1]
    assert list(net.ff[1:]) == layers[1:]


def test_it_compiles_in_one_graph_and_can_be_copied(net: Any) -> None:
    inlay.attach(net, inlay.Adapter(targets=["ff"], bottleneck=4))
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), net(X))
    assert torch.equal(copy.deepcopy(net)(X), net(X))
