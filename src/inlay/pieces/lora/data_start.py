"""Starts of LoRA that come from rows of the training data: what the places read, before anything is trained.

    eva      A = the r directions in which the inputs of a place vary most, B = 0
    corda    s·B A = U_r S_r V_r C⁻¹,  with W C = U S V and C the mean of x xᵀ over the inputs of a place
    lora_ga  A = c V_1…r, B = c U_r+1…2r,  with ∂L/∂W = U S V, the mean over batches, and c = out^¼ / √γ

EVA, Paischer et al. 2024, arXiv:2410.07170. With rho > 1 the ranks go where they explain most: of the rho · r first
directions of every place, those Σ r are kept whose share of their place's variance is largest. The scale s of a place
stays what it was at rank r.

CorDA, Yang et al. 2024, arXiv:2406.05223. mode "ipm" (instruction-previewed) takes the r largest singular values: what
matters most for the rows seen is trained. "kpm" (knowledge-preserved) takes the r smallest: it is kept. C is divided by
its mean diagonal entry, which shares B A otherwise between A and B, and is damped as in the authors' code. Where all
inputs are uncorrelated and alike, "ipm" is PiSSA. The starting product is subtracted in the piece, as for PiSSA.

LoRA-GA, Wang et al. 2024, arXiv:2407.05000: the first step is as near to full fine-tuning's as rank 2r can be. Its
starting product is subtracted in the piece too.

EVA's paper follows the directions batch by batch until they stand still. Here the rows' second moments are summed up in
float64, in² numbers for each input that places do not share, so that the result is exact for the batches seen and does
not depend on their order.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.batches import Batches, looked_at
from inlay.engine.piece import reject_unknown
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError, DataError, UnsupportedError
from inlay.pieces.subsets.scores import of_gradients

DATA_INITS = ("eva", "corda", "lora_ga")
MODES = ("ipm", "kpm")
ENOUGH = 1e-10
"""A direction counts where its variance is at least this share of the first one's: below lies rounding."""

DAMPING, INVERSE_ERROR = 0.01, 0.05
"""What is added to the diagonal of C, as a share of its mean entry: doubled until C's inverse is one to this error."""
Factors = tuple[Tensor, Tensor | None]
"""A (r, in), and B (out, r), or None where it is zero."""
IGNORED = -100
"""The label of a token that the loss leaves out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataStart:
    """A start from data, with its settings, and what was found once the data has been seen."""

    kind: str
    rho: float = 2.0
    """For eva: a place gets at most rho · r ranks; 1: r everywhere."""
    whiten: bool | str = False
    """For eva: divide each direction by the spread of the inputs along it, so that A x varies by 1 in each; "authors":
    by the root of the singular value, as HF peft does, which depends on the number of rows."""
    mode: str = "ipm"
    """For corda: "ipm" trains what matters most for the rows seen, "kpm" what matters least."""
    gamma: float = 16
    """For lora_ga: γ, of which a larger one makes A and B smaller."""
    batches: int = 64
    """Batches of the training rows that are looked at."""
    found: Mapping[str, Factors] | None = dataclasses.field(default=None, repr=False, compare=False)
    """A and B for each place by its name."""

    def __post_init__(self) -> None:
        if self.kind not in DATA_INITS:
            raise ConfigError(f"init={{'kind': {self.kind!r}}}: choose one of {', '.join(DATA_INITS)}")
        if not isinstance(self.rho, int | float) or isinstance(self.rho, bool) or not 1 <= self.rho < float("inf"):
            raise ConfigError(f"init: rho={self.rho!r}: a number of at least 1 is needed; 1 gives every place rank r")
        if self.whiten not in (True, False, "authors"):
            raise ConfigError(f"init: whiten={self.whiten!r}: choose one of True, False, authors")
        if self.mode not in MODES:
            raise ConfigError(f"init: mode={self.mode!r}: choose one of {', '.join(MODES)}")
        if not isinstance(self.gamma, int | float) or isinstance(self.gamma, bool) or not 0 < self.gamma < float("inf"):
            raise ConfigError(f"init: gamma={self.gamma!r}: a number above 0 is needed, such as 16")
        if not isinstance(self.batches, int) or isinstance(self.batches, bool) or self.batches < 1:
            raise ConfigError(f"init: batches={self.batches!r}: a whole number of at least 1 is needed")

    def factors(self, site: Site, r: int) -> Factors:
        """A and B of this place. Raises ConfigError where no data was seen, or not for this place and rank."""
        if self.found is None:
            raise ConfigError(
                f"LoRA(init={self.kind!r}) starts from data: attach LoRA(…).prepare(model, batches), with batches of "
                "the training rows (inlay train does so by itself)"
            )
        found = self.found.get(site.name)
        if found is None or len(found[0]) != r:
            what = "no data" if found is None else f"data for r={len(found[0])}"
            raise ConfigError(
                f"LoRA(init={self.kind!r}) has seen {what} at {site.name}, where r={r}: prepare it as it "
                "is to be attached"
            )
        return found


def is_from_data(init: Any) -> bool:
    """Whether a method's `init` names a start from data: by name, as a mapping with settings, or as what was found."""
    return isinstance(init, DataStart | Mapping) or init in DATA_INITS


