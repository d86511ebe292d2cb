"""`combine`: one adapter out of several; `to_lora`: a LoRA out of any adapter that changes weights.

    inlay.combine(model, {"law": 0.7, "poems": 0.3}, how="ties", name="both")
    inlay.to_lora(model, "poems", rank=8, name="poems-8")

All rules work on the changes ΔW of the weights, never on A and B apart. What comes out is a LoRA with a rank of its own
at each place: it saves, loads, merges and trains on like any other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from inlay.combining.composition import is_number
from inlay.combining.low_rank import Change, added, factored
from inlay.combining.rules import RULES, SIGNS, rule
from inlay.engine.adapters import Adapter, adapters_of, attach, base_model, check_name
from inlay.engine.host import inlays_of
from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.engine.trained_copy import ModulesToSave
from inlay.errors import ConfigError, UnsupportedError, did_you_mean
from inlay.methods.lora import LoRA
from inlay.pieces.lora.piece import LoRAPiece

Rank = int | float | None
FULL = 2**31
"""More than any rank: all of a change that has no factors."""


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    how: str = "linear",
    name: str = "combined",
    *,
    rank: Rank = None,
    density: float = 0.5,
    sign: str = "total",
    seed: int = 0,
) -> nn.Module:
    """Load a new adapter `name` that combines loaded ones, each times its weight; returns the same model.

    `how`: linear (exact, of the ranks' sum; negative weights take a task away), magnitude_prune, ties, dare_linear,
    dare_ties (formulas in `inlay.combining.rules`); `density` and `sign` are theirs, `seed` is of what dare drops.
    `rank`: a whole number, or a share below 1 of ‖ΔW‖² to keep, by SVD; None: exact for linear, otherwise the largest
    rank among the adapters. Heads that they were trained with are combined too, as changes of the base's.

    The new adapter is neither active nor trainable. Raises AdapterError for adapters that are not loaded or a name in
    use, ConfigError for a choice that there is not, UnsupportedError for an adapter that does more than change
    weights; then the model is as it was.
    """
    adapters = adapters_of(model)
    check_name(name, adapters)
    _check(weights, how, rank, density, sign, seed)
    chosen = {adapters.get(one).name: float(weight) for one, weight in weights.items()}
    found = {one: changes(adapters.loaded[one]) for one in chosen}
    rules = rule(how, density, sign, torch.Generator().manual_seed(seed))
    made: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for place in dict.fromkeys(place for own in found.values() for place in own):
            here = [(found[one][place], weight) for one, weight in chosen.items() if place in found[one]]
            if how == "linear":
                total = added([change.scaled(weight) for change, weight in here])
            else:
                total = Change(matrix=rules([change.dense() for change, _ in here], [weight for _, weight in here]))
            most = max(change.rank or FULL for change, _ in here) if total.rank is None and rank is None else rank
            made[place] = factored(total, most)
        _load(model, name, made, [adapters.loaded[one] for one in chosen])
        copies = {one: _copies(adapters.loaded[one]) for one in chosen}
        for site, piece in _copies(adapters.loaded[name]).values():
            base = wide(site.weight.detach())
            own = [(copies[one][site.name][1], weight) for one, weight in chosen.items() if site.name in copies[one]]
            moved = [wide(copy.weight(base)) - base for copy, _ in own]
            piece.get_parameter("value").copy_(base + rules(moved, [weight for _, weight in own]))
    return model


def to_lora(model: nn.Module, adapter: str = "default", name: str = "lora", *, rank: Rank = 0.99) -> nn.Module:
    """Load the nearest LoRA to a loaded adapter of any kind that changes weights; returns the same model.

    `rank`: a whole number, or the share below 1 of ‖ΔW‖² that each place keeps. The relative error of a place is the
    root of the share that is left out.
    """
    if rank is None:
        raise ConfigError("to_lora(rank=None): say a rank, such as 8, or a share of the change to keep, such as 0.99")
    return combine(model, {adapter: 1.0}, "linear", name, rank=rank)


def _check(weights: Mapping[str, float], how: str, rank: Rank, density: float, sign: str, seed: int) -> None:
    if not weights:
        raise ConfigError("combine was given no adapters: pass names with weights, as in {'law': 0.5, 'poems': 0.5}")
    for word, value, choices in (("how", how, RULES), ("sign", sign, SIGNS)):
        if value not in choices:
            hint = did_you_mean(str(value), choices)
            raise ConfigError(f"combine({word}={value!r}): choose one of {', '.join(choices)}{hint}")
    for name, weight in weights.items():
        if not is_number(weight):
            raise ConfigError(f"combine({{{name!r}: {weight!r}}}): a weight is a finite number, as in 0.5")
    if not isinstance(seed, int):
        raise ConfigError(f"combine(seed={seed!r}): a whole number is needed")
    if not is_number(density) or not 0 < density <= 1:
        raise ConfigError(f"combine(density={density!r}): a share in (0, 1] is needed")
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if rank is not None and not whole and not (isinstance(rank, float) and 0 < rank < 1):
        raise ConfigError(f"rank={rank!r}: a whole number of at least 1, or a share below 1, is needed")


# -- what an adapter changes -------------------------------------------------------------------------------------------


@torch.no_grad()
def changes(adapter: Adapter) -> dict[str, Change]:
    """The change at each place, by the site's name; heads, which are trained copies, are left out."""
    found: dict[str, Change] = {}
    for method, placed in zip(adapter.methods, adapter.placed, strict=True):
        if isinstance(method, ModulesToSave):
            continue
        for site, piece in placed:
            if site.name in found:
                raise _refusal(adapter, site, piece, "is the second piece there: combine adapters of one method each")
            found[site.name] = change_of(adapter, site, piece)
    return found


def change_of(adapter: Adapter, site: Site, piece: Piece) -> Change:
    """A piece's change of its weight, (out, in); of a table (dim, rows), of a convolution (out, in · kernel)."""
    grouped = site.kind == "conv" and site.module.groups != 1
    stacked = site.kind == "parameter" and site.weight.dim() != 2
    if piece.replaces or not piece.mergeable or grouped or stacked or site.kind not in LoRA.hosts:
        raise _refusal(adapter, site, piece, "is no change that a LoRA there could make")
    weight = site.weight
    found = piece.factors()
    if found is not None:
        a, b, scale = found
        return Change(wide(a.flatten(1)), scale * wide(b.flatten(1)))
    inlays = inlays_of(site.module)
    bias = None if inlays is None or site.parameter is not None else inlays.bias_value()
    moved = piece.bias(bias)
    if (moved is None) != (bias is None) or (moved is not None and bias is not None and not torch.equal(moved, bias)):
        raise _refusal(adapter, site, piece, "changes the bias too")
    base = wide(weight.T if site.transposed else weight)
    matrix = wide(piece.weight(base)) - base
    return Change(matrix=matrix.T if site.kind == "embedding" else matrix.flatten(1))


def wide(tensor: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _refusal(adapter: Adapter, site: Site, piece: Piece, why: str) -> UnsupportedError:
    what = f"{type(piece).__name__} at {site.name or 'the model itself'}"
    return UnsupportedError(f"adapter {adapter.name!r} cannot be combined: {what} {why}")


def _copies(adapter: Adapter) -> dict[str, tuple[Site, Piece]]:
    """The trained copies of heads, by the names of their parameters."""
    pairs = zip(adapter.methods, adapter.placed, strict=True)
    placed = [one for method, own in pairs if isinstance(method, ModulesToSave) for one in own]
    return {site.name: (site, piece) for site, piece in placed}


# -- the new adapter ---------------------------------------------------------------------------------------------------


def _load(model: nn.Module, name: str, made: Mapping[str, tuple[Tensor, Tensor]], of: list[Adapter]) -> None:
    """Attach a LoRA with these factors at these places, inactive and frozen."""
    adapters = adapters_of(model)
    active = adapters.state.active
    ranks = {place: a.shape[0] for place, (a, _) in made.items()}
    usual = max(ranks.values())
    overrides = {
        "re:" + "|".join(re.escape(place) for place in ranks if ranks[place] == r): {"r": r, "alpha": float(r)}
        for r in sorted(set(ranks.values()) - {usual})
    }
    method = LoRA(r=usual, alpha=float(usual), targets=tuple(f"re:{re.escape(p)}" for p in ranks), overrides=overrides)
    heads = [m for one in of for method_ in one.methods if isinstance(method_, ModulesToSave) for m in method_.modules]
    attach(base_model(model), method, name, modules_to_save=list(dict.fromkeys(heads)))
    adapters.state.active = active
    with torch.no_grad():
        for site, piece in adapters.loaded[name].placed[0]:
            assert isinstance(piece, LoRAPiece)
            a, b = made[site.name]
            piece.lora_A.copy_(a.view(piece.lora_A.shape))
            piece.lora_B.copy_(b.view(piece.lora_B.shape))
    for parameter in adapters.loaded[name].parameters():
        parameter.requires_grad_(False)
