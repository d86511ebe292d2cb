"""When a method's autograd function may stand in for its plain formula, and in which dtype it computes.

The functions are for eager training and inference on plain tensors. What cannot see through them, or does not need
them, takes the plain formula, which is right everywhere: torch.func and forward-mode differentiation, compiling and
tracing, tensor subclasses (DTensor, fake tensors).
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

PLAIN = (Tensor, nn.Parameter)


def fusible(*tensors: Tensor | None) -> bool:
    """Whether autograd functions may take these tensors."""
    if torch.compiler.is_compiling():
        return False
    if any(t is not None and type(t) not in PLAIN for t in tensors):
        return False
    traced = torch._C._get_tracing_state() is not None
    return not (traced or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; there is none for "meta"."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear called on x would compute: autocast's where it applies, that of x otherwise."""
    if autocasting(x) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A backward computes in the dtype of its forward, also where it is called inside autocast."""
    return torch.autocast(x.device.type, enabled=False) if autocasting(x) else contextlib.nullcontext()
