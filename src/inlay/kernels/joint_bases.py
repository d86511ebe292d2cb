"""One basis for several matrices W_i (out_i, in): W_i = U_i diag(l_i) Vᵀ with the same V for all.

For W = [W_1; …; W_n] with at least as many rows as columns, W = Q R, and E are the eigenvectors of the mean of
(Q_iᵀ Q_i + α I)⁻¹, V = Rᵀ E: the W_i V⁻ᵀ = Q_i E, whose columns are then scaled to length one, are as near to
orthogonal as one V allows (the higher-order generalised singular value decomposition). With fewer rows, V are the right
singular vectors of W, completed to a basis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shared_basis(weights: Sequence[Tensor], ridge: float) -> Tensor:
    """V (in, in), in fp32."""
    stacked = torch.cat([weight.float() for weight in weights])
    rows, width = stacked.shape
    if rows < width:
        right: Tensor = torch.linalg.svd(stacked, full_matrices=True)[2].T
        return right
    q, r = torch.linalg.qr(stacked)
    eye = ridge * torch.eye(width, dtype=q.dtype, device=q.device)
    inverses = [torch.linalg.inv(part.T @ part + eye) for part in q.split([len(weight) for weight in weights])]
    basis: Tensor = r.T @ torch.linalg.eigh(sum(inverses[1:], inverses[0]) / len(inverses))[1]
    return basis


def factors(weights: Sequence[Tensor], basis: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(U_i (out_i, in) with columns of length one or zero, l_i (in)) for each, in fp32; V is inverted once for all."""
    v = basis.double()
    decomposed, pivots, info = torch.linalg.lu_factor_ex(v)
    singular = not v.is_meta and (bool(info) or not decomposed.diagonal().all())
    found = []
    for weight in weights:
        w = weight.double()
        inverted = torch.linalg.pinv(v, rtol=1e-6) @ w.T if singular else torch.linalg.lu_solve(decomposed, pivots, w.T)
        sides = inverted.T
        lengths = sides.norm(dim=0)
        u = torch.where(lengths > 1e-12, sides / lengths.clamp_min(1e-300), 0.0)
        found.append((u.float(), lengths.float()))
    return found
