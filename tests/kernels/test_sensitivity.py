"""The sum of |ΔW ⊙ ∂L/∂ΔW| as a gradient: against autograd on a formed ΔW, over calls, and under a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from inlay.kernels import sensitivity
from inlay.kernels.sensitivity import watched


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, 5), torch.randn(2, 5), torch.randn(7, 2), torch.randn(2, 3, 7)


def by_hand(x: Tensor, a: Tensor, b: Tensor, pull: Tensor, scale: float) -> Tensor:
    change = (scale * b @ a).requires_grad_()
    (torch.tanh(x @ change.t()) * pull).sum().backward()
    assert change.grad is not None
    return (change * change.grad).abs().sum().detach()


@pytest.mark.parametrize("rows", [3, 256])  # some rows at a time, and all
def test_as_autograd_on_the_whole_matrix(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "ROWS", rows)
    x, a, b, pull = tensors()
    probe = torch.zeros((), requires_grad=True)
    y = (x @ (-0.7 * b @ a).t()).requires_grad_()
    out = watched(y, x, a, b, -0.7, probe)
    assert torch.equal(out, y)
    (torch.tanh(out) * pull).sum().backward()
    torch.testing.assert_close(probe.grad, by_hand(x, a, b, pull, -0.7))
    assert y.grad is not None
    torch.testing.assert_close(y.grad, pull / torch.cosh(y.detach()) ** 2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_batches_under_a_checkpoint_add_up(reentrant: bool) -> None:
    x, a, b, pull = tensors()
    probe = torch.zeros((), requires_grad=True)

    def forward(y: Tensor) -> Tensor:
        return torch.tanh(watched(y, x, a, b, 0.7, probe))

    for _ in range(2):
        y = (x @ (0.7 * b @ a).t()).requires_grad_()
        (checkpoint(forward, y, use_reentrant=reentrant) * pull).sum().backward()
    torch.testing.assert_close(probe.grad, 2 * by_hand(x, a, b, pull, 0.7))
