"""Meta weights: how much each pseudo-labelled row counts, by whether learning from it helps on the labelled rows.

    loss = Σ_i w_i KL(p_i ‖ softmax(s_i)),        w_i = max(u_i, 0) / (Σ_j max(u_j, 0) + 1e-6)
    u_i  = ⟨∇ L_labelled, ∇ l_i⟩                  over the trainable parameters, dropout off

That is the closed form of Ren et al. 2018, arXiv:1803.09050, as LiST has it (Wang et al. 2021, arXiv:2110.06274): one
step of SGD on Σ_i ε_i l_i, then −∂ L_labelled / ∂ ε_i at ε = 0, which is u_i times the step's size; the size cancels.
So no step is unrolled: one backward on labelled rows gives g, and the losses' derivative along g gives every u_i at
once, by one forward-mode pass (dual numbers) or, where some operation has no forward mode, by two plain forwards.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from inlay.errors import ConfigError
from inlay.fewshot.learning.modes import in_mode
from inlay.fewshot.learning.objectives import Objective, Step, as_targets
from inlay.fewshot.prompts.template import Row
from inlay.fewshot.scorers.scorer import on

Way = Literal["forward", "difference"]
EPSILON = 1e-6


def divergences(scores: Tensor, targets: Tensor) -> Tensor:
    """KL(p_i ‖ softmax(s_i)) of each row, (rows,); for a label by its number that is −log softmax(s_i)[label]."""
    if targets.ndim == 1:
        return functional.cross_entropy(scores, targets, reduction="none")
    return functional.kl_div(functional.log_softmax(scores, -1), targets, reduction="none").sum(-1)


def normalised(gains: Tensor) -> Tensor:
    """w_i = max(u_i, 0) / (Σ_j max(u_j, 0) + 1e-6): none is negative, and they add up to 1, or all are 0."""
    positive = gains.clamp_min(0)
    return positive / (positive.sum() + EPSILON)


def gains(model: nn.Module, losses: Callable[[], Tensor], loss: Callable[[], Tensor], way: Way | None = None) -> Tensor:
    """u_i = ⟨∇ loss, ∇ losses_i⟩ over the model's trainable parameters, (rows,); no gradient is left anywhere.

    `losses()` (rows,) and `loss()` (a number) ask the model as it stands. `way`: "forward" is exact; "difference" is
    (l_i(θ + h g) − l_i(θ − h g)) / 2h, where h = c / ‖g‖² changes the loss by c, the cube root of the epsilon of
    the model's coarsest numbers, but θ by no more than c of its length; None: the first, unless it does not go through.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with in_mode(model, training=False):
        with torch.enable_grad():
            found = torch.autograd.grad(loss(), list(named.values()), allow_unused=True)
        slopes = {
            name: torch.zeros_like(parameter) if slope is None else slope
            for (name, parameter), slope in zip(named.items(), found, strict=True)
        }
        if way == "difference" or (way is None and _recurrent(model)):
            return _by_difference(named, slopes, losses, _coarsest(model))
        try:
            return _by_forward_mode(model, named, slopes, losses)
        except (RuntimeError, NotImplementedError):  # what torch raises for an operation without a forward mode
            if way == "forward":
                raise
            return _by_difference(named, slopes, losses, _coarsest(model))


class _Asked(nn.Module):
    """A model and a question to it as one module, so that the model's parameters can be given from outside."""

    def __init__(self, model: nn.Module, ask: Callable[[], Tensor]) -> None:
        super().__init__()
        self.model, self.ask = model, ask

    @override
    def forward(self) -> Tensor:
        return self.ask()


def _by_forward_mode(
    model: nn.Module, named: dict[str, nn.Parameter], slopes: dict[str, Tensor], losses: Callable[[], Tensor]
) -> Tensor:
    asked = _Asked(model, losses).eval()
    # Fused attention has no forward mode; the plain one has.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch scripts its own rules at the first use
            moving = {
                f"model.{name}": forward_ad.make_dual(parameter.detach(), slopes[name])  # type: ignore[no-untyped-call]
                for name, parameter in named.items()
            }
        answer = forward_ad.unpack_dual(functional_call(asked, moving, ()))  # type: ignore[no-untyped-call]
        values: Tensor = answer.primal
        along: Tensor | None = answer.tangent
    return torch.zeros_like(values) if along is None else along


@torch.no_grad()
def _by_difference(
    named: dict[str, nn.Parameter], slopes: dict[str, Tensor], losses: Callable[[], Tensor], epsilon: float
) -> Tensor:
    length = torch.stack([slope.double().norm() for slope in slopes.values()]).norm().item()
    if length == 0:
        return torch.zeros_like(losses())
    size = torch.stack([parameter.double().norm() for parameter in named.values()]).norm().item()
    change = epsilon ** (1 / 3)
    step = min(change / length**2, change * (1 + size) / length)
    kept = {name: parameter.detach().clone() for name, parameter in named.items()}
    sides = []
    try:
        for way in (step, -step):
            for name, parameter in named.items():
                # By `.data`: a graph that was formed before, and is gone back through after, sees no change.
                parameter.data.copy_(kept[name]).add_(slopes[name], alpha=way)
            sides.append(losses())
    finally:
        for name, parameter in named.items():
            parameter.data.copy_(kept[name])
    slope: Tensor = (sides[0] - sides[1]) / (2 * step)
    return slope


def _coarsest(model: nn.Module) -> float:
    """The epsilon of what the model computes in: a base in bfloat16 rounds the losses of an adapter in float32."""
    return max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())


def _recurrent(model: nn.Module) -> bool:
    """Whether something trainable is an LSTM's, which reads its weights past `functional_call`."""
    recurrent = (module for module in model.modules() if isinstance(module, nn.RNNBase))
    return any(parameter.requires_grad for module in recurrent for parameter in module.parameters())


@dataclasses.dataclass(frozen=True)
class MetaWeighted(Objective):
    """Σ_i w_i KL(p_i ‖ softmax(s_i)): for the first steps w_i = [max p_i > threshold] / count, then meta weights.

    The step of number `uniform_steps`, counted from 0, is the first with meta weights. `size` labelled rows are drawn
    anew at each step. Weights that are all 0 make a step that learns nothing.
    """

    rows: Sequence[Row] = dataclasses.field(repr=False)
    labels: Sequence[str] = dataclasses.field(repr=False)
    uniform_steps: int
    size: int = 4
    threshold: float = 0.0
    way: Way | None = None

    def __post_init__(self) -> None:
        if not self.rows:
            raise ConfigError("meta weights are measured on labelled rows, and there are none")

    @override
    def __call__(self, step: Step) -> Tensor:
        return (self.weights(step) * divergences(step.scores, step.targets)).sum()

    def weights(self, step: Step) -> Tensor:
        """The weights of a step's rows, (rows,), without gradients."""
        if step.number < self.uniform_steps:
            soft = step.targets if step.targets.ndim == 2 else torch.ones_like(step.targets)[:, None]
            counted = (soft.amax(-1) > self.threshold).float()
            return counted / counted.sum().clamp_min(1)
        chosen = torch.randperm(len(self.rows), generator=step.generator)[: self.size].tolist()
        labelled = step.scorer.collate(step.scorer.encode([self.rows[number] for number in chosen]))
        labelled = on(step.targets.device, labelled)
        true = as_targets([self.labels[number] for number in chosen], step.scorer.labels).to(step.targets.device)
        return normalised(
            gains(
                step.model,
                lambda: divergences(step.scorer(step.model, step.batch), step.targets),
                lambda: functional.cross_entropy(step.scorer(step.model, labelled), true),
                self.way,
            )
        )
