"""Arrow (Ostapenko et al. 2024, arXiv:2405.11157): frozen LoRAs that each token is routed to by their own directions.

    y = W x + Σ_n w_n ΔW_n x        ΔW_n = s_n B_n A_n        w = softmax of the top k of |x · v_n| / τ, 0 elsewhere

v_n, the prototype of adapter n at a place, is the direction of x that ΔW_n stretches most: its first right singular
vector, found from the factors. It is made when this is attached, without data, and can be trained from there.

`general` (GenKnowSub, Bagherifard et al. 2025, arXiv:2505.10939): ΔW_n − mean_g ΔW_g in place of ΔW_n, in the sum and
in the prototypes: what adapters of general knowledge know is taken away. As the w of a token sum to 1, the general ones
run once for all. `compat="authors"` subtracts as the authors and HF peft do, A from A and B from B, whose product is
another one, and differs with the sign or the order that the ranks happen to have.

Parameters: N · in at each place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.combining.low_rank import Change, added, main_direction
from inlay.combining.over_adapters import OverAdapters, OverPiece, own_pieces
from inlay.engine.adapters import Adapter
from inlay.engine.checkpoint import LOADING
from inlay.engine.host import inlays_of
from inlay.engine.piece import Piece, trainable_dtype
from inlay.engine.sites import Site
from inlay.errors import ConfigError, UnsupportedError
from inlay.kernels.token_mixture import Factors, token_mixture

USUAL = 3
"""How many adapters a token keeps unless told otherwise: HF peft's number."""


class ArrowPiece(OverPiece):
    """Σ w_n ΔW_n x at one linear."""

    def __init__(self, method: Arrow, site: Site) -> None:
        super().__init__(method.running)
        self.tasks, self.top_k = len(method.adapters), method.kept
        self.temperature, self.apart = float(method.temperature), method.compat == "authors"
        place: dict[str, Any] = {"dtype": trainable_dtype(site.dtype), "device": site.device}
        self.prototypes = nn.Parameter(torch.zeros(self.tasks, site.in_features, **place))

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output with what the token's adapters add."""
        own: list[Any] = [self._pieces(inner, name)[0] for name in self.adapters]
        y = inner(x, *args, **kwargs)
        found = [piece.factors() for piece in own]
        rates = [piece.dropout if piece.training else 0.0 for piece in own]
        w = self.weights(x)
        if self.apart:
            found, rates = apart(found, self.tasks), rates[: self.tasks]
        elif len(own) > self.tasks:
            general = len(own) - self.tasks
            w = torch.cat((w, w.new_full((*w.shape[:-1], general), -1 / general)), -1)
        return y + token_mixture(x, w, found, rates).to(y.dtype)

    def weights(self, x: Tensor) -> Tensor:
        """w (…, N) for x (…, in)."""
        scores = F.linear(x, self.prototypes.to(x.dtype)).abs()
        scores = scores if scores.dtype == torch.float64 else scores.float()
        best, which = scores.topk(self.top_k, -1)
        return torch.zeros_like(scores).scatter(-1, which, (best / self.temperature).softmax(-1))

    @torch.no_grad()
    def find_prototypes(self, site: Site) -> None:
        """v_n of the adapters as they are now."""
        inlays = inlays_of(site.module)
        assert inlays is not None
        own = [next(inlays.pieces((name,), None)).factors() for name in self.adapters]
        found = [factors for factors in own if factors is not None]
        found = apart(found, self.tasks) if self.apart else found
        dtype = self.prototypes.dtype
        changes = [Change(a.to(dtype), b.to(dtype)).scaled(scale) for a, b, scale in found]
        tasks, general = changes[: self.tasks], changes[self.tasks :]
        less = [change.scaled(-1 / len(general)) for change in general]
        for row, task in zip(self.prototypes, tasks, strict=True):
            row.copy_(main_direction(added([task, *less])))


