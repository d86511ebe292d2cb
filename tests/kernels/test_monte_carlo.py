"""The draws of MonteCLoRA against HF peft's from the same noise, and its divergences against torch's."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.monteclora import MontecloraSampler
from torch import Tensor
from torch.distributions import Dirichlet, MultivariateNormal, Wishart, kl_divergence

from inlay.kernels import monte_carlo

IN, R, N, SCALE = 7, 3, 4, 0.2


class Peft(MontecloraSampler):
    """peft's sampler, whose noise can be looked at."""

    def noise(self) -> tuple[monte_carlo.Draw, Tensor]:
        """What its next draw will use: χ and ε as ours, and the N matrices."""
        sample = self.sampler.buffer[self.sampler.index]
        return monte_carlo.Draw(sample["z_wishart"].diagonal(), sample["z_dirichlet"]), sample["z_mvn"]


def sampler(samples: int = N) -> Peft:
    torch.manual_seed(0)
    return Peft(IN, R, samples, sample_scaler=SCALE, buffer_size=3, device="cpu")


def bartlett(matrix: Wishart, count: int) -> Tensor:
    """As peft calls it; `sample` warns of singular ones where there are none."""
    found: Tensor = matrix._bartlett_sampling(torch.Size((count,)))
    return found


def ours(theirs: Peft, draw: monte_carlo.Draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log σ and log α as leaves of our own, and v and w from them."""
    log_std, log_alpha = (p.detach().clone().requires_grad_() for p in (theirs.std_prior, theirs.expert_weights_prior))
    return log_std, log_alpha, monte_carlo.variances(log_std, draw.chi), monte_carlo.shares(log_alpha, draw.epsilon)


def test_the_same_noise_gives_what_peft_gives_and_its_gradients() -> None:
    """But for the gradient by w: there ours is the part of peft's along w, and the rest has the mean zero."""
    theirs = sampler()
    a, weights = torch.randn(R, IN), torch.randn(R, IN)
    for _ in range(3):
        draw, many = theirs.noise()
        spread, their_w = theirs()
        their_w.retain_grad()
        expected = (their_w[:, None, None] * (a.T + spread)).sum(0).T
        log_std, log_alpha, v, w = ours(theirs, draw)
        w.retain_grad()
        torch.testing.assert_close(v, theirs.gaussian_var_prior.diagonal(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(w, their_w, rtol=1e-5, atol=1e-6)
        one = (w[:, None, None] * many).sum(0).T / w.norm()
        found = monte_carlo.perturbed(a, v, w, one.detach(), SCALE)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(log_std.grad, theirs.std_prior.grad, rtol=1e-4, atol=1e-6)
        # By each w_n, without what Σ w = 1 makes of the mean.
        noise_part = torch.einsum("nio,oi->n", many * (SCALE * v.sqrt()), weights).detach()
        along = w.detach() * (w.detach() @ noise_part) / w.detach().square().sum()
        assert w.grad is not None
        torch.testing.assert_close(w.grad, along, rtol=1e-4, atol=1e-6)
        theirs.zero_grad()
        log_alpha.grad = None


def test_one_draw_is_spread_as_the_sum_of_all_is() -> None:
    torch.manual_seed(1)
    v, w = torch.rand(2) + 0.5, torch.tensor([0.6, 0.3, 0.1])
    draws = torch.randn(40_000, 3, 2) * v.sqrt()
    summed = 0.5 * (w[:, None] * draws).sum(1)
    one = monte_carlo.perturbed(torch.zeros(2, 40_000), v, w, torch.randn(2, 40_000), 0.5)
    # 40,000 draws: a variance is good to √(2 / 40,000), 0.7 %.
    torch.testing.assert_close(one.var(1), summed.var(0), rtol=0.03, atol=0)
    for order in (0.1, 0.5, 0.9):
        torch.testing.assert_close(one.quantile(order, 1), summed.quantile(order, 0), rtol=0, atol=0.02)


def test_fresh_noise_is_that_of_a_wishart_matrix() -> None:
    torch.manual_seed(2)
    found = torch.stack([monte_carlo.drawn(torch.zeros(3), torch.zeros(2)).chi for _ in range(4000)])
    expected = bartlett(Wishart(df=3, scale_tril=torch.eye(3)), 4000).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found.mean(0), expected.mean(0), rtol=0.1, atol=0)
    torch.testing.assert_close(found.T.cov(), expected.T.cov(), rtol=0.2, atol=0.5)  # 2 r on the diagonal, 0 beside it


# -- the divergences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 4, 40])
def test_the_dirichlets_divergence_is_torchs(samples: int) -> None:
    log_alpha = torch.rand(samples)
    found = monte_carlo.dirichlet_divergence(log_alpha, 0.1)
    expected = kl_divergence(Dirichlet(log_alpha.exp()), Dirichlet(torch.full((samples,), 0.1)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_pefts_has_another_sign_and_no_end() -> None:
    theirs = sampler()
    log_alpha = theirs.expert_weights_prior.detach()
    expected = theirs.dirichlet_kl(log_alpha.exp()).detach()
    torch.testing.assert_close(
        monte_carlo.dirichlet_divergence(log_alpha, 1.0, "authors"), expected, rtol=1e-4, atol=1e-5
    )
    right = kl_divergence(Dirichlet(log_alpha.exp()), Dirichlet(torch.ones(N)))
    assert (expected - right).abs() > 0.1
    many = sampler(40).expert_weights_prior.detach()
    assert not sampler(40).dirichlet_kl(many.exp()).isfinite()  # Γ of the sum of α, before its logarithm
    assert monte_carlo.dirichlet_divergence(many, 1.0, "authors").isfinite()


def test_the_wisharts_divergence_by_its_own_samples() -> None:
    theirs = sampler()
    log_std = theirs.std_prior.detach()
    found = monte_carlo.wishart_divergence(log_std)
    torch.testing.assert_close(found, theirs.wishart_kl(torch.diag(log_std.exp())).detach(), rtol=1e-4, atol=1e-4)
    torch.manual_seed(4)
    own = Wishart(df=R, scale_tril=torch.diag(log_std.double().exp()))
    prior = Wishart(df=R, scale_tril=torch.eye(R, dtype=torch.float64))
    samples = bartlett(own, 20_000)
    ratio = own.log_prob(samples) - prior.log_prob(samples)
    torch.testing.assert_close(found.double(), ratio.mean(), rtol=0, atol=4 * float(ratio.std()) / 20_000**0.5)


def test_the_gaussians_divergence_is_torchs() -> None:
    v = torch.rand(R) + 0.1
    own, prior = (MultivariateNormal(torch.zeros(R), torch.diag(diagonal)) for diagonal in (v, torch.ones(R)))
    expected = kl_divergence(own, prior)
    torch.testing.assert_close(monte_carlo.normal_divergence(v, N), N * expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sampler().multivariate_kl(torch.diag(v)), N * expected, rtol=1e-4, atol=1e-5)


def test_parameters_far_out_give_numbers() -> None:
    for value in (-60.0, 40.0):
        log_alpha = torch.full((3,), value, requires_grad=True)
        w = monte_carlo.shares(log_alpha, torch.randn(3))
        assert w.isfinite().all()
        w[0].backward()
        assert log_alpha.grad is not None
        assert log_alpha.grad.isfinite().all()
    assert torch.equal(monte_carlo.variances(torch.full((2,), -60.0), torch.ones(2)), torch.full((2,), 1e-3))
