"""Rows of the matrix for adapters beyond the bottleneck: of Kronecker products, gated, scaled, on hidden states."""

from __future__ import annotations

from properties.models import Row

import inlay


def compacter(width: int, m: int = 4) -> int:
    return 3 * (width + m)


def bottleneck(width: int, m: int) -> int:
    return 2 * m * width + m + width


def reft(width: int, r: int = 2) -> int:
    return 2 * r * width + r


UNIPELT = 4 * 2 * 32 + 2 * 33 + 3 * 2 * 32 + 33 + bottleneck(32, 4) + 33

ROWS = [
    Row("compacter", inlay.Compacter(), {
        "bert": 64 + 4 * compacter(32) + 5 * 64, "torch": 64 + 4 * compacter(12) + 4 * 24,
    }, mergeable=False, peft=False, compiled=("torch",), refuses={"conv": None}),
    Row("compacter-phm", inlay.Compacter(placement="pfeiffer", r=None, n=2, train_norms=False), {
        "bert": 8 + 2 * (2 * 32 * 2 // 2 + 2 + 32),
    }, mergeable=False, peft=False, compiled=()),
    Row("mam", inlay.MAM(num_virtual_tokens=3, projection_size=None, bottleneck=4), {
        "bert": 3 * 2 * 64 + 2 * bottleneck(32, 4), "llama": 3 * 2 * 32 + 2 * bottleneck(32, 4),
    }, identity=1.5, mergeable=False, peft=False, targets=False, compiled=(), refuses={"torch": None, "conv": None}),
    Row("unipelt", inlay.UniPELT(r=2, num_virtual_tokens=3, projection_size=None, bottleneck=4, activation="gelu"), {
        "bert": 2 * UNIPELT,
    }, identity=1.5, mergeable=False, peft=False, targets=False, refuses={"conv": None}),
    Row("invertible", inlay.InvertibleAdapter(activation="gelu"), {
        "llama": 2 * 32 * 8 + 2 * 8 + 32, "plain": ("0.a", 2 * 12 * 3 + 2 * 3 + 12),
    }, mergeable=False, peft=False, compiled=("plain",), refuses={"conv": None, "tied": None}),
    Row("invertible-glow", inlay.InvertibleAdapter(activation="gelu", coupling="glow"), {
        "llama": 3 * 32 * 8 + 2 * 8 + 2 * 32,
    }, mergeable=False, peft=False, compiled=("llama",)),
    Row("adapter_plus", inlay.AdapterPlus(bottleneck=4, drop_path=0.0), {
        "vit": 2 * (bottleneck(32, 4) + 32),
        "torch": 2 * (bottleneck(12, 4) + 12), "plain": ("b", 3 * (bottleneck(12, 4) + 12)),
    }, mergeable=False, peft=False, compiled=("torch",), refuses={"conv": None}),
    Row("reft", inlay.ReFT(r=2, first=2, last=1), {
        "llama": 2 * 2 * reft(32), "torch": 2 * 2 * reft(12),
    }, mergeable=False, peft=False, compiled=("torch",), refuses={"conv": None, "tied": None}),
    # The head reads the first token, which no edit of the last ones reaches after the last block.
    Row("reft-direft", inlay.ReFT(variant="direft", r=2, first=2), {"bert": 2 * reft(32)}, mergeable=False, peft=False,
        compiled=()),
    # A gate of σ starts at one half, which halves each of the encoder's sub-layers.
    Row("vl_pet", inlay.VLPET(r=4, gate_r=3, decoder_r=2), {
        "t5": 4 * (bottleneck(32, 4) + bottleneck(32, 3)) + 2 * bottleneck(32, 2) + 5 * 32,
    }, identity=1.0, mergeable=False, peft=False, compiled=(), refuses={"conv": None, "tied": None}),
    Row("vl_pet-middle", inlay.VLPET(variant="middleY", r=4), {
        "plain": ("b", 3 * (bottleneck(12, 4) + 12)), "llama": ("mlp", 2 * (bottleneck(32, 4) + 32)),
    }, mergeable=False, peft=False),
]  # fmt: skip
