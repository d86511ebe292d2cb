"""Weights quantised by groups of inputs, and what folds into their zero points.

    W_oi = scale_og · (code_oi − zero_og),     g the group of input i:  codes in 0 … 2^bits − 1

    zero'_og = zero_og − δ_og / scale_og       then W'_oi = W_oi + δ_og, with the same codes and scales

So a change that is one number for each output and group, as QA-LoRA's is, costs a quantised weight nothing and rounds
nothing, where any other change would have to be quantised anew. Zero points have to be real numbers for that: formats
that keep them as integers (AutoGPTQ's) round δ to a multiple of the scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inlay.errors import ConfigError


class Grouped(NamedTuple):
    """A weight (out, in) as codes (out, in), uint8, with scales and zero points (out, groups)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def values(self) -> Tensor:
        """The weight, in the dtype of the scales."""
        codes = self.codes.to(self.scales.dtype).view(*self.scales.shape, -1)
        return (self.scales[..., None] * (codes - self.zeros[..., None])).flatten(1)


def grouped(weight: Tensor, bits: int, group_size: int) -> Grouped:
    """`weight` (out, in) at this many bits, between the least and the largest entry of each group of inputs."""
    if weight.shape[1] % group_size:
        raise ConfigError(f"group_size={group_size} does not divide the {weight.shape[1]} inputs of the weight")
    if not 1 <= bits <= 8:
        raise ConfigError(f"bits={bits}: codes have from 1 to 8 bits")
    groups = weight.detach().reshape(len(weight), -1, group_size)
    least, largest = groups.amin(-1), groups.amax(-1)
    spread = largest - least
    scales = torch.where(spread > 0, spread, 1) / (2**bits - 1)
    codes = ((groups - least[..., None]) / scales[..., None]).round().clamp(0, 2**bits - 1)
    return Grouped(codes.flatten(1).to(torch.uint8), scales, -least / scales)


def folded(weight: Grouped, change: Tensor) -> Grouped:
    """`weight` with `change` (out, groups) added to each entry of each group; codes and scales are the same tensors.

    The change may have fewer groups, of which each holds whole ones of the weight.
    """
    (out, groups), (rows, wider) = weight.zeros.shape, change.shape
    if out != rows or groups % wider:
        raise ConfigError(
            f"a change of {rows} outputs by {wider} groups of inputs does not fold into a weight of {out} by {groups}: "
            "take a group_size that is the weight's own, or a multiple of it"
        )
    by_group = change.detach().to(weight.scales.dtype).repeat_interleave(groups // wider, 1)
    return weight._replace(zeros=weight.zeros - by_group / weight.scales)
