"""Mixtures of the k vectors of a bank whose logits are the largest: VB-LoRA's pieces.

    out[t] = Σ_{j in top-k(l[t])} softmax_j · bank[j]

As one product of a matrix with k entries a row (T, h) and the bank (h, v): few numbers beside the factors that are put
together from them, and its gradients are products too, where gathered rows would be added up one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

INDEX_TYPES = (torch.uint8, torch.int16, torch.int32)


def mixed(logits: Tensor, bank: Tensor, k: int) -> Tensor:
    """(T, v) for logits (T, h) and a bank (h, v)."""
    largest, which = logits.topk(k)
    return torch.zeros_like(logits).scatter(1, which, largest.softmax(-1)) @ bank


def to_weights(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Which vectors (…, k), and the weights of all of them but the last (…, k − 1), which the others give."""
    largest, which = logits.topk(k)
    # HF peft leaves the largest value of each type unused.
    kind = next((one for one in INDEX_TYPES if logits.shape[-1] <= torch.iinfo(one).max), torch.int64)
    return which.to(kind), largest.softmax(-1)[..., :-1]


def to_logits(which: Tensor, weights: Tensor, h: int) -> Tensor:
    """Logits (…, h) that give these weights; −∞ for the vectors that are not among them."""
    last = (1 - weights.sum(-1, keepdim=True)).clamp_(min=torch.finfo(weights.dtype).tiny)
    chosen = torch.cat((weights, last), -1).log()
    return weights.new_full((*which.shape[:-1], h), -torch.inf).scatter_(-1, which.long(), chosen)
