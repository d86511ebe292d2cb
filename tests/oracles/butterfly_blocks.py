"""Gives HF peft what it compiles for CUDA in torch: without it, peft warns and leaves out BOFT's later factors."""

from __future__ import annotations

import peft.tuners.boft.layer
import torch
from torch import Tensor


class Blocks:
    """(m, n, b, b) as m block-diagonal matrices, and back."""

    def forward(self, blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    def backward(self, gradient: Tensor, blocks: Tensor) -> list[Tensor]:
        m, n, b, _ = blocks.shape
        return [gradient.view(m, n, b, n, b).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()]


def install() -> None:
    peft.tuners.boft.layer._FBD_CUDA = Blocks()
