"""Singular triplets of a weight: those of small value are trained, away from the directions of the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.kernels import subspaces
from inlay.pieces.linear import DeltaPiece


class OSFPiece(DeltaPiece):
    """U (out, r), S (r) and V (r, in), by HF peft's names; where they began, and what is frozen, from W."""

    def __init__(self, method: Any, site: Site) -> None:
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
