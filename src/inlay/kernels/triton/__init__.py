"""Kernels in Triton for CUDA: one a file, each beside the plain torch that it equals. Importing this needs no triton.

    epilogue      y += s · h Bᵀ
    gradients     dh = s · dy B and dB = s · dyᵀ h from one read of dy
    dropout       h = x̃ Aᵀ, dA = dhᵀ x̃ and dx += (dh A) ⊙ m, the mask drawn where it is used
    dora_norm     the norm of each row of W + s · B A
    nf4           decoding of 4-bit weights, alone and within y = x Wᵀ for few rows
    grouped       y[t] += s · B A x[t] with another adapter for each row
    philox        the random words of dropout
    blocks        products and rounding of blocks
    partial_sums  sums of what the blocks of another kernel left, in a fixed order

Sums are taken in float32 in a fixed order (no atomics): the same inputs give the same bits, on one kind of device and
for one choice of the tuner's. A and B may be float32 masters; they are rounded to the dtype of the activations as they
are read. In Triton's interpreter (TRITON_INTERPRET=1 before triton is first imported) all of them run on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

ASKED = os.environ.get("INLAY_TRITON") == "1"

MAX_RANK = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 64}
"""The largest rank for activations of each dtype that the kernels take.

A block of rows with all its ranks is held in registers; in float32, where products do not run on tensor cores, it
spills beyond 64, and torch's own products are the better choice.
"""


def available(tensor: Tensor, rank: int = 1) -> bool:
    """Whether the kernels here may take a tensor of this device and dtype with adapters of this rank (at least 1).

    Only where INLAY_TRITON=1 asks for them: they have not been measured on a device.
    """
    return ASKED and tensor.is_cuda and rank <= MAX_RANK.get(tensor.dtype, 0) and _installed()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None and torch.version.cuda is not None
