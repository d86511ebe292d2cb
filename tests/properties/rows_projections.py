"""Rows of the matrix for methods whose places share random projections or a bank of vectors."""

from __future__ import annotations

from properties.models import Row, linears, total

import inlay

R = 2


def of_linears(count: object, **claims: object) -> dict[str, object]:
    """Every linear but those that nn.MultiheadAttention never calls."""
    found = linears(count)  # type: ignore[arg-type]
    own = {"torch": ("linear1,linear2", 2 * total([(12, 20), (20, 12)], count))}  # type: ignore[arg-type]
    own |= {"plain": ("a,b,out", 3 * total([(12, 16), (16, 12)], count) + count(12, 5))}  # type: ignore[arg-type,operator]
    return {**found, **own, **claims}


def vera(i: int, o: int) -> int:
    return R + o


def pvera(i: int, o: int) -> int:
    return 2 * R + o


def randlora(i: int, o: int) -> int:
    bases = -(-min(i, o) // R)
    return bases * (R + min(i, o))


H, V = 5, 4  # vectors in the bank, and their length


def vblora(i: int, o: int) -> int:
    return R * H * (i + o) // V


def with_bank(claims: dict[str, object], size: int) -> dict[str, object]:
    """The same with what is counted once for all places."""
    return {host: (claim[0], claim[1] + size) for host, claim in claims.items()}  # type: ignore[index]


IN_FOURS = {**of_linears(vblora), "plain": ("a,b", 3 * total([(12, 16), (16, 12)], vblora))}


ROWS = [
    Row("vera", inlay.VeRA(r=R), of_linears(vera), compiled=("llama", "gpt2"),
        refuses={"mixtral": "experts", "conv": None, "tied": "embed"}),
    # With noise in training, no two steps are alike; tests/methods/test_pvera.py has that.
    Row("pvera", inlay.PVeRA(r=R, sample="never"), of_linears(pvera), compiled=("llama",), refuses={"conv": None}),
    # Without its bases in the file, peft warns, and here warnings are errors.
    Row("randlora", inlay.RandLoRA(r=R, alpha=2, save_projection=True), of_linears(randlora), compiled=("llama",),
        refuses={"conv": None}),
    Row("vblora", inlay.VBLoRA(r=R, num_vectors=H, vector_length=V), with_bank(IN_FOURS, H * V), identity=0.01,
        compiled=("llama",), refuses={"conv": None, "plain": "out"}),
    Row("tinylora", inlay.TinyLoRA(u=3), of_linears(lambda i, o: 3), compiled=("llama",), refuses={"conv": None}),
    Row("tinylora-embedding", inlay.TinyLoRA(u=3), {"tied": ("embed,mix", 2 * 3)}),
    Row("tinylora-tied", inlay.TinyLoRA(u=5, weight_tying=0.5), {"bert": 2 * 5}, compiled=()),
    Row("unilora", inlay.UniLoRA(r=R, theta_d_length=50), with_bank(of_linears(lambda i, o: 0), 50), identity=0.01,
        compiled=("llama",), refuses={"conv": None}),
]  # fmt: skip
