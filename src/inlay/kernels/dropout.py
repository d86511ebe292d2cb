"""Dropout whose mask is one bit an entry, drawn fast on CPU: what the low-rank kernels put on their input.

    x̃ = x ⊙ m,      P(m = 0) = p,      the factor 1 / (1 − p) is the caller's (it folds into the scale s)

`F.dropout` on CPU draws one float an entry and keeps it, or x̃, for the backward: it costs more than the product it
accompanies. Here an entry takes one byte from SFC64 (seeded by one draw from torch's own generator, so `manual_seed`
and checkpoints that restore the generator give the same mask again), is compared with a threshold, and is kept as a
bit. p = 0.1 is no multiple of 1/256: each row takes the threshold below or above at random, in the proportion that
makes the probability of every entry exactly p. Two entries of one row are then correlated by at most 1/(4·256²·p(1−p)),
4e-5 at p = 0.1; below 1/64 two bytes are drawn, which keeps that under 1e-6.

Cost for n entries: n bytes drawn, n/8 bytes kept, one pass over x each time the mask is applied.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

FINE_BELOW = 1 / 64
"""Probabilities (of dropping, or of keeping) under which two bytes are drawn for each entry."""
SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def draw(shape: torch.Size, p: float, device: torch.device) -> Tensor:
    """A mask for an input of this shape (…, in), 1 for what is kept: packed bits on CPU, bool (T, in) elsewhere."""
    rows, width = math.prod(shape[:-1]), shape[-1]
    if device.type != "cpu":
        return torch.empty(rows, width, dtype=torch.bool, device=device).bernoulli_(1 - p)
    rarer = min(p, 1 - p)
    word = np.uint16 if rarer < FINE_BELOW else np.uint8
    levels = 2 ** (8 * np.dtype(word).itemsize)
    bits = np.random.SFC64(int(torch.randint(2**63 - 1, ())))
    below = math.floor(rarer * levels)
    thresholds = below + (np.random.Generator(bits).random((rows, 1)) < rarer * levels - below)
    size = np.dtype(word).itemsize * rows * width
    words = np.frombuffer(bits.random_raw(math.ceil(size / 8) or 1).data, dtype=word)[: rows * width]
    rare = words.reshape(rows, width) < thresholds.astype(word)
    return torch.from_numpy(np.packbits(rare if p > rarer else ~rare))


def counter(p: float) -> Tensor:
    """A mask that is drawn where it is used, by a counter (`kernels/triton/philox.py`): its seed and 65536 p."""
    return torch.stack([torch.randint(2**63 - 1, ()), torch.tensor(round(p * 65536))])


def is_counter(mask: Tensor) -> bool:
    """Whether a mask is only the seed of one."""
    return mask.dtype == torch.int64


def rate_and_seed(mask: Tensor) -> tuple[float, int]:
    """What `counter` put together."""
    seed, level = mask.tolist()
    return level / 65536, seed


def apply(x: Tensor, mask: Tensor) -> Tensor:
    """x ⊙ m for x (T, in), of the size that the mask was drawn for."""
    if is_counter(mask):
        from inlay.kernels.triton import philox

        return x * philox.reference(x.shape[0], x.shape[1], *rate_and_seed(mask), x.device)
    if mask.dtype == torch.bool:
        return x * mask.view(x.shape)
    if not bitwise(x):
        return x * unpack(mask, x.shape).to(x.dtype)
    # A product of integers: 0 and 1 leave or clear the bits of a number whatever its type, at the speed of a copy.
    whole = SAME_SIZE[x.element_size()]
    return (x.contiguous().view(whole) * unpack(mask, x.shape)).view(x.dtype)


def apply_(x: Tensor, mask: Tensor) -> Tensor:
    """The same, in place where it can be, on a contiguous tensor that nobody else reads."""
    if mask.dtype == torch.bool:
        return x.mul_(mask.view(x.shape))
    if is_counter(mask) or not bitwise(x):
        return apply(x, mask)
    x.view(SAME_SIZE[x.element_size()]).mul_(unpack(mask, x.shape))
    return x


def bitwise(x: Tensor) -> bool:
    """Whether the bits of x may be touched: nothing differentiates what is done to it, or does it for many at once."""
    batched = torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)
    return not (batched or (torch.is_grad_enabled() and x.requires_grad))


def unpack(mask: Tensor, shape: torch.Size) -> Tensor:
    """Packed bits as 0 and 1 (uint8) in the shape of the input."""
    return torch.from_numpy(np.unpackbits(mask.numpy(), count=math.prod(shape))).view(shape)
