"""`select`: which parameters of a model to train, by how much each matters, to an exact budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from inlay.engine.adapters import base_model, disabled, find_adapters
from inlay.engine.batches import Batches, Loss
from inlay.engine.fingerprint import fingerprint
from inlay.engine.parameters import parameter_sites
from inlay.engine.roles import new_heads
from inlay.engine.sites import Site, SiteIndex, Targets
from inlay.engine.structure import ancestors
from inlay.errors import ConfigError, TargetError, UnsupportedError, did_you_mean
from inlay.kernels import exact_top_k
from inlay.pieces.subsets import groups, scores, searches
from inlay.pieces.subsets.subset import Subset

SCOPES = ("global", "tensor")
Budget = int | float | Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """How to choose; checked when it is made. `select` says what each means."""

    budget: Budget | None = None
    threshold: float | None = None
    score: str = "fisher"
    granularity: str = "element"
    scope: str = "global"
    batches: int = 64
    seed: int = 0
    search_steps: int = 300
    search_learning_rate: float = 3e-5
    l0_penalty: float = 1.25e-7
    what: str = "select"

    def __post_init__(self) -> None:
        for name, known in (("score", scores.SCORES), ("granularity", groups.GRANULARITIES), ("scope", SCOPES)):
            if (value := getattr(self, name)) not in known:
                hint = did_you_mean(str(value), known) or f"; choose one of {', '.join(known)}"
                raise ConfigError(f"{self.what}({name}={value!r}): there is no such {name}{hint}")
        if (self.budget is None) == (self.threshold is None):
            raise ConfigError(f"{self.what}: give a budget (entries, or a share below 1) or a threshold, and not both")
        check_budget(self.budget, self.what)
        by_tensor = self.scope == "tensor" or isinstance(self.budget, Mapping)
        if by_tensor and (self.granularity != "element" or self.threshold is not None):
            raise ConfigError(f"{self.what}: a budget for each tensor goes with granularity='element' alone")
        for name, least in (("batches", 1), ("seed", 0), ("search_steps", 1)):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise ConfigError(f"{self.what}({name}={number!r}): a whole number of at least {least} is needed")


def check_budget(budget: Any, what: str) -> None:
    """Raise ConfigError for what is no number of entries and no share of them."""
    if budget is None or isinstance(budget, Mapping):
        return
    count = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
    share = isinstance(budget, float) and 0 < budget <= 1
    if not (count or share):
        raise ConfigError(
            f"{what}(budget={budget!r}): a number of entries (a whole number from 1) or their share (such as 0.005) "
            "is needed"
        )


def select(
    model: nn.Module,
    data: Any = None,
    budget: Budget | None = None,
    *,
    score: str = "fisher",
    granularity: str = "element",
    scope: str = "global",
    threshold: float | None = None,
    targets: Targets = None,
    exclude: Targets = None,
    layers: Any = None,
    batches: int = 64,
    seed: int = 0,
    search_steps: int = 300,
    search_learning_rate: float = 3e-5,
    l0_penalty: float = 1.25e-7,
    loss: Loss | None = None,
) -> Subset:
    """The part of the model's parameters that matters most by `score`, for `SparseDelta(subset=…)` to train.

    `data` is an iterable of batches (mappings of the model's inputs, with labels), of which the first `batches` are
    looked at; scores "random" and "magnitude" need none. `budget` is a number of entries, or their share of all that
    `targets` names (by default everything but new heads), and is met exactly: the largest scores of the whole, or with
    scope="tensor" of each tensor in proportion to its size; a mapping gives each parameter its own number. Of equal
    scores the first in the model win. Groups ("row", "column", "head", "tensor") are taken whole, best mean first, as
    long as they fit. `threshold` takes whatever scores at least so much instead. Scores "lottery" and "l0" train all
    that `targets` names for `search_steps` and keep what moved most; with "l0" the subset starts where that ended.

    The model is left as it was, its random states too. Raises ConfigError, TargetError and DataError for what cannot
    be used, UnsupportedError for quantised weights.
    """
    choice = Choice(
        budget=budget,
        threshold=threshold,
        score=score,
        granularity=granularity,
        scope=scope,
        batches=batches,
        seed=seed,
        search_steps=search_steps,
        search_learning_rate=search_learning_rate,
        l0_penalty=l0_penalty,
    )
    model = base_model(model)
    index = SiteIndex(model)
    sites = candidates(index, targets, exclude, layers, "select")
    given = None if data is None else Batches.of(data, loss)
    if find_adapters(model) is None:
        return chosen(index, sites, choice, given)
    with disabled(model):
        return chosen(index, sites, choice, given)


def candidates(index: SiteIndex, targets: Targets, exclude: Targets, layers: Any, what: str) -> list[Site]:
    """The parameters that may be chosen from, each tensor once. What is new is trained whole: heads unless they are
    named, and whatever the base's files lacked.
    """
    sites = parameter_sites(index, targets, exclude=exclude, layers=layers, what=what)
    left_out = set(untrained(index.model) if targets is None else fresh_modules(index.model))
    sites = [site for site in sites if not left_out & {site.path, *ancestors(site.path)}]
    if not sites:
        raise TargetError(f"{what}: targets={targets!r} names only what is new here and trained whole")
    once: dict[int, Site] = {}
    for site in sites:
        once.setdefault(id(site.weight), site)
    for site in once.values():
        if not site.weight.is_floating_point():
            raise UnsupportedError(
                f"{what}: {site.name} holds {site.weight.dtype} codes (a quantised weight), of which no single entry "
                "can be trained; load the plain weights, or use a method that adds to it, such as LoRA"
            )
    return list(once.values())


def chosen(index: SiteIndex, sites: Sequence[Site], choice: Choice, data: Batches | None) -> Subset:
    """The subset of these parameters. Raises ConfigError for a score that needs data where there is none."""
    if choice.score in scores.FROM_DATA and data is None:
        raise ConfigError(
            f"{choice.what}(score={choice.score!r}) has to see data: `inlay train` shows it some; otherwise call "
            "inlay.select(model, batches, …), or the method's prepare(model, batches), and attach what that returns"
        )
    parameters = {site.name: site.weight for site in sites}
    budget = _number(choice, parameters)
    moved: list[Tensor] | None = None
    if choice.score in searches.SEARCHES:
        assert data is not None
        search = searches.Search(
            steps=choice.search_steps,
            learning_rate=choice.search_learning_rate,
            l0_penalty=choice.l0_penalty,
            seed=choice.seed,
        )
        found = moved = searches.changes(choice.score, index, sites, search, data, untrained(index.model))
        numbers: scores.Numbers = lambda: (one.abs() for one in found)  # noqa: E731
    else:
        numbers = scores.numbers(choice.score, index.model, parameters, data, choice.batches, choice.seed)
    if choice.granularity != "element":
        parts = groups.blocks(choice.granularity, index, sites)
        by_chance = choice.seed if choice.score == "random" else None
        assert not isinstance(budget, Mapping)
        entries = groups.choose(parts, numbers, list(parameters), budget, choice.threshold, by_chance)
    else:
        entries = _elements(parameters, numbers, budget, choice)
    if not entries:
        limit = f"budget={choice.budget!r}" if choice.threshold is None else f"threshold={choice.threshold!r}"
        raise ConfigError(f"{choice.what}({limit}): no {choice.granularity} is within it; raise or lower it")
    made = {field.name: getattr(choice, field.name) for field in dataclasses.fields(choice) if field.name != "what"}
    made["budget"] = dict(choice.budget) if isinstance(choice.budget, Mapping) else choice.budget
    values = None
    if moved is not None and choice.score == "l0":
        pairs = ((name, one.flatten().cpu()) for name, one in zip(parameters, moved, strict=True) if name in entries)
        values = {name: one if (where := entries[name]) is None else one[where] for name, one in pairs}
    shapes = {name: tuple(parameters[name].shape) for name in entries}
    return Subset(entries, shapes, base_of(index.model), made, values)


def _elements(
    parameters: Mapping[str, Tensor], numbers: scores.Numbers, budget: int | Mapping[str, int] | None, choice: Choice
) -> groups.Entries:
    if budget is None:
        assert choice.threshold is not None
        indices = exact_top_k.above(numbers, choice.threshold)
    elif isinstance(budget, Mapping):
        indices = [
            exact_top_k.largest(lambda one=one: [one], budget.get(name, 0))[0]  # type: ignore[misc]
            for name, one in zip(parameters, numbers(), strict=True)
        ]
    else:
        indices = exact_top_k.largest(numbers, budget)
    return {
        name: None if len(where) == parameters[name].numel() else where.cpu()
        for name, where in zip(parameters, indices, strict=True)
        if len(where)
    }


def _number(choice: Choice, parameters: Mapping[str, Tensor]) -> int | Mapping[str, int] | None:
    """The budget in entries, of the whole or of each tensor. Raises ConfigError where there are fewer."""
    sizes = {name: value.numel() for name, value in parameters.items()}
    if isinstance(choice.budget, Mapping):
        for name, number in choice.budget.items():
            if not 0 <= number <= sizes.get(name, -1):
                have = f"which has {sizes[name]:,} entries" if name in sizes else "which is no parameter to choose from"
                hint = "" if name in sizes else did_you_mean(name, sizes)
                raise ConfigError(f"{choice.what}: a budget of {number} for {name!r}, {have}{hint}")
        return choice.budget
    if choice.budget is None:
        return None
    total = sum(sizes.values())
    budget = round(choice.budget * total) if isinstance(choice.budget, float) else choice.budget
    if not 1 <= budget <= total:
        raise ConfigError(
            f"{choice.what}(budget={choice.budget!r}) is {budget:,} of {total:,} entries; give 1 to {total:,}"
        )
    if choice.scope == "tensor":
        return dict(zip(sizes, exact_top_k.shares(list(sizes.values()), budget), strict=True))
    return budget


def fresh_modules(model: nn.Module) -> list[str]:
    """Modules that started from random numbers, because the base's files lack them (`tasks.loading` says which)."""
    return sorted({name.rpartition(".")[0] for name in getattr(model, "fresh_parameters", ())})


def untrained(model: nn.Module) -> list[str]:
    """New heads, and the other modules that the base's files lack."""
    heads = new_heads(model)
    return heads + [path for path in fresh_modules(model) if not {path, *ancestors(path)} & set(heads)]


def base_of(model: nn.Module) -> dict[str, Any]:
    """The fingerprint of a model without what is untrained, whose random numbers belong to no base."""
    heads = tuple(f"{head}." for head in untrained(model))
    return fingerprint(model, frozenset(name for name, _ in model.named_parameters() if name.startswith(heads)))
