"""Rows of the matrix for methods that turn what goes into a linear, or what comes out of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from properties.models import Row, linears, total

import inlay

with contextlib.suppress(ImportError):
    from oracles import butterfly_blocks

    butterfly_blocks.install()

MIXED = "line,plane,space"  # the convolutions of "conv"; a group's channels times kernel are 6, 48 and 54


def of_linears(count: Callable[[int, int], int], **claims: object) -> dict[str, object]:
    """Every linear but those that nn.MultiheadAttention never calls."""
    own = {
        "torch": ("linear1,linear2", 2 * total([(12, 20), (20, 12)], count)),
        "plain": ("a,b,out", 3 * total([(12, 16), (16, 12)], count) + count(12, 5)),
    }
    return {**linears(count), **own, **claims}


def oft(i: int, o: int) -> int:
    return i * 3 // 2  # blocks of 4


def hra(i: int, o: int) -> int:
    return 4 * i


def road(i: int, o: int) -> int:
    return o


def boft(i: int, o: int) -> int:
    return 4 * i + o


def psoft(i: int, o: int) -> int:
    return 1 + 2 + 2


ROWS = [
    Row("oft", inlay.OFT(block_size=4), of_linears(oft), compiled=("llama",),
        refuses={"mixtral": "experts"}),
    Row("oft-embedding", inlay.OFT(block_size=4), {"tied": ("embed,mix", 8 * 3 // 2 + 8 * 3 // 2)}),
    Row("oft-conv", inlay.OFT(block_size=3), {"conv": (MIXED, 6 + 48 + 54)}, compiled=(), peft=False),
    Row("oft-exact", inlay.OFT(block_size=0, r=4, use_cayley_neumann=False, block_share=True),
        {"bert": 4 * 28, "conv": ("plane", 12 * 11 // 2)}),
    Row("oft-coft", inlay.OFT(block_size=8, coft=True, eps=0.5), {"bert": 4 * 4 * 28}, compiled=()),
    Row("hra", inlay.HRA(r=4), of_linears(hra, conv=(MIXED, 4 * (6 + 48 + 54))),
        compiled=("llama",), refuses={"mixtral": "experts", "tied": "embed"}),
    # The mirror image of a space is never the identity.
    Row("hra-orthogonal", inlay.HRA(r=2, apply_gs=True), {"bert": 4 * 2 * 32}, identity=3.0),
    Row("boft", inlay.BOFT(), {
        **of_linears(boft), "conv": ("plane", 4 * 48 + 6),
    }, compiled=("llama",), refuses={"mixtral": "experts", "tied": "embed"}),
    Row("boft-factors", inlay.BOFT(block_size=2, n_butterfly_factor=3), {"gpt2": 2 * (3 * 2 * 32 + 96)}, peft=False),
    Row("boft-wide", inlay.BOFT(block_size=0, block_num=4, n_butterfly_factor=3),
        {"bert": 4 * (3 * 8 * 32 + 32), "conv": ("plane", 3 * 12 * 48 + 6)}, compiled=()),
    Row("psoft", inlay.PSOFT(r=2), of_linears(psoft),
        compiled=("llama",), refuses={"mixtral": "experts", "tied": "embed", "conv": "plane"}),
    Row("psoft-free", inlay.PSOFT(r=3, orth=False, mag_b=False, svd="lowrank"), {"bert": 4 * (9 + 3)}, compiled=()),
    Row("road", inlay.RoAD(group_size=4), {
        **of_linears(road), "plain": ("a,b", 3 * (16 + 12)),
    }, compiled=("llama",), refuses={"mixtral": "experts", "tied": "embed", "conv": "plane"}),
    Row("road-2", inlay.RoAD(variant="road_2", group_size=8), {"llama": 2 * 2 * (32 + 16)}, compiled=()),
    Row("road-4", inlay.RoAD(variant="road_4", group_size=8), {"bert": 4 * 4 * 32}),
]  # fmt: skip