def data_start(init: Any) -> DataStart:
    """The start that `init` names. Raises ConfigError for settings that it has not."""
    if isinstance(init, DataStart):
        return init
    settings: dict[str, Any] = {"kind": init} if isinstance(init, str) else dict(init)
    reject_unknown(settings, [field.name for field in dataclasses.fields(DataStart) if field.name != "found"], "init")
    if "kind" not in settings:
        raise ConfigError(f"init={settings!r}: a kind is needed, one of {', '.join(DATA_INITS)}")
    return DataStart(**settings)


def prepared(method: Any, model: nn.Module, batches: Any) -> Any:
    """The method with its start found on the model's rows, and with the ranks that came of it.

    Raises UnsupportedError for places that are no linears, DataError where the rows say too little.
    """
    start = data_start(method.init)
    if batches is None:
        raise DataError(f"init={start.kind!r} looks at rows: give an iterable of the model's inputs with labels")
    sites = method.sites(SiteIndex(model))
    here = {site: method.at(site) for site in sites}
    places = [site for site in sites if is_from_data(here[site].init)]
    for site in places:
        if site.kind != "linear":
            raise UnsupportedError(
                f"init={start.kind!r} is for linears, and {site.name} is a {site.kind}: leave it out, or add "
                f"overrides={{{site.name!r}: {{'init': 'kaiming'}}}}"
            )
        if start.kind != "eva":
            _factorable(site, start.kind, here[site].r)
    if start.kind == "lora_ga":
        gradients = _gradients(model, places, Batches.of(batches), start)
        ranks = {site.name: here[site].r for site in places}
        found = {
            site.name: _lora_ga(site, ranks[site.name], start.gamma, gradients[id(site.weight)]) for site in places
        }
        return method.replace(init=dataclasses.replace(start, found=found))
    seen = moments(model, places, Batches.of(batches), start)
    if start.kind == "eva":
        return _eva(method, start, here, seen)
    found = {site.name: _corda(site, here[site], start.mode, seen[site.name]) for site in places}
    return method.replace(init=dataclasses.replace(start, found=found))


def is_subtracted(init: Any) -> bool:
    """Whether a start's product is not zero, and is kept and subtracted."""
    return init in ("olora", "pissa") if not is_from_data(init) else data_start(init).kind != "eva"


def _factorable(site: Site, kind: str, r: int) -> None:
    """Raise UnsupportedError for a weight of codes, or one that is computed; ConfigError for too few directions."""
    if not site.weight.is_floating_point() or not site.weight.is_leaf:
        what = "computed from others" if site.weight.is_floating_point() else "quantised"
        raise UnsupportedError(f"init={kind!r} needs the weight of {site.name}, which is {what}: use 'eva' there")
    taken = 2 * r if kind == "lora_ga" else r
    if taken > min(site.weight.shape):
        raise ConfigError(
            f"init={kind!r} takes {taken} directions at r={r} of {site.name}, whose weight has only "
            f"{min(site.weight.shape)}: choose a smaller r"
        )


# -- what the places read ----------------------------------------------------------------------------------------------


class Moments:
    """How many rows a place read, their sum (in), and the sum of their outer products (in, in), in float64."""

    def __init__(self, site: Site) -> None:
        double = {"dtype": torch.float64, "device": site.device}
        self.count = 0
        self.sum: Tensor = torch.zeros(site.in_features, **double)  # type: ignore[call-overload]
        self.outer: Tensor = torch.zeros(site.in_features, site.in_features, **double)  # type: ignore[call-overload]

    def add(self, rows: Tensor) -> None:
        """Take in rows (n, in)."""
        rows = rows.to(self.sum.dtype)
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.outer.addmm_(rows.T, rows)

    def scatter(self) -> Tensor:
        """The sum of outer products of what the rows differ from their mean by."""
        mean = self.sum / max(self.count, 1)
        return self.outer.addr(self.sum, mean, alpha=-1)


