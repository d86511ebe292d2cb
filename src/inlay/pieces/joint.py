"""FRoD's pieces, and what they share: for each kind of weight a basis V, and the places of the turns."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.checkpoint import LOADING
from inlay.engine.piece import Method
from inlay.engine.sites import Site
from inlay.errors import UnsupportedError
from inlay.kernels import joint_bases
from inlay.kernels.choice import compute_dtype, fusible, without_autocast
from inlay.kernels.positions import Positions, SparseProduct, has_sparse_products, places, scattered
from inlay.pieces.projections import Placed, Shared, SharingPiece

FAITHFUL = 1e-5
"""How far U diag(l₀) Vᵀ may be from W, relative to its norm, for the product to stand in its place."""


def kind_of(path: str) -> str:
    """Which kind of weight a place holds, as HF peft tells them apart: the last two parts of its path, or the last one
    in a numbered module.
    """
    *above, last = path.split(".")
    if not above or above[-1].isdigit():
        return last
    if (above[-1], last) == ("output", "dense") and above[-2:-1] == ["attention"]:
        return "attention_output"
    return f"{above[-1]}_{last}"


def layer_of(path: str, otherwise: int) -> int:
    """The layer that a place lies in: the number after `layers`, or the first number in its path."""
    parts = path.split(".")
    if "layers" in parts[:-1] and (after := parts[parts.index("layers") + 1]).isdigit():
        return int(after)
    return next((int(part) for part in parts if part.isdigit()), otherwise)


def weight_of(site: Site) -> Tensor:
    """W (out, in), on the CPU if it is anywhere."""
    weight = site.weight.detach()
    weight = weight.T if site.transposed else weight
    return weight if weight.is_meta else weight.cpu()


class Bases(Shared):
    """V (in, in) of each kind, and in which order its turns stand in a file."""

    def __init__(self, placed: Placed, rate: float, ridge: float, seed: int, saved: bool) -> None:
        super().__init__()
        stacks: dict[str, dict[int, Site]] = {}
        for number, (site, _) in enumerate(placed):
            stacks.setdefault(kind_of(site.path), {})[layer_of(site.path, number)] = site
        self.kinds, generator = sorted(stacks), torch.Generator().manual_seed(seed)
        for number, kind in enumerate(self.kinds):
            sites = [site for _, site in sorted(stacks[kind].items())]
            widths, first = {site.in_features for site in sites}, sites[0]
            if len(widths) > 1:
                raise UnsupportedError(
                    f"FRoD cannot sit at {sites[1].name}: the weights named {kind!r} share a basis, and take "
                    f"{sorted(widths)} features; give them adapters of their own"
                )
            (width,) = widths
            if saved and LOADING.get():
                basis = torch.zeros(width, width, device=first.device)
            else:
                basis = joint_bases.shared_basis([weight_of(site) for site in sites], ridge)
            self.register_buffer(f"V_{number}", basis.to(first.device, first.dtype).contiguous(), persistent=False)
            count = min(int(width * width * rate), width * (width - 1))
            count = max(1, count) if rate and width > 1 else count
            chosen = torch.randperm(width * (width - 1), generator=generator, device="cpu")[:count]
            # The entries off the diagonal, row by row, are numbered without it.
            row, column = chosen // max(width - 1, 1), chosen % max(width - 1, 1)
            indices = torch.stack([row, column + (column >= row)])
            self.register_buffer(f"indices_{number}", indices.to(first.device), persistent=False)
            self.register_buffer(f"size_{number}", torch.tensor([width, width], device=first.device), persistent=False)
            for name in ("rows", "columns", "order"):
                self.register_buffer(f"{name}_{number}", None, persistent=False)

    def root_tensors(self) -> dict[str, Tensor]:
        names = {"frod_V": "V", "frod_s_indices": "indices", "frod_s_size": "size"}
        return {
            f"{theirs}.{kind}": self.get_buffer(f"{own}_{number}")
            for theirs, own in names.items()
            for number, kind in enumerate(self.kinds)
        }

    def basis(self, number: int, device: torch.device) -> Tensor:
        """V of a kind."""
        return self.get_buffer(f"V_{number}").to(device)

    def places(self, number: int, device: torch.device) -> tuple[Positions, Tensor]:
        """Where the entries of S are, row by row, and their numbers in the file's order."""
        rows, columns, order = (
            cast(Tensor, self._buffers[f"{name}_{number}"]).to(device) for name in ("rows", "columns", "order")
        )
        width = self.get_buffer(f"V_{number}").shape[0]
        return Positions(rows, columns, (width, width)), order

    @torch.no_grad()
    def place(self, placed: Placed, fresh: bool) -> None:
        """Give each piece the U and l₀ that belong to its V; a fresh one its start too."""
        for number, kind in enumerate(self.kinds):
            indices, width = self.get_buffer(f"indices_{number}"), self.get_buffer(f"V_{number}").shape[0]
            flat, order = (indices[0] * width + indices[1]).sort()
            sorted_places = places(flat, (width, width))
            for name, tensor in (("rows", sorted_places.rows), ("columns", sorted_places.columns), ("order", order)):
                self._buffers[f"{name}_{number}"] = tensor
            here = [(site, cast(FRoDPiece, piece)) for site, piece in placed if kind_of(site.path) == kind]
            if fresh:
                for _, piece in here:
                    piece.number = number
                    piece.frod_lambda_s_values = piece.start(len(order), value=0.0)
            if not (fresh and LOADING.get()):
                self._factor(here, number, fresh)

    def _factor(self, here: list[tuple[Site, FRoDPiece]], number: int, fresh: bool) -> None:
        basis = self.get_buffer(f"V_{number}")
        basis = basis if basis.is_meta else basis.cpu()
        weights = [weight_of(site) for site, _ in here]
        for (_, piece), weight, (u, lengths) in zip(here, weights, joint_bases.factors(weights, basis), strict=True):
            piece.U.copy_(u)
            piece.l_0.copy_(lengths)
            if fresh:
                piece.frod_lambda_l.copy_(lengths)
            if not weight.is_meta:
                away = (u * lengths) @ basis.float().T - weight.float()
                piece.faithful = bool(away.norm() <= FAITHFUL * weight.float().norm())


