"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

    y = W x + s · B (A x),      s = alpha / r,  or alpha / √r with rank-stabilised scaling (Kalajdzievski 2023,
                                arXiv:2312.03732)

A (r, in), B (out, r); B starts at zero, so the model starts as the base. OLoRA (Büyükakyüz 2024, arXiv:2406.01775) and
PiSSA (Meng et al. 2024, arXiv:2404.02948) start from factors of W itself; here their starting product is subtracted in
the piece, never from the base: y = W x + s · (B A − B₀ A₀) x. EVA (Paischer et al. 2024, arXiv:2410.07170),
CorDA (Yang et al. 2024, arXiv:2406.05223) and LoRA-GA (Wang et al. 2024, arXiv:2407.05000) look at rows first.

Parameters: r · (in + out) for each linear.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from inlay.engine.checkpoint import LOADING
from inlay.engine.peft_names import file_paths, peft_pattern, peft_targets
from inlay.engine.piece import Method, Piece, take
from inlay.engine.registry import all_methods, over_adapters
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.trained_copy import copies
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.lora.data_start import DATA_INITS, DataStart, data_start, is_from_data, is_subtracted, prepared
from inlay.pieces.lora.peft_config import fields_from_peft, peft_can_convolve
from inlay.pieces.lora.piece import LoRAPiece
from inlay.pieces.lora.quantised_start import is_quantised, plain_weights_of
from inlay.pieces.lora.start import INITS, smaller_side

