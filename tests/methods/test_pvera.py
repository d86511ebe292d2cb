"""The noise of PVeRA: when it is drawn, around what, and that a recomputed forward draws the same."""

from __future__ import annotations

import pytest
import torch
from engine.tiny import build
from properties.models import HOSTS, checkpointed, close, fresh, gradients, output, perturb
from torch import nn

import inlay
from inlay.errors import UnsupportedError


def adapted(**fields: object) -> nn.Module:
    torch.manual_seed(0)
    return perturb(inlay.attach(fresh("bert"), inlay.PVeRA(r=2, **fields)))  # type: ignore[arg-type]


def test_drawn_in_training_only() -> None:
    model = adapted()
    mean = output(model, "bert")
    assert torch.equal(output(model, "bert"), mean)
    model.train()
    assert not torch.equal(output(model, "bert"), output(model, "bert"))
    assert torch.equal(output(model.eval(), "bert"), mean)


def test_never_and_always() -> None:
    never = adapted(sample="never").train()
    assert torch.equal(output(never, "bert"), output(never.eval(), "bert"))
    always = adapted(sample="always")
    assert not torch.equal(output(always, "bert"), output(always, "bert"))
    with pytest.raises(UnsupportedError, match="not a change of the weights"):
        inlay.merge(always)


def test_the_spread_is_what_the_second_half_of_d_says() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.lin(x)
            return result

    torch.manual_seed(0)
    model = perturb(inlay.attach(Model(), inlay.PVeRA(r=3, targets="lin", sample="always")))
    piece = model.lin.inlays.default.pvera
    x = torch.randn(1, 4)
    mean, log_variance = (piece.pvera_lambda_d * (x @ piece.shared.pvera_A.T)).chunk(2, -1)
    gain = piece.pvera_lambda_b[:, None] * piece.shared.pvera_B
    with torch.no_grad():
        drawn = model(x.expand(40_000, -1))
        expected = model.lin.weight @ x[0] + model.lin.bias + gain @ mean[0]
        covariance = gain @ torch.diag(log_variance[0].exp()) @ gain.T
    # 40,000 draws: means are good to a two-hundredth of the spread, variances to 1/√20,000.
    scale = covariance.diag().max()
    torch.testing.assert_close(drawn.mean(0), expected, rtol=0, atol=0.03 * float(scale.sqrt()))
    torch.testing.assert_close(drawn.T.cov(), covariance, rtol=0, atol=0.04 * float(scale))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_again(reentrant: bool) -> None:
    model = adapted().train()
    torch.manual_seed(3)
    expected = gradients(model, "bert")
    torch.manual_seed(3)
    for name, gradient in checkpointed(model, HOSTS["bert"], reentrant).items():
        close(gradient, expected[name], 1e-4)


def test_half_precision() -> None:
    model = inlay.attach(build("llama", "causal").bfloat16(), inlay.PVeRA(r=4)).train()
    model(torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in found)