class _Listener:
    """Hooks on the places. Places that are called with one and the same tensor share its moments."""

    def __init__(self, model: nn.Module, places: Sequence[Site]) -> None:
        self.two_sided = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.moments: dict[str, Moments] = {}
        self.real: Tensor | None = None
        self.first: dict[str, str] = {}
        self._last: tuple[str, Tensor | None] = ("", None)
        self.handles = []
        for site in places:
            unmasked = self.two_sided and "decoder" in site.path
            self.handles.append(site.module.register_forward_pre_hook(self._hook(site, unmasked), with_kwargs=True))

    def begin(self, batch: Mapping[str, Any]) -> None:
        """A batch is about to go through the model: remember which of its tokens count."""
        self._last = ("", None)
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        self.real = mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
        ids = batch.get("input_ids")
        if isinstance(labels, Tensor) and isinstance(ids, Tensor) and labels.shape == ids.shape and not self.two_sided:
            self.real = labels != IGNORED if self.real is None else self.real & (labels != IGNORED)

    def end(self) -> dict[str, Moments]:
        """Hear no more; what was heard, by the names of the places."""
        for handle in self.handles:
            handle.remove()
        return {name: self.moments[leader] for name, leader in self.first.items()}

    def _hook(self, site: Site, unmasked: bool) -> Any:
        def hear(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            name, last = self._last
            leader = self.first.setdefault(site.name, name if last is x else site.name)
            if leader == site.name:
                if leader not in self.moments:
                    self.moments[leader] = Moments(site)
                self.moments[leader].add(_rows(x.detach(), None if unmasked else self.real))
                self._last = (leader, x)

        return hear


def _rows(x: Tensor, real: Tensor | None) -> Tensor:
    """x (…, in) as (n, in), without what is padding, where x has a row for each token."""
    flat: Tensor = x.reshape(-1, x.shape[-1])
    if real is None or real.numel() != len(flat) or (x.dim() > 2 and x.shape[:-1] != real.shape):
        return flat
    rows: Tensor = flat[real.reshape(-1)]
    return rows


def moments(model: nn.Module, places: Sequence[Site], batches: Batches, start: DataStart) -> dict[str, Moments]:
    """What each place reads in the first batches. Raises DataError where a place is never called."""
    listener = _Listener(model, places)
    try:
        with looked_at(model), torch.no_grad():
            for batch in batches.first(model, start.batches, start.kind):
                listener.begin(batch)
                batches.loss(model, batch)
    finally:
        found = listener.end()
    for site in places:
        if site.name not in found or not found[site.name].count:
            raise DataError(
                f"init={start.kind!r}: no row that counts reaches {site.name} in the batches: leave it out with "
                "exclude, or look at more batches"
            )
    return found


# -- EVA ---------------------------------------------------------------------------------------------------------------


def _eva(method: Any, start: DataStart, here: Mapping[Site, Any], seen: Mapping[str, Moments]) -> Any:
    directions: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # of moments that places share, once
    vectors: dict[str, Tensor] = {}
    shares: dict[str, Tensor] = {}
    for site, own in here.items():
        if site.name not in seen:
            continue
        one = seen[site.name]
        if id(one) not in directions:
            directions[id(one)] = _directions(one)
        values, axes, total = directions[id(one)]
        most = min(round(own.r * start.rho), len(values), site.out_features)
        if most < own.r:
            raise DataError(
                f"init='eva' takes r={own.r} directions of what {site.name} reads, and there are {most} in the "
                f"{one.count} rows seen: look at more batches, or choose a smaller r"
            )
        lengths = _lengths(values[:most], one.count, start.whiten)
        vectors[site.name], shares[site.name] = (axes[:most] * lengths[:, None]).float(), values[:most] / total
    ranks = ranks_by_share(shares, sum(own.r for site, own in here.items() if site.name in seen))
    found = {name: (axes[: ranks[name]].clone(), None) for name, axes in vectors.items()}
    start = dataclasses.replace(start, found=found)
    kept = [site for site in here if ranks.get(site.name, 1)]
    if start.rho == 1:
        return method.replace(init=start)
    own_overrides = {
        f"re:{re.escape(site.name)}": _same_scale(here[site], ranks[site.name])
        for site in kept
        if ranks.get(site.name, here[site].r) != here[site].r
    }
    others = {pattern: fields for pattern, fields in method.overrides.items() if any(s.matches(pattern) for s in kept)}
    idle = [pattern for pattern in method.overrides if not any(site.matches(pattern) for site in here)]
    others |= {pattern: method.overrides[pattern] for pattern in idle}  # which attach refuses
    targets = tuple(f"re:{re.escape(site.name)}" for site in kept)
    return method.replace(init=start, targets=targets, exclude=None, layers=None, overrides={**own_overrides, **others})


def _directions(seen: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """The variances along the principal directions, falling; these (k, in), each with its largest entry above 0; and
    the whole variance, all times the number of rows.
    """
    values, axes = torch.linalg.eigh(seen.scatter())
    values, axes = values.flip(0), axes.T.flip(0)
    kept = int((values > ENOUGH * values[0].clamp(min=torch.finfo(values.dtype).tiny)).sum())
    axes = axes[:kept]
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return values[:kept], axes * signs, values.sum()


def _lengths(values: Tensor, count: int, whiten: bool | str) -> Tensor:
    """How long A's rows are, for variances times the number of rows."""
    if whiten == "authors":
        return values**-0.25
    return (values / count).rsqrt() if whiten else torch.ones_like(values)


def ranks_by_share(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of each place's directions are among the `budget` with the largest shares; ties go to earlier places."""
    together = torch.cat([share.cpu() for share in shares.values()])
    owners = [name for name, share in shares.items() for _ in share]
    ranks = dict.fromkeys(shares, 0)
    for position in together.argsort(descending=True, stable=True)[:budget].tolist():
        ranks[owners[position]] += 1
    return ranks


def _same_scale(method: Any, r: int) -> dict[str, Any]:
    """Rank r with the alpha that keeps the scale s."""
    ratio = r / method.r
    return {"r": r, "alpha": method.alpha * (ratio**0.5 if method.rank_stabilised else ratio)}


# -- CorDA -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _corda(site: Site, method: Any, mode: str, seen: Moments) -> Factors:
    weight = site.weight.detach().to(seen.outer.dtype)
    covariance, inverse = damped(seen.outer / seen.count)
    u, s, v = torch.linalg.svd((weight.T if site.transposed else weight) @ covariance, full_matrices=False)
    part = slice(0, method.r) if mode == "ipm" else slice(len(s) - method.r, len(s))
    root = torch.sqrt(s[part] / method.scale)
    return (root[:, None] * (v[part] @ inverse)).float(), (u[:, part] * root).float().contiguous()


def damped(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """C at a mean diagonal entry of 1, with so much added to its diagonal that it has an inverse, and that inverse."""
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    mean = covariance.diagonal().mean()
    covariance = covariance / torch.where(mean > 0, mean, 1)  # a place that reads zeros alone: C = 0
    damping = DAMPING
    while True:
        enough = covariance + damping * identity
        inverse = torch.linalg.inv(enough)
        if float(torch.dist(enough @ inverse, identity)) < INVERSE_ERROR:
            return enough, inverse
        damping *= 2


# -- LoRA-GA -----------------------------------------------------------------------------------------------------------


def _gradients(model: nn.Module, places: Sequence[Site], batches: Batches, start: DataStart) -> dict[int, Tensor]:
    """The mean gradient of each weight over the batches, by the weight's id: tied ones are one."""
    weights = {id(site.weight): site.weight for site in places}
    named = {str(key): weight for key, weight in weights.items()}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = batches.loss(model, batch)
        if not value.requires_grad:
            raise DataError("init='lora_ga': no gradient of the loss reaches any of the places: name others")
        return value

    means = of_gradients(model, named, Batches((), loss), batches.first(model, start.batches, start.kind), False)
    found = dict(zip(weights, means, strict=True))
    for site in places:
        if not bool(found[id(site.weight)].any()):
            raise DataError(
                f"init='lora_ga': no gradient reaches {site.name} in the batches: leave it out with exclude, "
                "or look at more batches"
            )
    return found


@torch.no_grad()
def _lora_ga(site: Site, r: int, gamma: float, gradient: Tensor) -> Factors:
    u, _, v = torch.linalg.svd(gradient.T if site.transposed else gradient, full_matrices=False)
    size = site.out_features**0.25 / gamma**0.5
    return (size * v[:r]).contiguous(), (size * u[:, r : 2 * r]).contiguous()
