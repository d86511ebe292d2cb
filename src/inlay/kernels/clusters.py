"""Which rows of a matrix belong together, by its left singular vectors; drawn and clustered as HF peft does."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def singular_vectors(matrix: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """U (rows, r) and Vᵀ (r, columns) of the r largest singular values, by random projection."""
    device = matrix.device
    where = {"devices": []} if device.type in ("cpu", "meta") else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**where):
        torch.manual_seed(seed)
        u, _, v = torch.svd_lowrank(matrix, q=r, niter=2)
    return u, v.T


def of_rows(left: Tensor, count: int) -> Tensor:
    """The cluster (rows) of each row of U, on the CPU: k-means with ten rounds, always from the same start."""
    count = min(count, len(left))
    if left.is_meta:
        return torch.arange(len(left)) % count
    from sklearn.cluster import KMeans

    means = KMeans(n_clusters=count, init="random", n_init=1, max_iter=10, random_state=123456789)
    return torch.from_numpy(means.fit_predict(left.cpu().numpy().astype(np.float32))).long()


def starts(left: Tensor, rows: Tensor, rank: int, threshold: float) -> list[Tensor]:
    """For each cluster an orthonormal A (rank or less, r), which spans the directions in which its rows lie.

    With a threshold, only of singular values of the rows' Gram matrix above so much of the largest.
    """
    found = []
    for k, size in enumerate(torch.bincount(rows).tolist()):
        if left.is_meta:
            found.append(left.new_empty(min(rank, size, left.shape[1]), left.shape[1]))
            continue
        own = left[(rows == k).to(left.device)]
        values, vectors = torch.linalg.eigh(own @ own.T)
        kept = min(rank, len(own), left.shape[1])
        if threshold:
            kept = max(1, min(kept, int((values > threshold * values[-1]).sum())))
        found.append(torch.linalg.qr(own.T @ vectors.flip(1)[:, :kept])[0].T)
    return found
