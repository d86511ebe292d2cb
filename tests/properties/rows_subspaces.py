"""Rows of the matrix for methods that change W within subspaces of its own."""

from __future__ import annotations

from properties.models import SQUARE, Row, linears, total

import inlay

R = 2


def deft(i: int, o: int) -> int:
    return R * (i + o)


def frod(i: int, o: int) -> int:
    return i + max(1, i * i // 100)


def adamss(i: int, o: int) -> int:
    return 2 * 4 + o  # 2 clusters, 4 singular vectors


def osf(i: int, o: int) -> int:
    return (min(i, o) - min(i, o) // 2) * (i + o + 1)


def hosts_of(count: object, *hosts: str, **claims: object) -> dict[str, object]:
    """Hosts that stand for the others: an encoder, a decoder with Conv1D, torch's own layers."""
    found = {host: claim for host, claim in linears(count).items() if host in hosts}  # type: ignore[arg-type]
    own = {"torch": ("linear1,linear2", 2 * total([(12, 20), (20, 12)], count))}  # type: ignore[arg-type]
    return {**found, **own, **claims}


ROWS = [
    Row("deft", inlay.DEFT(r=R), hosts_of(deft, "bert", "gpt2", llama=("query", 2 * total(SQUARE, deft))),
        refuses={"mixtral": "experts", "tied": "embed"}),
    Row("deft-para", inlay.DEFT(r=R, para=True, targets="query"), {"vit": 2 * 32 * R}, identity=0.05, compiled=()),
    # In single precision U (S + diag(l)) Vᵀ stands in the place of W, and equals it to rounding.
    Row("frod", inlay.FRoD(), {"bert": 2 * 2 * frod(32, 32), "vit": 2 * 2 * frod(32, 32), "torch": (
        "linear1,linear2", 2 * total([(12, 20), (20, 12)], frod))}, identity=1e-5, compiled=("bert",),
        refuses={"mixtral": "experts", "tied": "embed"}),
    # Of weights rounded to bfloat16 gpt2's V has a column of the other sign, and llama's values, which have as many
    # rows in all as columns, another V altogether: one of many that are as good. The file says which.
    Row("frod-carried", inlay.FRoD(), {"gpt2": 2 * frod(32, 96), "llama": 2 * (frod(32, 32) + frod(32, 16))},
        identity=1e-5, compiled=(), carried=True),
    # Three of 32 rows of bert's last values fall into the other cluster there.
    Row("adamss-carried", inlay.AdaMSS(r=4, num_subspaces=2), {"bert": 2 * 2 * adamss(32, 32)}, compiled=(),
        carried=True),
    Row("adamss", inlay.AdaMSS(r=4, num_subspaces=2),
        {"vit": 2 * 2 * adamss(32, 32), **hosts_of(adamss, "gpt2"), "llama": 2 * (adamss(32, 32) + adamss(32, 16))},
        refuses={"mixtral": "experts", "tied": "embed"}),
    Row("osf", inlay.OSF(), {
        "bert": ("attention", 8 * osf(32, 32)), "gpt2": ("down", 2 * osf(48, 32)), "conv": ("line", osf(2 * 3, 8)),
        "torch": ("linear1", 2 * osf(12, 20)),
    }, refuses={"mixtral": "experts", "tied": "embed"}),
]  # fmt: skip
