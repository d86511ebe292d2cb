"""Bottlenecks whose two matrices are sums of Kronecker products, with the small factors shared by a whole model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.kernels import phm
from inlay.pieces.bottlenecks.bottleneck import Bottleneck


class Rule(nn.Module):
    """A_1 … A_n, each (n, n): how the n parts of an input are mixed."""

    def __init__(self, n: int, deviation: float, place: dict[str, Any]) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(n, n, n, **place).normal_(std=deviation))


class PHMLayer(nn.Module):
    """B_i as S_i (in / n, r) and T_i (r, out / n), or whole where r is None; and a bias."""

    def __init__(self, into: int, out: int, n: int, r: int | None, place: dict[str, Any]) -> None:
        super().__init__()
        shapes = [(into // n, out // n)] if r is None else [(into // n, r), (r, out // n)]
        self.factors = nn.ParameterList(nn.Parameter(torch.empty(n, *shape, **place)) for shape in shapes)
        self.bias = nn.Parameter(torch.zeros(out, **place))
        for factor, i in itertools.product(self.factors, range(n)):
            nn.init.xavier_uniform_(factor.data[i])


class PHMBottleneck(Bottleneck):
    """A(x) = s · (f(x W_down + b_down) W_up + b_up), both W of the form Σ_i A_i ⊗ B_i with the same A."""

    behind: tuple[Rule, ...]

    def layer(self, into: int, out: int, method: Any, place: dict[str, Any]) -> PHMLayer:
        if "rule" not in self._modules:  # of the first layer
            self.rule = Rule(method.n, method.rule_deviation, place)
            self.behind = (self.rule,)
        return PHMLayer(into, out, method.n, method.r, place)

    def project(self, layer: Any, x: Tensor) -> Tensor:
        rule = self.behind[0].a.to(x.device, x.dtype)
        factors = [factor.to(x.dtype) for factor in layer.factors]
        y: Tensor = phm.full(x, rule, *factors) if len(factors) == 1 else phm.factored(x, rule, *factors)
        bias: Tensor = layer.bias.to(x.dtype)
        return y + bias

    def share(self, rule: Rule) -> None:
        """Use another's A: a tuple hides it from registration, so that it is trained and saved once, at its owner."""
        del self.rule
        self.behind = (rule,)

    @torch.no_grad()
    def _start(self, init: str) -> None:
        if init == "zero_up":
            self.up.factors[-1].zero_()


def share_rules(bottlenecks: Iterable[Bottleneck]) -> None:
    """One A for all bottlenecks whose A has the same size; the first of them owns it."""
    owners: dict[int, Rule] = {}
    for bottleneck in dict.fromkeys(bottlenecks):
        assert isinstance(bottleneck, PHMBottleneck)
        own = bottleneck.rule
        first = owners.setdefault(len(own.a), own)
        if first is not own:
            bottleneck.share(first)
