"""A small network of the user's own and an adapter in it, for tests that also run in a process of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import inlay
from inlay.engine.adapters import adapters_of

IDS = torch.arange(10).reshape(2, 5)


class Net(nn.Module):
    """An embedding and two linears, the same each time."""

    def __init__(self, wide: int = 8, seed: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.table = nn.Embedding(11, wide)
            self.first = nn.Linear(wide, 12)
            self.second = nn.Linear(12, 4, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.relu(self.first(self.table(ids))))
        return result


def randomise(model: nn.Module, name: str = "default") -> None:
    """Values that make every tensor of an adapter matter."""
    with torch.no_grad():
        for parameter in adapters_of(model).get(name).parameters():
            parameter.normal_(std=0.3)


def adapted(seed: int = 0, method: Any = None) -> nn.Module:
    """`Net` with an adapter whose values `seed` decides."""
    torch.manual_seed(seed)
    net = inlay.attach(Net(), method or inlay.LoRA(r=2, targets="first,second"))
    randomise(net)
    return net
