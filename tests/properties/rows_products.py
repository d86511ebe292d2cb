"""Rows of the matrix for methods whose change is a product of small matrices."""

from __future__ import annotations

from properties.models import Row, linears, total

import inlay

R = 2
MIXED = "line,plane,space"  # the convolutions of "conv": 4 to 8 in 2 groups, 8 to 6, 6 to 4
CONVOLUTIONS = [(2 * 3, 8), (8 * 3 * 2, 6), (6 * 3 * 3, 4)]  # channels times kernel, and out


def loha(i: int, o: int) -> int:
    return 2 * R * (i + o)


def of_linears(count: object, **claims: object) -> dict[str, object]:
    """Every linear but those that nn.MultiheadAttention never calls."""
    found = linears(count)  # type: ignore[arg-type]
    own = {"torch": ("linear1,linear2", 2 * total([(12, 20), (20, 12)], count))}  # type: ignore[arg-type]
    own |= {"plain": ("a,b,out", 3 * total([(12, 16), (16, 12)], count) + count(12, 5))}  # type: ignore[arg-type,operator]
    return {**found, **own, **claims}


def adalora(i: int, o: int) -> int:
    return R * (i + o + 1)


ROWS = [
    Row("adalora", inlay.AdaLoRA(init_r=R, target_r=R), of_linears(adalora, conv=(MIXED, total(CONVOLUTIONS, adalora))),
        compiled=("llama", "conv"), refuses={"mixtral": "experts", "tied": "embed"}),
    Row("increlora", inlay.IncreLoRA(init_r=R, target_r=R),
        {host: claim for host, claim in of_linears(adalora).items() if host in ("bert", "llama", "gpt2", "plain")},
        compiled=("llama",), peft=False, refuses={"mixtral": "experts", "conv": "space"}),
    Row("loha", inlay.LoHa(r=R), of_linears(loha, conv=(MIXED, total(CONVOLUTIONS, loha))), compiled=("llama", "conv"),
        refuses={"mixtral": "experts", "tied": "embed"}),
]  # fmt: skip
