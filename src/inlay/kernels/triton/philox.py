"""The random words of dropout: Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A counter-based generator: the words of a place are a function of the seed and the place, so a mask is drawn again
wherever it is needed and never stored. Entry (t, c) has the 16-bit word number c mod 8, low halves first, of

    Philox(key = seed, counter = (⌊c / 8⌋, t, 0, 0))

and is kept where that is not below p · 2¹⁶: p is taken to the nearest 1/65536. One call of about 80 integer operations
serves eight entries; with one call for each, drawing would take longer than reading x does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inlay.errors import ConfigError

LEVELS = 2**16
WORD = 0xFFFFFFFF
KEYS = (0x9E3779B9, 0xBB67AE85)
FACTORS = (0xD2511F53, 0xCD9E8D57)


def threshold(p: float) -> int:
    """The smallest word that is kept; ConfigError unless p is a probability below one."""
    level = round(p * LEVELS)
    if not 0 <= level < LEVELS:
        raise ConfigError(f"dropout with p={p} has no meaning; give a probability of at least 0 and below 1")
    return level


def reference(rows: int, columns: int, p: float, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The mask (rows, columns) in plain torch: True where an entry is kept."""
    column = torch.arange(-(-columns // 8), device=device).expand(rows, -1)
    row = torch.arange(rows, device=device)[:, None].expand_as(column)
    words = torch.stack(philox((column, row, torch.zeros_like(row), torch.zeros_like(row)), seed), dim=-1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)
    return halves.reshape(rows, -1)[:, :columns] >= threshold(p)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for each counter, all as int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        # A product wraps around at 64 bits, all of which are right; the shift's sign bits are cut off.
        low, high = FACTORS[0] * c0, FACTORS[1] * c2
        c0, c1, c2, c3 = ((high >> 32) & WORD) ^ c1 ^ k0, high & WORD, ((low >> 32) & WORD) ^ c3 ^ k1, low & WORD
        k0, k1 = (k0 + KEYS[0]) & WORD, (k1 + KEYS[1]) & WORD
    return c0, c1, c2, c3


@triton.jit
def kept(seed: tl.tensor, rows: tl.tensor, first: tl.tensor, level: tl.tensor, COLUMNS: tl.constexpr) -> tl.tensor:
    """The mask of these rows (block of int64) and of COLUMNS columns from `first` on, a multiple of 8."""
    ROWS: tl.constexpr = rows.shape[0]
    column = (first // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)
    zero = tl.zeros((ROWS, COLUMNS // 8), tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, zero + column, zero + rows.to(tl.uint32)[:, None], zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, COLUMNS)) >= level
