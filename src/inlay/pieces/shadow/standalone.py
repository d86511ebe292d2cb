"""A shadow's network as a model of its own, without the model that it was trained beside."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from inlay.engine.adapters import adapters_of, base_model
from inlay.engine.host import base_class, inlays_of
from inlay.engine.structure import parent
from inlay.errors import AdapterError, UnsupportedError
from inlay.pieces.shadow.pieces import LossPiece, NetworkPiece
from inlay.pieces.shadow.places import size


@torch.no_grad()
def standalone_shadow(model: nn.Module, name: str = "default") -> Any:
    """A new model of the base's class that computes head(s⁰), with the network of the adapter `name` as its trunk.

    Nothing is shared with the model. A narrow network's projection is folded into the head. `generate`,
    `save_pretrained` and `from_pretrained` are transformers' own. AdapterError where the adapter is no Shadow,
    UnsupportedError where the base has no head of its own that s⁰ was trained for.
    """
    placed = list(adapters_of(model).get(name).pieces())
    found = [(site, piece) for site, piece in placed if isinstance(piece, NetworkPiece)]
    if not found:
        raise AdapterError(f"the adapter {name!r} has no Shadow, whose network could stand by itself")
    (site, piece), base = found[0], base_model(model)
    if not site.path or not LossPiece.fits(base, size(site.module.config, "hidden_size")):
        raise UnsupportedError(
            f"{type(base).__name__} has no head that Shadow's network was trained for: it predicts nothing"
        )
    if base_class(type(site.module)) is not type(piece.shadow_backbone):
        raise UnsupportedError(
            "a pretrained network of another kind than the model is no such model: load it from its own folder"
        )
    network: Any = copy.deepcopy(piece.shadow_backbone)
    if piece.shared is not None:
        table: Any = site.module.get_input_embeddings()  # type: ignore[operator]
        if inlays_of(table) is not None:
            raise UnsupportedError("the table of tokens that Shadow's network reads is adapted: detach what sits there")
        setattr(network.get_submodule(parent(piece.shared)), piece.shared.rpartition(".")[2], copy.deepcopy(table))
    config = copy.deepcopy(network.config)
    config.tie_word_embeddings = False
    made: Any = base_class(type(base))(config)
    made.set_submodule(site.path, network)
    losses = [other for _, other in placed if isinstance(other, LossPiece) and other.classifies]
    head: Any = losses[0].shadow_head if losses else base.get_output_embeddings()  # type: ignore[operator]
    target = "score" if losses else next(n for n, m in made.named_modules() if m is made.get_output_embeddings())
    made.set_submodule(target, folded(head, piece.shadow_projection))
    return made.to(next(network.parameters()).dtype).train(base.training)


def folded(head: Any, projection: nn.Module) -> nn.Linear:
    """head(P s) as one linear of s."""
    weight, bias = head.weight.detach(), head.bias
    if isinstance(projection, nn.Linear):
        weight = weight.to(projection.weight.dtype) @ projection.weight
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    made.weight.copy_(weight)
    if bias is not None:
        made.bias.copy_(bias)
    return made
