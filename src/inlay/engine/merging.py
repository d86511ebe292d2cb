"""What each host's parameters become when the active pieces are folded into them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from inlay.engine.host import Inlays, hosts
from inlay.errors import UnsupportedError

if TYPE_CHECKING:
    from inlay.engine.adapters import Adapters

Merged = dict[str, dict[str, Tensor | None]]


@torch.no_grad()
def merged_parameters(model: nn.Module, adapters: Adapters) -> Merged:
    """By host path, the parameters that change. Sums are formed in fp32 and rounded once, to the base's dtype."""
    changed: Merged = {}
    for path, module, inlays in hosts(model):
        _refuse_unmergeable(path, module, inlays, adapters)
        new: dict[str, Tensor | None] = {}
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
        if new:
            changed[path] = new
    return changed


def _refuse_unmergeable(path: str, module: nn.Module, inlays: Inlays, adapters: Adapters) -> None:
    for piece in inlays.pieces(adapters.state.active, None):
        weight = module._parameters.get("weight")
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


def swap(model: nn.Module, adapters: Adapters, changed: Merged) -> None:
    """Put the merged parameters in, keeping the originals; parameters that were tied and merge alike stay tied."""
    made: list[tuple[nn.Parameter | None, nn.Parameter]] = []
    for path, module, inlays in hosts(model):
        for name, value in changed.get(path, {}).items():
            original = module._parameters.get(name)
            assert value is not None
            like = original if original is not None else inlays.original("weight")  # a bias that the base lacks
            parameter = nn.Parameter(value.detach().to(like.dtype).contiguous().clone(), requires_grad=False)
            if original is not None:
                parameter = next((p for o, p in made if o is original and torch.equal(p, parameter)), parameter)
            made.append((original, parameter))
            adapters.originals.setdefault(path, {})[name] = original
            module._parameters[name] = parameter
