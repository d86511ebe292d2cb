"""Rows of the matrix for methods whose change is given by numbers at fixed positions, of the weight or a spectrum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from properties.models import Row, linears, total

import inlay

Count = Callable[[int, int], int]


def of_linears(count: Count) -> dict[str, Any]:
    """Every linear but those that nn.MultiheadAttention never calls, and one that ends in 5 features."""
    found = linears(count)
    found["torch"] = ("linear1,linear2", 2 * total([(12, 20), (20, 12)], count))
    found["plain"] = ("a,b", 3 * total([(12, 16), (16, 12)], count))
    return found


def shira(i: int, o: int) -> int:
    return 2 * (i + o)


def c3a(i: int, o: int) -> int:
    return i * o // 4


def of_number(number: int) -> Count:
    return lambda i, o: number


def supertuning(i: int, o: int) -> int:
    return int(i * o * (1 - 0.99))


def peanut(i: int, o: int) -> int:
    return 2 * 2 * o


def glora(i: int, o: int) -> int:
    return 2 * 2 * (i + o)


def glora_bias(i: int, o: int) -> int:
    return glora(i, o) + 2 * (i + 1) + 2


ROWS = [
    Row("c3a", inlay.C3A(block_size=4), of_linears(c3a), compiled=("llama",),
        refuses={"conv": "line", "tied": "embed"}),
    # The start that HF peft has; it is divided by in, so that it is small.
    Row("c3a-xavier", inlay.C3A(block_size=4, init="xavier_uniform"), {"bert": 4 * 32 * 32 // 4}, identity=0.1,
        compiled=()),
    Row("fourierft", inlay.FourierFT(n_frequency=30, scaling=150), of_linears(of_number(30)), compiled=("llama",),
        refuses={"conv": "line", "tied": "embed"}),
    Row("fourierft-thin", inlay.FourierFT(n_frequency=2, scaling=600, targets="attention"),
        {"bert": 2 * 4 * 2, "gpt2": 2 * 2 * 2}),
    Row("fourierft-gaussian", inlay.FourierFT(n_frequency=9, init="gaussian"), {"bert": 4 * 9}, identity=1.0,
        compiled=()),
    # The linears of llama and t5 have no bias, and of the two of plain the second has none.
    Row("glora", inlay.GLoRA(r=2), of_linears(glora_bias) | {
        **{host: of_linears(glora)[host] for host in ("llama", "t5")},
        "plain": ("a,b", 3 * (glora_bias(12, 16) + glora(16, 12))),
        "torch": ("linear1", 2 * glora_bias(12, 20)),  # a norm follows linear2, and takes one shift for all away
    }, compiled=("llama", "bert"), refuses={"conv": "line", "mixtral": "experts", "tied": "embed"}),
    Row("glora-vectors", inlay.GLoRA(weights="vector", coupling="vector", biases="vector"),
        {"bert": 4 * 5 * 32, "llama": 2 * 2 * (32 + 16), "gpt2": 2 * (4 * 96 + 32)}),
    Row("glora-biases", inlay.GLoRA(r=2, weights="none"), {"bert": 4 * (2 * 33 + 2)}, compiled=()),
    Row("glora-constants", inlay.GLoRA(weights="constant", coupling="none"), {"bert": 4 * 4}, compiled=()),
    Row("peanut", inlay.PEANuT(r=2, act_fn="tanh"), of_linears(peanut), compiled=("llama",),
        refuses={"conv": "line", "mixtral": "experts", "tied": "embed"}),
    Row("peanut-deep", inlay.PEANuT(r=3, depth=2, act_fn="gelu"), {"bert": 4 * (2 * 3 * 32 + 4 * 9)}),
    Row("shira", inlay.SHiRA(r=2), of_linears(shira), compiled=("llama",),
        refuses={"conv": "line", "mixtral": "experts", "tied": "embed"}),
    # Few entries: a base in bfloat16 has others for its largest ones, so that the two adapters are not quite the same.
    Row("supertuning", inlay.Supertuning(sparsity=0.99),
        of_linears(supertuning) | {"gpt2": ("down", 2 * supertuning(48, 32))}, compiled=("llama",),
        refuses={"conv": "line", "mixtral": "experts", "tied": "embed"}),
    Row("supertuning-lora", inlay.Supertuning(sparsity=0.99, r=2, alpha=3, select_top=False),
        {"bert": 4 * (supertuning(32, 32) + 2 * 64)}),
    Row("waveft", inlay.WaveFT(n_frequency=30, scaling=2), of_linears(of_number(30)), compiled=("llama",),
        refuses={"conv": "line", "tied": "embed"}),
    Row("waveft-db3", inlay.WaveFT(n_frequency=30, scaling=2, wavelet_family="db3", targets="attention"),
        {"bert": 2 * 4 * 30, "gpt2": 2 * 2 * 30}),
    Row("waveft-bare", inlay.WaveFT(n_frequency=30, scaling=2, use_idwt=False), {"bert": 2 * 2 * 30}, compiled=()),
]  # fmt: skip
