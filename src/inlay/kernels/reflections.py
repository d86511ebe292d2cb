"""A chain of Householder reflections as one product (the compact WY form): U (in, r), and nothing of size in × in.

    H_1 … H_r = I − U T Uᵀ,     H_i = I − 2 u_i u_iᵀ / ‖u_i‖²,     T⁻¹ = ½ diag(UᵀU) + what is above its diagonal

Two reflections in turn are written in p = u_1 and d = u_2 − u_1: V = [p_1, d_1, p_2, d_2, …], U T Uᵀ = V S Vᵀ. Where
both of each pair are equal the chain is the identity, d = 0, and the zeros of S make it so to the bit:

    S⁻¹ = B + N,   B = [[½ p·p, ½ p·p + p·d], [−½ p·p, ½ d·d]] for each pair,   N = VᵀV above those blocks

FLOPs: 4 T in r forward, 8 T in r backward, as a LoRA's; 2 in r² for VᵀV. Kept: x, U, and two tensors (T, r).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.kernels.lora import rows


def pairs(u: Tensor) -> Tensor:
    """Vᵀ (r, in) of U (in, r): the first of each pair, and the second less the first; a last one alone stays.

    Taken at length one, since the difference of a long vector and a short one tells little of their directions.
    """
    u, r = (u / u.norm(dim=0)).T, u.shape[1] // 2 * 2
    first, second = u[0:r:2], u[1:r:2]
    return torch.cat((torch.stack((first, second - first), dim=1).flatten(0, 1), u[r:]))


def middle(v: Tensor) -> Tensor:
    """S (r, r) with H_1 … H_r = I − V S Vᵀ, for Vᵀ (r, in); in fp32 at least."""
    v = v if v.dtype == torch.float64 else v.float()
    gram, r = v @ v.T, v.shape[0]
    n, place = r // 2, torch.arange(r, device=v.device) // 2
    p, d = v[0 : r - 1 : 2], v[1::2]
    pp, pd, dd = gram.diagonal()[0 : r - 1 : 2], gram.diagonal(1)[::2][:n], gram.diagonal()[1::2]
    times = 4 / (pp * (p + d).square().sum(1))  # 4 / (‖u_1‖² ‖u_2‖²): the inverse of B, written out
    blocks = times * torch.stack((dd / 2, -(pp / 2 + pd), pp / 2, pp / 2))
    among = torch.eye(n, dtype=v.dtype, device=v.device)[:, None, :, None]
    inverse = (blocks.T.reshape(n, 2, 1, 2) * among).reshape(2 * n, 2 * n)
    if r % 2:
        inverse = torch.block_diag(inverse, 2 / gram[-1:, -1:])  # type: ignore[no-untyped-call]
    unit = torch.eye(r, dtype=v.dtype, device=v.device) + inverse @ (gram * (place[:, None] < place))
    return cast(Tensor, torch.linalg.solve_triangular(unit, inverse, upper=True, unitriangular=True))


def reflected(x: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """x (…, in) times (I − V S Vᵀ)ᵀ for Vᵀ (r, in), in the dtype of x: the last reflection first."""
    return less(x, F.linear(x @ v.to(x.dtype).T, s.to(x.dtype)), v, 1)


def mirrored(x: Tensor, u: Tensor) -> Tensor:
    """x (…, in) times I − 2 Q Qᵀ, with Q an orthonormal basis of the columns of U (in, r), in the dtype of x."""
    q = torch.linalg.qr(u if u.dtype == torch.float64 else u.float())[0].T.contiguous()
    return less(x, x @ q.to(x.dtype).T, q, 2)


def less(x: Tensor, h: Tensor, v: Tensor, times: int) -> Tensor:
    """x − times · h Vᵀ for h (…, r)."""
    return torch.addmm(rows(x), rows(h), v.to(x.dtype), alpha=-times).view(x.shape)
