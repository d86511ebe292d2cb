"""The table of docs/methods.md as data, and tiny models that have one place of each kind it names."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.tiny import build
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from inlay.engine.adapters import adapters_of
from inlay.engine.piece import Method
from inlay.engine.registry import make_method

DOCS = Path(__file__).parents[2] / "docs"


# -- the page --------------------------------------------------------------------------------------------------------


def tables(path: Path) -> list[list[list[str]]]:
    """Every table of a page: rows of cells, the heading first."""
    found: list[list[list[str]]] = [[]]
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
            if not all(re.fullmatch(r"[-|:]+", cell) for cell in cells):
                found[-1].append([cell.strip("|").strip() for cell in cells])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


@dataclasses.dataclass(frozen=True)
class Row:
    """One method's row."""

    kind: str
    page: str
    name: str
    formula: str
    parameters: str
    places: Mapping[str, bool]
    """Each place that the method is said to sit on, and whether it has a star."""
    merges: str
    peft: str
    paper: str


def read_row(cells: list[str]) -> Row:
    link, name, formula, parameters, places, merges, peft, paper = cells
    match = re.fullmatch(r"\[(\w+)\]\((.+)\)", link)
    assert match, link
    starred = {place.rstrip("*"): place.endswith("*") for place in places.split(", ")}
    return Row(match[1], match[2], name.strip("`"), formula, parameters.strip("`"), starred, merges, peft, paper)


METHODS, PLACES = tables(DOCS / "methods.md")[:2]
ROWS = {row.kind: row for row in map(read_row, METHODS[1:])}


# -- the places --------------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """A model that is one module, `place`, called with whatever `call` makes of the input."""

    def __init__(self, place: nn.Module, call: Callable[[nn.Module, Tensor], Any] = lambda place, x: place(x)) -> None:
        super().__init__()
        self.place = place
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.call(self.place, x)
        return result