Init = Literal["kaiming", "gaussian", "orthogonal", "olora", "pissa", "loftq", "random", "eva", "corda", "lora_ga"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """y = W x + s · B (A x): a low-rank change of chosen weights."""

    kind = "lora"
    hosts = frozenset({"linear", "conv", "embedding", "parameter"})
    default_targets = "query,value"
    peft_type = "LORA"
    paper = "Hu et al. 2021, arXiv:2106.09685"
    peft_variant: ClassVar[str] = ""
    """The entry of peft's LoraConfig that makes a LoRA this variant of it."""

    r: int = 8
    """Rank of the change."""
    alpha: float = 16
    """Numerator of the scale s."""
    dropout: float = 0.0
    """Probability of zeroing an entry of x before A, in training."""
    rank_stabilised: bool = False
    """s = alpha / √r instead of alpha / r."""
    init: Init | Mapping[str, Any] | DataStart = "kaiming"
    """How A and B start: kaiming or gaussian A with B = 0; orthogonal (B A = 0); olora (QR of W); pissa (SVD of W);
    loftq (SVD of what quantising W lost); eva, corda, lora_ga (from training rows), or {"kind": "eva", "rho": 1}."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Train biases of the base too: every one in the model, or those of the adapted modules."""
    lora_bias: bool = False
    """A bias on B."""
    freeze_a: bool = False
    """Train B only (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303): then x is not kept for the backward."""
    precision: Literal["model", "exact"] = "model"
    """Compute the change in the dtype of the activations, or in that of A and B (fp32), as HF peft does."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ConfigError(f"{name}(r={self.r!r}): the rank must be a whole number of at least 1")
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise ConfigError(f"{name}(alpha={self.alpha!r}): a number above 0 is needed, such as 16")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ConfigError(f"{name}(dropout={self.dropout!r}): a probability in [0, 1) is needed")
        self._check_init()
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"{name}(bias={self.bias!r}): choose one of none, all, lora_only")
        if self.precision not in ("model", "exact"):
            raise ConfigError(f"{name}(precision={self.precision!r}): choose one of model, exact")

    def _check_init(self) -> None:
        """Raise ConfigError for an `init` that is none; LoRA's variants start from no data."""
        name, inits = type(self).__name__, (*INITS, *DATA_INITS) if self.kind == "lora" else INITS
        if self.kind == "lora" and is_from_data(self.init):
            data_start(self.init)
        elif self.init not in inits:
            raise ConfigError(f"{name}(init={self.init!r}): choose one of {', '.join(inits)}")
        for pattern, fields in self.overrides.items():
            given = fields.get("init")
            if is_from_data(given) and not is_from_data(self.init):
                raise ConfigError(
                    f"{name}: the override {pattern!r} starts from data, which all places do or none: give init there, "
                    "and override it where another is wanted"
                )

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilised else self.r)

    def piece(self, site: Site) -> Piece:
        return LoRAPiece(self, site)

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        if not LOADING.get():
            self._refuse_a_rank_that_nothing_has(sites)
        lost = [is_quantised(site.weight) for site in sites if cast("LoRA", self.at(site)).init == "loftq"]
        if lost and not any(lost):
            raise UnsupportedError(
                f"{type(self).__name__}(init='loftq') makes up for what quantising the base lost, and this base is not "
                "quantised: load it with load='4bit', or take init='pissa'"
            )
        with plain_weights_of(model):
            made = super().build(model, sites)
        if self.bias != "none":
            adapted = {site.path for site in sites}
            biases = (site for site in SiteIndex(model).parameters() if site.parameter == "bias")
            made += copies(site for site in biases if self.bias == "all" or site.path in adapted)
        return made

    def _refuse_a_rank_that_nothing_has(self, sites: Sequence[Site]) -> None:
        """Raise ConfigError where the rank is above what a change can have at every place: it was meant otherwise."""
        most = {site: smaller_side(site) for site in sites}
        if most and all(cast("LoRA", self.at(site)).r > rank for site, rank in most.items()):
            site = max(most, key=most.__getitem__)
            raise ConfigError(
                f"{type(self).__name__}(r={self.r}): no change has more ranks than the smaller side of its weight, "
                f"which is {most[site]} at {site.name} and no more elsewhere; choose r from 1 to {most[site]}"
            )

    @property
    def wants_data(self) -> bool:
        return is_from_data(self.init) and data_start(self.init).found is None

    def prepare(self, model: nn.Module, batches: Any) -> Method:
        """This method with A and B, and the ranks, that its `init` found in batches of the training rows."""
        return cast("LoRA", prepared(self, model, batches)) if is_from_data(self.init) else self

    # -- files -------------------------------------------------------------------------------------------------------

    def export(self, pieces: Sequence[tuple[Site, Piece]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {key: tensor for _, named in self._keyed(pieces) for key, (_, tensor) in named.items()}, {}

    def import_(
        self, pieces: Sequence[tuple[Site, Piece]], tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> None:
        for piece, named in self._keyed(pieces):
            piece.load_file_tensors({name: take(tensors, key, own.shape) for key, (name, own) in named.items()})

    def _keyed(self, pieces: Sequence[tuple[Site, Piece]]) -> Iterator[tuple[Piece, dict[str, tuple[str, Tensor]]]]:
        """Each piece with its tensors by their keys in the file."""
        for path, (site, piece) in zip(file_paths(pieces), pieces, strict=True):
            named = piece.file_tensors().items()
            yield piece, {f"base_model.model.{path}.{name or site.parameter}": (name, own) for name, own in named}

    def for_file(self) -> Method:
        return self.replace(init=data_start(self.init).kind) if is_from_data(self.init) else self

    def peft_rank_and_alpha(self) -> tuple[int, float]:
        """r and alpha as the file has them: factors of W take twice the rank there, at the same scale."""
        if not is_subtracted(self.init):
            return self.r, self.alpha
        return 2 * self.r, self.alpha * (math.sqrt(2) if self.rank_stabilised else 2)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        sites = [site for site in sites if site.parameter != "bias"]
        here = {site: cast("LoRA", self.at(site)) for site in sites}
        if any(one.rank_stabilised != self.rank_stabilised for one in here.values()):
            raise UnsupportedError("HF peft has one use_rslora for all places")
        if any(site.kind == "conv" and not peft_can_convolve(site.module) for site in sites):
            raise UnsupportedError("HF peft ignores the dilation and the padding mode of convolutions")
        r, alpha = self.peft_rank_and_alpha()
        stored = {site: one.peft_rank_and_alpha() for site, one in here.items()}
        return {
            **peft_targets(sites, index),
            "r": r,
            "lora_alpha": alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rank_stabilised,
            "init_lora_weights": self.init if self.init in ("gaussian", "orthogonal") else True,
            "bias": self.bias,
            "lora_bias": self.lora_bias,
            "fan_in_fan_out": any(site.kind == "linear" and site.transposed for site in sites),
            "rank_pattern": peft_pattern({site: values[0] for site, values in stored.items()}, r),
            "alpha_pattern": peft_pattern({site: values[1] for site, values in stored.items()}, alpha),
        }

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of this dataclass that a peft LoraConfig gives. Raises UnsupportedError for what is not here."""
        return fields_from_peft(config)

    @classmethod
    def is_variant(cls, config: Mapping[str, Any]) -> bool:
        """Whether a peft LoraConfig describes this variant of LoRA."""
        return bool(config.get(cls.peft_variant))

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> list[Method]:
        from inlay.methods.trainable_tokens import TrainableTokens

        known = [cast("type[LoRA]", one) for one in (*all_methods(), *over_adapters()) if hasattr(one, "peft_variant")]
        variants = [one for one in known if one.is_variant(config)]
        if len(variants) > 1:
            names = " and ".join(one.peft_variant for one in variants)
            raise UnsupportedError(f"this LoRA adapter uses {names}, which Inlay does not have together")
        kind = variants[0] if variants else cls
        rows = TrainableTokens.from_lora(config) if config.get("trainable_token_indices") else []
        return [kind(**kind.fields_from_peft(config)), *rows]
