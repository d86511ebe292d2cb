"""`inlay.density`: how many of a model's feed-forward activations are not zero, on data, place by place."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.sites import SiteIndex, Targets
from inlay.errors import ConfigError
from inlay.kernels import density as kernel
from inlay.pieces.density.watching import Watch, stack_of


@dataclasses.dataclass(frozen=True)
class Share:
    """Of how many activations, how many are not zero, and how many are at least `threshold`."""

    nonzero: int
    large: int
    total: int

    @property
    def exact(self) -> float:
        """The share of entries that are not zero."""
        return self.nonzero / max(self.total, 1)

    @property
    def thresholded(self) -> float:
        """The share of entries whose magnitude is at least the threshold."""
        return self.large / max(self.total, 1)


@dataclasses.dataclass(frozen=True)
class Density(Share):
    """The same for the model as a whole, and for each place."""

    threshold: float
    places: Mapping[str, Share]

    def __str__(self) -> str:
        lines = [f"{'exact':>9}{f'≥ {self.threshold:g}':>9}  activations going into"]
        rows = [("all", self), *self.places.items()]
        return "\n".join([*lines, *(f"{one.exact:9.2%}{one.thresholded:9.2%}  {name}" for name, one in rows)])


def density(
    model: nn.Module,
    data: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    *,
    threshold: float = 1e-3,
    targets: Targets = "down",
) -> Density:
    """Count the activations that are not zero on `data`: one batch of the model's arguments, or several.

    They are what the second projections read (or other linears that `targets` names), at the positions that are not
    padding, in evaluation mode. The exact count means something for ReLU and its square; a GELU in fp32 is zero below
    −5.55 only, so that its density is the share of magnitudes that are at least `threshold`. Adapters may be attached;
    what is active counts. The model is left as it was.
    """
    if not threshold > 0:
        raise ConfigError(f"density(threshold={threshold!r}): a number above 0 is needed")
    sites = SiteIndex(model).select(targets, hosts=frozenset({"linear"}), what="density")
    watch, found = Watch.of(model), {site.name: torch.zeros(3, dtype=torch.int64) for site in sites}

    def look(stack: str, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        seen = kernel.counts(args[0], watch.mask(stack, args[0]), threshold)
        found[name] += seen.to(found[name].device)

    with _evaluating(model), contextlib.ExitStack() as stack:
        watch.open_on(model)
        stack.callback(watch.close)
        for site in sites:
            part = functools.partial(look, stack_of(model, site.path), site.name)
            stack.callback(site.module.register_forward_pre_hook(part).remove)
        for batch in [data] if isinstance(data, Mapping) else data:
            model(**batch)
    places = {name: Share(*_whole(numbers)) for name, numbers in found.items()}
    if not any(share.total for share in places.values()):
        raise ConfigError("density was given no data that reaches a feed-forward network: pass a batch, or several")
    return Density(*_whole(torch.stack([*found.values()]).sum(0)), threshold, places)


def _whole(numbers: Tensor) -> tuple[int, int, int]:
    nonzero, large, total = map(int, numbers.tolist())
    return nonzero, large, total


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is put back."""
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module in training:
            module.training = True
