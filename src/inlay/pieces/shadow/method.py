"""What a shadow's method does with its fields: where its pieces go, and what HF peft's files call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.linear import LinearMethod
from inlay.pieces.shadow.pieces import SIZES, BlockPiece, LossPiece, NetworkPiece
from inlay.pieces.shadow.places import check_blocks, holder_of, size
from inlay.pieces.shadow.trajectory import Trajectory

WHOLE = ("shadow_backbone", "shadow_projection", "shadow_head")
"""Parts that peft keeps beside the model, not in it."""
MIRROR = "mirror"
HOLDERS = ("", "model", "transformer", "base_model", "decoder")
"""Where peft looks for the module that runs the blocks, which it calls `layers` or `h`."""


class ShadowMethod(LinearMethod):
    """A method on blocks, with a network beside them."""

    hosts = frozenset({"module"})
    default_targets = "block"
    peft_conv1d = False

    pretrained: str | None
    auxiliary_loss_weight: float

    def __post_init__(self) -> None:
        optional = ("hidden_size", "num_attention_heads", "intermediate_size", "update_hidden_size")
        self.check_whole("r", "num_hidden_layers", *(name for name in optional if getattr(self, name) is not None))
        self.check_number("alpha")
        self.check_rate("dropout")
        self.check_at_least_zero("auxiliary_loss_weight")
        sizes = [field for field in self.peft_fields() if field.name in SIZES]
        if self.pretrained is not None and any(getattr(self, field.name) != field.default for field in sizes):
            raise ConfigError(f"Shadow(pretrained={self.pretrained!r}) has the sizes of that model: leave them out")
        if self.overrides:
            raise ConfigError("Shadow has no overrides: its blocks share one state")

    def sites(self, index: SiteIndex) -> list[Site]:
        """The blocks. Raises an error of one sentence for places and models that a state cannot pass through."""
        blocks = super().sites(index)
        check_blocks(index, blocks)
        holder_of(index, blocks)
        return blocks

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        """A piece on what runs the blocks, one on each block, and one on the model where it makes a loss."""
        index, trajectory = SiteIndex(model), Trajectory()
        holder, root = holder_of(index, sites), index.by_name()[""]
        width = size(holder.module.config, "hidden_size")
        made: list[tuple[Site, Piece]] = [
            (holder, NetworkPiece(self, holder, [site.module for site in sites], trajectory)),
            *((site, BlockPiece(self, site, width, trajectory, last=site is sites[-1])) for site in sites),
        ]
        if holder.path and LossPiece.fits(model, width):
            made.append((root, LossPiece(self.auxiliary_loss_weight, root, trajectory)))
        return made

    # -- files -------------------------------------------------------------------------------------------------------

    def file_key(self, site: Site, name: str) -> str:
        """peft has the adapter's name in these keys, and writes "default" whatever it is called."""
        part, _, rest = name.partition(".")
        where = ("base_model",) if part in WHOLE else ("base_model.model", site.path)
        return ".".join(filter(None, (*where, part, "default", rest)))

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        """peft's ShadowConfig. UnsupportedError for models in which peft finds no blocks."""
        blocks = [site for site in sites if "block" in site.roles]
        holder, _, stack = blocks[0].path.rpartition(".")[0].rpartition(".")
        if stack not in ("layers", "h") or not {holder, holder.removesuffix(".decoder")} & {*HOLDERS}:
            raise UnsupportedError(f"HF peft finds no blocks for Shadow in {type(index.model).__name__}")
        fields = {**super().to_peft(blocks, index), "target_modules": [site.path for site in blocks]}
        if self.pretrained is None:
            return {**fields, "shadow_model": MIRROR}
        return {**fields, **{f"shadow_{name}": None for name in SIZES}}

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """peft's word for a network of the model's own kind is None here."""
        fields = super().fields_from_peft(config)
        return {**fields, "pretrained": None} if fields.get("pretrained") == MIRROR else fields

    def import_(
        self, pieces: Sequence[tuple[Site, Piece]], tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> None:
        """Without the table of tokens that peft keeps and never reads, in networks that call it not embed_tokens."""
        for site, piece in pieces:
            if isinstance(piece, NetworkPiece) and piece.shared is not None:
                tensors.pop(self.file_key(site, f"shadow_backbone.{piece.shared}.weight"), None)
        super().import_(pieces, tensors, extra)
