"""What each host's parameters become when the active pieces are folded into them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from inlay.engine.host import Inlays, inlays_of
from inlay.engine.piece import Piece
from inlay.engine.walk import modules
from inlay.errors import UnsupportedError

if TYPE_CHECKING:
    from inlay.engine.adapters import Adapters

Merged = tuple[str, nn.Module, dict[str, Tensor]]
"""A host's path, the host, and what those of its parameters that change become."""
Made = dict[int, list[nn.Parameter]]
"""What was put in so far, by the identity of what was there."""


def merged_parameters(adapters: Adapters) -> Iterator[Merged]:
    """The parameters that change, host by host. Sums are formed in fp32 and rounded once, to the base's dtype.

    Only the hosts of the active adapters are looked at. Raises UnsupportedError before the first of them is given.
    """
    found = {site.path: inlays_of(site.module) for site, _ in adapters.active_pieces()}
    places = {path: inlays for path, inlays in found.items() if inlays is not None}
    for path, inlays in places.items():
        _refuse_unmergeable(path, inlays.host, list(inlays.pieces(adapters.state.active, None)))
    return ((path, inlays.host, _changes(inlays, adapters)) for path, inlays in places.items())


@torch.no_grad()
def _changes(inlays: Inlays, adapters: Adapters) -> dict[str, Tensor]:
    new: dict[str, Tensor] = {}
    if any(True for _ in inlays.pieces(adapters.state.active, None)):
        onion = inlays.call()
        weight = onion.weight()
        new["weight"] = weight.T if inlays.transposed else weight
        bias = onion.bias()
        if bias is not None:
            new["bias"] = bias
    for name in inlays.parameters_touched() - set(new):
        if any(True for _ in inlays.pieces(adapters.state.active, name)):
            new[name] = inlays.value(name, inlays.original(name))
    return new


def _refuse_unmergeable(path: str, module: nn.Module, layers: list[Piece]) -> None:
    weight = module._parameters.get("weight")
    for piece in layers:
        if not piece.mergeable:
            raise UnsupportedError(
                f"cannot merge: {type(piece).__name__} at {path or 'the model itself'} is not a change of the weights; "
                "keep the adapter attached (its files load anywhere the base model does)"
            )
        if weight is None or not weight.is_floating_point():
            stored = "recomputed at each call (parametrised)" if weight is None else f"quantised to {weight.dtype}"
            raise UnsupportedError(
                f"cannot merge into {path}, whose weight is {stored}: load the adapter on the plain base, and merge it "
                "there"
            )


@torch.no_grad()
def fold(model: nn.Module, adapters: Adapters, changed: Iterator[Merged]) -> None:
    """Write the merged parameters over the base's own; one that another module reads too is replaced here instead."""
    places = Counter(id(parameter) for _, m in modules(model) for parameter in m._parameters.values())
    made: Made = {}
    for _, module, values in changed:
        for name, value in values.items():
            original = module._parameters.get(name)
            if original is not None and places[id(original)] == 1:
                original.copy_(value)
            else:
                like = _like(module, original)
                module._parameters[name] = _shared(made, original, value.to(like.dtype).contiguous().clone())


def swap(adapters: Adapters, changed: Iterator[Merged]) -> None:
    """Put the merged parameters in, keeping the originals; parameters that were tied and merge alike stay tied."""
    kept = {_storage(tensor) for _, piece in adapters.active_pieces() for tensor in _tensors(piece)}
    made: Made = {}
    for path, module, values in changed:
        for name, value in values.items():
            original = module._parameters.get(name)
            like = _like(module, original)
            merged = value.detach().to(like.dtype).contiguous()
            if _storage(merged) in kept or _storage(merged) == _storage(like):
                merged = merged.clone()  # a piece may give a tensor that it keeps, or the base's own
            adapters.originals.setdefault(path, {})[name] = original
            module._parameters[name] = _shared(made, original, merged)


def _like(module: nn.Module, original: nn.Parameter | None) -> nn.Parameter:
    """Whose dtype the merged parameter takes: its own, or the weight's for a bias that the base lacks."""
    like = module._parameters["weight"] if original is None else original
    assert like is not None
    return like


def _shared(made: Made, original: nn.Parameter | None, merged: Tensor) -> nn.Parameter:
    """The parameter to put in: one made before, where the two were one and are equal again."""
    alike = made.setdefault(id(original), []) if original is not None else []
    found = next((parameter for parameter in alike if torch.equal(parameter, merged)), None)
    if found is None:
        found = nn.Parameter(merged, requires_grad=False)
        alike.append(found)
    return found


def _tensors(piece: nn.Module) -> list[Tensor]:
    """Every tensor that a piece keeps."""
    named = [{**module._parameters, **module._buffers} for module in piece.modules()]
    return [tensor for tensors in named for tensor in tensors.values() if tensor is not None]


def _storage(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    return tensor.untyped_storage().data_ptr()