def apart(found: Sequence[Factors], tasks: int) -> list[Factors]:
    """A − mean A_g and B − mean B_g of the first `tasks`, g over the others."""
    a, b = (torch.stack([factors[n] for factors in found[tasks:]]).mean(0) for n in (0, 1))  # type: ignore[misc]
    return [(own_a - a, own_b - b, scale) for own_a, own_b, scale in found[:tasks]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrow(OverAdapters):
    """y = W x + Σ w_n ΔW_n x, w by the directions that the adapters themselves stretch: routing without training."""

    kind = "arrow"
    hosts = frozenset({"linear"})
    paper = "Ostapenko et al. 2024, arXiv:2405.11157"
    peft_variant: ClassVar[str] = "arrow_config"

    general: Sequence[str] = ()
    """Names of loaded adapters of general knowledge, whose mean is taken from each of `adapters` (GenKnowSub)."""
    top_k: int | None = None
    """How many adapters a token keeps; None: 3, or all where there are fewer."""
    temperature: float = 1.0
    """τ, what the scores are divided by: the lower, the more goes to the nearest adapter."""
    compat: Literal["authors"] | None = None
    """"authors": `general` subtracted from A and from B apart, as HF peft does too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.general, str) or len({*self.running}) != len(self.running):
            raise ConfigError(f"Arrow(general={self.general!r}): name adapters, each once and none of {self.adapters}")
        object.__setattr__(self, "general", tuple(self.general))
        if self.overrides:
            raise ConfigError("Arrow has no overrides: attach one Arrow for all places")
        count = len(self.adapters)
        self.check_whole("top_k")
        if self.top_k is not None and self.top_k > count:
            raise ConfigError(f"Arrow(top_k={self.top_k!r}): a whole number from 1 to {count}, its adapters, is needed")
        self.check_positive("temperature")
        if self.compat not in (None, "authors") or (self.compat and not self.general):
            raise ConfigError(f"Arrow(compat={self.compat!r}): leave it out, or say 'authors' where `general` is given")

    @property
    def running(self) -> tuple[str, ...]:
        """The adapters, then the general ones."""
        return (*self.adapters, *self.general)

    @property
    def kept(self) -> int:
        """How many adapters a token keeps."""
        return min(USUAL, len(self.adapters)) if self.top_k is None else self.top_k

    def _places(self, adapter: Adapter) -> Iterator[str]:
        """Where an adapter sits. UnsupportedError for what is no thin change of a linear alone."""
        seen: set[str] = set()
        for site, piece in own_pieces(adapter):
            thin = site.kind == "linear" and site.owner is None and site.name not in seen
            if not thin or piece.factors() is None:
                raise UnsupportedError(
                    f"Arrow cannot route to the adapter {adapter.name!r}: {type(piece).__name__} at "
                    f"{site.name or 'the model itself'} is not one product B A on a linear; inlay.to_lora makes one of "
                    "any change of weights"
                )
            seen.add(site.name)
            yield site.name

    def over(self, site: Site, width: int) -> OverPiece:
        """Routing for one place, with its prototypes unless a file brings them."""
        piece = ArrowPiece(self, site)
        if self.compat == "authors":
            self._refuse_other_ranks(site)
        if not LOADING.get():
            piece.find_prototypes(site)
        return piece

    def _refuse_other_ranks(self, site: Site) -> None:
        inlays = inlays_of(site.module)
        assert inlays is not None
        ranks = {p.factors()[0].shape[0] for p in inlays.pieces(self.running, None)}  # type: ignore[index]
        if len(ranks) > 1:
            raise UnsupportedError(f"Arrow(compat='authors') needs adapters of one rank, and {site.name} has {ranks}")

    # -- files -------------------------------------------------------------------------------------------------------

    def import_(
        self, pieces: Sequence[tuple[Site, Piece]], tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> None:
        """Take the prototypes over; from HF peft's file, whose own A and B it never reads, they are found anew."""
        if extra:
            super().import_(pieces, tensors, extra)
            return
        for site, piece in pieces:
            assert isinstance(piece, ArrowPiece)
            for letter in "AB":
                tensors.pop(self.file_key(site, f"lora_{letter}.weight"), None)
            piece.find_prototypes(site)

    @classmethod
    def is_variant(cls, config: Mapping[str, Any]) -> bool:
        """Whether a peft LoraConfig describes a router."""
        return bool(config.get(cls.peft_variant))

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Made of adapters that are loaded under the names that peft gave them: task_0, …, gks_0, …"""
        if config.get("lora_dropout"):
            raise UnsupportedError("this Arrow router has lora_dropout, and Inlay has only that of its adapters")
        own = config[cls.peft_variant]
        general = tuple(own.get("gks_adapter_names") or ()) if own.get("use_gks") else ()
        return {
            "adapters": tuple(own["task_adapter_names"]),
            "general": general,
            "top_k": own.get("top_k", USUAL),
            "temperature": own.get("router_temperature", 1.0),
            "compat": "authors" if general else None,
        }