class Bare(nn.Module):
    """A module with a parameter `place` of two dimensions (out, in) or three (experts, out, in)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(shape))
        self.beside = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.place.mT if self.place.dim() == 2 else torch.einsum("bi,eoi->beo", x, self.place)


def attend(place: nn.Module, x: Tensor) -> Any:
    return place(x, x, x, need_weights=False)[0]


@dataclasses.dataclass(frozen=True)
class Host:
    """A model with one place of a kind (or several alike), and its sizes."""

    make: Callable[[], nn.Module]
    shape: Sequence[int]
    """Of the input; token ids where `vocabulary` is given."""
    target: Any = "place"
    sizes: Sequence[Mapping[str, int]] = ()
    """What the symbols of the table are at each weight of the place."""
    path: str = "place"
    vocabulary: int = 0

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.vocabulary:
            return torch.randint(3, self.vocabulary, tuple(self.shape), generator=generator)
        return torch.randn(*self.shape, generator=generator)


def convolution(cls: Any, dimensions: int, groups: int = 1) -> Host:
    sizes = {"d_in": 4, "d_out": 6, "k": 3**dimensions, "g": groups}
    return Host(lambda: Whole(cls(4, 6, 3, groups=groups)), (2, 4, *[5] * dimensions), sizes=(sizes,))


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ROOT = re.compile(r"")
"""Stands for the model itself, which has no name to be targeted by."""

HOSTS: dict[str, list[Host]] = {
    "linear": [Host(lambda: Whole(nn.Linear(6, 10)), (2, 6), sizes=({"d_in": 6, "d_out": 10},))],
    "Conv1D": [Host(lambda: Whole(Conv1D(10, 6)), (2, 6), sizes=({"d_in": 6, "d_out": 10},))],
    "conv": [convolution(cls, number) for number, cls in enumerate(CONVOLUTIONS, 1)],
    "grouped conv": [convolution(cls, number, groups=2) for number, cls in enumerate(CONVOLUTIONS, 1)],
    "embedding": [
        Host(
            lambda: Whole(nn.Embedding(11, 6)),
            (2, 5),
            sizes=({"d_in": 11, "d_out": 6, "d": 6, "d_t": 6},),
            vocabulary=11,
        )
    ],
    "MultiheadAttention": [
        Host(
            lambda: Whole(nn.MultiheadAttention(8, 2, batch_first=True), attend),
            (2, 5, 8),
            sizes=({"d_in": 8, "d_out": 24}, {"d_in": 8, "d_out": 8}),
        )
    ],
    "2-D parameter": [
        Host(lambda: Whole(Bare(10, 6)), (2, 6), "place.place", sizes=({"d_in": 6, "d_out": 10},), path="place.place")
    ],
    "3-D parameter": [
        Host(
            lambda: Whole(Bare(3, 10, 6)),
            (2, 6),
            target="place.place",
            sizes=({"d_in": 6, "d_out": 10, "E": 3},),
            path="place.place",
        )
    ],
    "norm": [Host(lambda: Whole(nn.LayerNorm(6)), (2, 6), sizes=({"d_in": 6, "d_out": 6},))],
    "self-attention": [
        Host(lambda: build("bert"), (2, 5), "self_attention", path=r".*\.\d\.attention\.self", vocabulary=60),
        Host(lambda: build("gpt2"), (2, 5), "self_attention", path=r"h\.\d\.attn", vocabulary=60),
    ],
    "feed-forward": [
        Host(lambda: build("gpt2"), (2, 5), "mlp", ({"d_in": 32, "d_out": 32},) * 2, path=r"h\.\d\.mlp", vocabulary=60)
    ],
    "model": [Host(lambda: build("bert"), (2, 5), ROOT, sizes=({"d": 32},), path="", vocabulary=60)],
}  # fmt: skip


@functools.cache
def _made(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def fresh(host: Host) -> nn.Module:
    return copy.deepcopy(_made(host.make))


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result = model(x)
    return result if isinstance(result, Tensor) else result.last_hidden_state


def moved(model: nn.Module) -> nn.Module:
    """The model with every parameter of its adapter moved, as training would."""
    with torch.no_grad():
        for parameter in adapters_of(model).get("default").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


# -- the methods -------------------------------------------------------------------------------------------------------

FIELDS: dict[str, dict[str, Any]] = {
    "adapter": {"bottleneck": 3, "scale": 2.0},
    "dora": {"r": 2},
    "lora": {"r": 2},
    "p_tuning": {"num_virtual_tokens": 3, "hidden_size": 8},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "trainable_tokens": {"token_indices": (3, 7)},
}
"""What the methods are tried with; the others with their defaults."""
FAMILIES = [importlib.import_module(f"docs.{file.stem}") for file in sorted(Path(__file__).parent.glob("family_*.py"))]
"""Methods that share a file here: their FIELDS, and their FORMULAS as `test_formulas` has them."""
AFTER = {"adapter"}
"""Methods that sit at a place as a whole, on what came out of it."""
OWN_SYMBOLS: dict[str, dict[str, int]] = {}
"""Where a method's fields give the table's symbols other values than `SYMBOLS`."""
for family in FAMILIES:
    FIELDS |= family.FIELDS
    AFTER |= getattr(family, "AFTER", set())
    OWN_SYMBOLS |= getattr(family, "SYMBOLS", {})
SYMBOLS = {
    "r": 2, "m": 3, "n": 3, "h": 8, "ensemble": 1, "ids": 2, "L": 2, "kv": 4, "d_k": 8, "d_v": 8,
    "k": 1, "g": 1, "E": 1,
}  # fmt: skip
"""The table's symbols for these fields, and for the tiny models (2 layers, 4 heads, width 32)."""
COPYING = ("full", "freezing", "head", "bitfit", "apet", "sparse")
"""Methods whose targets are parameters, or modules that stand for all of theirs."""
UNTARGETED = {"prompt_tuning", "p_tuning"}.union(*(getattr(family, "UNTARGETED", ()) for family in FAMILIES))


def aimed(kind: str, target: Any, **fields: Any) -> Method:
    """The method, told to sit at `target`."""
    fields = {**FIELDS.get(kind, {}), **fields}
    if kind in UNTARGETED:
        return make_method(kind, fields)
    if target is ROOT:
        target = "re:.*" if kind in COPYING else lambda site: site.path == "" and site.parameter is None
    return make_method(kind, {**fields, "head" if kind == "head" else "targets": target})


def cells(sitting: bool) -> list[Any]:
    """(kind, place, host) for every cell of "Sits on", of the places that are in it or of those that are not."""
    return [
        pytest.param(kind, place, host, id=f"{kind}-{place}-{number}")
        for kind, row in ROWS.items()
        for place, hosts in HOSTS.items()
        for number, host in enumerate(hosts)
        # A method without targets sits at the entry of any model that reads tokens, whatever place of it is meant.
        if (place in row.places) == sitting and not (kind in UNTARGETED and place in ("self-attention", "feed-forward"))
    ]
