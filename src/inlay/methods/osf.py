"""OSF: orthogonal subspace fine-tuning (Nayak et al. 2025, arXiv:2504.07097).

    W′ = U_h S_h V_h + U S V,     W = U_h S_h V_h + U₀ S₀ V₀

The singular triplets of W with the largest values are frozen, which keeps what a model knows while it learns one task
after another; the others are trained, U, S and V, and the gradients of U and V lose their part in the frozen
directions. The model starts as the base. On a linear the change U S V − U₀ S₀ V₀ is never formed.

Parameters: (min(in, out) − effective_rank) (in + out + 1).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError, UnsupportedError
from inlay.kernels import subspaces
from inlay.pieces.linear import DeltaPiece, LinearMethod, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class OSF(LinearMethod):
    """W′ = U_h S_h V_h + U S V: trains the singular triplets of small value, away from the directions of the large."""

    kind = "osf"
    hosts = frozenset({"linear", "conv"})
    default_targets = "all-linear"
    peft_type = "OSF"
    paper = "Nayak et al. 2025, arXiv:2504.07097"
    peft_conv1d = False

    effective_rank: int | float | None = named("effective_rank", None, "rank_pattern")
    """How many triplets are frozen: a number, a share of all of them (a float), or None for half."""

    def __post_init__(self) -> None:
        value = self.effective_rank
        share = isinstance(value, float) and 0 < value < 1
        if (
            value is not None
            and not share
            and (isinstance(value, bool | float) or not isinstance(value, int) or value < 1)
        ):
            raise ConfigError(
                f"OSF(effective_rank={value!r}): a whole number of at least 1 or a share below 1 is needed"
            )

    def piece(self, site: Site) -> Piece:
        weight = site.module._parameters.get("weight")
        if weight is None or not weight.is_floating_point():
            stored = "quantised" if weight is not None else "parametrised"
            raise UnsupportedError(f"OSF cannot sit at {site.name}: it factors W, and W is {stored}; use LoRA there")
        return OSFPiece(self, site)


class OSFPiece(DeltaPiece):
    """U (out, r), S (r) and V (r, in), by HF peft's names; where they began, and what is frozen, from W."""

    def __init__(self, method: OSF, site: Site) -> None:
        super().__init__(method, site)
        (out, width), least = self.shape, min(self.shape)
        wanted = method.effective_rank
        k = int(least * wanted) if isinstance(wanted, float) else least // 2 if wanted is None else wanted
        if not 0 < k < least:
            raise ConfigError(
                f"OSF at {site.name}: W has {least} singular triplets, and effective_rank={wanted!r} would freeze {k} "
                "of them: freeze some and leave some"
            )
        weight = site.weight.detach()
        with torch.no_grad():
            u, s, v = torch.linalg.svd(
                (weight.T if site.transposed else weight).reshape(self.shape).float(), full_matrices=False
            )
        parts = {"U_low": u[:, k:], "S_low": s[k:], "V_low": v[k:]}
        parts = {name: part.to(self.place["dtype"]).contiguous() for name, part in parts.items()}
        self.osf_svd_params = nn.ParameterDict({name: nn.Parameter(part.clone()) for name, part in parts.items()})
        # Where the trained directions complete the frozen ones to a basis, these need not be kept.
        parts["frozen_out"] = u[:, :k].T.contiguous() if out > width else None
        parts["frozen_in"] = v[:k].contiguous() if width > out else None
        for name, part in parts.items():
            self.register_buffer(name, part if part is None else part.to(self.place["dtype"]), persistent=False)

    def now(self) -> subspaces.Triplets:
        """What is trained."""
        return subspaces.Triplets(*(self.osf_svd_params[name] for name in ("U_low", "S_low", "V_low")))

    def frozen(self) -> subspaces.Frozen:
        """Where it began, and which directions it must keep from."""
        start = subspaces.Triplets(*(self.get_buffer(name) for name in ("U_low", "S_low", "V_low")))
        return subspaces.Frozen(start, self._buffers["frozen_out"], self._buffers["frozen_in"])

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.kind != "linear":
            return super().forward(inner, x, *args, **kwargs)
        return subspaces.changed(inner, x, self.now(), self.frozen())

    def form(self, *tensors: Tensor) -> Tensor:
        return subspaces.change(self.now(), self.frozen())
