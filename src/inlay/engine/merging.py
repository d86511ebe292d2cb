"""What each host's parameters become when the active pieces are folded into them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from inlay.engine.host import inlays_of
from inlay.engine.piece import Piece
from inlay.errors import UnsupportedError

if TYPE_CHECKING:
    from inlay.engine.adapters import Adapters

Merged = dict[str, tuple[nn.Module, dict[str, Tensor]]]
"""By host path, the host, and what those of its parameters that change become."""


@torch.no_grad()
def merged_parameters(adapters: Adapters) -> Merged:
    """The parameters that change. Sums are formed in fp32 and rounded once, to the base's dtype.

    Only the hosts of the active adapters are looked at.
    """
    changed: Merged = {}
    for site, _ in adapters.active_pieces():
        path, module, inlays = site.path, site.module, inlays_of(site.module)
        if path in changed or inlays is None:
            continue
        new: dict[str, Tensor] = {}
        layers = list(inlays.pieces(adapters.state.active, None))
        if layers:
            _refuse_unmergeable(path, module, layers)
            onion = inlays.call()
            weight = onion.weight()
            new["weight"] = weight.T if inlays.transposed else weight
            bias = onion.bias()
            if bias is not None:
                new["bias"] = bias
        for name in inlays.parameters_touched() - set(new):
            if any(True for _ in inlays.pieces(adapters.state.active, name)):
                new[name] = inlays.value(name, inlays.original(name))
        changed[path] = module, new
    return changed


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


def swap(adapters: Adapters, changed: Merged) -> None:
    """Put the merged parameters in, keeping the originals; parameters that were tied and merge alike stay tied."""
    kept = {_storage(tensor) for _, piece in adapters.active_pieces() for tensor in _tensors(piece)}
    made: dict[int, list[nn.Parameter]] = {}  # by the identity of the original
    for path, (module, values) in changed.items():
        for name, value in values.items():
            original = module._parameters.get(name)
            like = module._parameters["weight"] if original is None else original  # a bias that the base lacks
            assert like is not None
            merged = value.detach().to(like.dtype).contiguous()
            if _storage(merged) in kept or _storage(merged) == _storage(like):
                merged = merged.clone()  # a piece may give a tensor that it keeps, or the base's own
            parameter = nn.Parameter(merged, requires_grad=False)
            if original is not None:
                alike = made.setdefault(id(original), [])
                parameter = next((p for p in alike if torch.equal(p, parameter)), parameter)
                alike.append(parameter)
            adapters.originals.setdefault(path, {})[name] = original
            module._parameters[name] = parameter


def _tensors(piece: nn.Module) -> list[Tensor]:
    """Every tensor that a piece keeps."""
    named = [{**module._parameters, **module._buffers} for module in piece.modules()]
    return [tensor for tensors in named for tensor in tensors.values() if tensor is not None]


def _storage(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    return tensor.untyped_storage().data_ptr()