def turned(h: Tensor, diagonal: nn.Parameter | Tensor, values: Tensor, bases: Bases, number: int) -> Any:
    """(S + diag) h for h (…, in)."""
    where, order = bases.places(number, h.device)
    values = values[order]
    scaled = h * diagonal.to(h.dtype)
    if not len(order):
        return scaled
    if fusible(h, values) and has_sparse_products(h):
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        return scaled + cast(Tensor, SparseProduct.apply(h, wide, where)).to(h.dtype)  # type: ignore[no-untyped-call]
    return scaled + F.linear(h, scattered(values, where.flat(), where.shape).to(h.dtype))


class FRoDPiece(SharingPiece):
    """l (in) and the entries of S, by HF peft's names; U (out, in) and l₀, frozen."""

    shared: Bases
    U: Tensor
    l_0: Tensor
    frod_lambda_s_values: nn.Parameter

    def __init__(self, method: Method, site: Site) -> None:
        super().__init__(method, site)
        self.number, self.faithful, width = 0, False, self.shape[1]
        self.frod_lambda_l = self.start(width, value=1.0)
        self.register_buffer("U", torch.empty(self.shape, dtype=site.dtype, device=site.device), persistent=False)
        self.register_buffer("l_0", torch.empty(width, **self.place), persistent=False)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        dtype, base, rate = compute_dtype(x), inner.linear(), self.dropout if self.training else 0.0
        free = base is not None and base.decode is None and not base.weight.requires_grad
        direct = free and self.faithful and not rate and dtype in (torch.float32, torch.float64)
        u, v = self.U.to(dtype), self.shared.basis(self.number, x.device).to(dtype)
        with without_autocast(x):
            h = (F.dropout(x, rate) if rate else x).to(dtype) @ v
            diagonal = self.frod_lambda_l if direct else self.frod_lambda_l - self.l_0
            h = turned(h, diagonal, self.frod_lambda_s_values, self.shared, self.number)
            if direct:
                return F.linear(h, u, None if base.bias is None else base.bias.to(dtype))
            change = F.linear(h, u)
        y: Tensor = inner(x)
        return y + change.to(y.dtype)

    def delta(self) -> Tensor:
        where, order = self.shared.places(self.number, self.U.device)
        flat, values = where.flat(), self.frod_lambda_s_values[order]
        core = torch.diag(self.frod_lambda_l - self.l_0).view(-1).index_add(0, flat, values).view(where.shape)
        basis = self.shared.basis(self.number, self.U.device).to(core.dtype)
        return self.U.to(core.dtype) @ core @ basis.T
