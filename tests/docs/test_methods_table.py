"""docs/methods.md says what is so: every cell of its table is tried out on tiny places of every kind."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine.tiny import build
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

import inlay
from inlay.engine.adapters import adapters_of, find_adapters
from inlay.engine.piece import Method
from inlay.engine.registry import kinds, make_method, method_class
from inlay.errors import InlayError, UnsupportedError

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
    "embedding": [Host(lambda: Whole(nn.Embedding(11, 6)), (2, 5), sizes=({"d_in": 11, "d_out": 6, "d": 6},), vocabulary=11)],
    "MultiheadAttention": [
        Host(
            lambda: Whole(nn.MultiheadAttention(8, 2, batch_first=True), attend),
            (2, 5, 8),
            sizes=({"d_in": 8, "d_out": 24}, {"d_in": 8, "d_out": 8}),
        )
    ],
    "2-D parameter": [
        Host(lambda: Whole(Bare(10, 6)), (2, 6), target="place.place", sizes=({"d_in": 6, "d_out": 10},), path="place.place")
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
    "norm": [Host(lambda cls=cls: Whole(cls(6)), (2, 6), sizes=({"d_in": 6, "d_out": 6},)) for cls in (nn.LayerNorm, nn.RMSNorm)],
    "self-attention": [
        Host(lambda: build("bert"), (2, 5), "self_attention", path=r"encoder\.layer\.\d\.attention\.self", vocabulary=60),
        Host(lambda: build("gpt2"), (2, 5), "self_attention", path=r"h\.\d\.attn", vocabulary=60),
    ],
    "feed-forward": [
        Host(lambda: build("gpt2"), (2, 5), "mlp", sizes=({"d_in": 32, "d_out": 32},) * 2, path=r"h\.\d\.mlp", vocabulary=60)
    ],
    "model": [Host(lambda: build("bert"), (2, 5), ROOT, sizes=({"d": 32},), path="", vocabulary=60)],
}  # fmt: skip
CELLS = [
    pytest.param(kind, host, place in ROWS[kind].places, ROWS[kind].places.get(place), id=f"{kind}-{place}-{number}")
    for kind in ROWS
    for place, hosts in HOSTS.items()
    for number, host in enumerate(hosts)
]
SITTING = [pytest.param(*cell.values, id=cell.id) for cell in CELLS if cell.values[2]]


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
    "prefix_tuning": {"num_virtual_tokens": 3},
    "prompt_tuning": {"num_virtual_tokens": 3, "ensemble": 2},
    "trainable_tokens": {"token_indices": (3, 7)},
}
"""What the methods are tried with; the others with their defaults."""
SYMBOLS = {"r": 2, "m": 3, "n": 3, "ensemble": 2, "ids": 2, "L": 2, "kv": 4, "d_k": 8, "d_v": 8, "k": 1, "g": 1, "E": 1}
"""The table's symbols for these fields, and for the tiny models (2 layers, 4 heads, width 32)."""
COPYING = ("full", "freezing", "head", "bitfit")
"""Methods whose targets are parameters, or modules that stand for all of theirs."""
UNTARGETED = ("prompt_tuning", "p_tuning")


def aimed(kind: str, target: Any, **fields: Any) -> Method:
    """The method, told to sit at `target`."""
    fields = {**FIELDS.get(kind, {}), **fields}
    if kind in UNTARGETED:
        return make_method(kind, fields)
    if target is ROOT:
        target = "re:.*" if kind in COPYING else lambda site: site.path == "" and site.parameter is None
    return make_method(kind, {**fields, "head" if kind == "head" else "targets": target})


def accepts(kind: str, model: nn.Module, place: str) -> bool:
    """Methods without targets sit at the entry of any model that reads token ids, whatever place is meant."""
    return kind in UNTARGETED and place != "model" and hasattr(model, "config")


# -- every cell --------------------------------------------------------------------------------------------------------


def test_every_method_has_a_row_and_a_page() -> None:
    assert sorted(ROWS) == list(ROWS) == [kind for kind in kinds() if kind != "modules_to_save"]
    pages = {path.stem for path in (DOCS / "methods").glob("*.md")}
    assert pages == set(ROWS)
    assert {row.page for row in ROWS.values()} == {f"methods/{kind}.md" for kind in ROWS}


def test_every_place_of_the_table_is_explained_and_tried() -> None:
    assert [cells[0] for cells in PLACES[1:]] == list(HOSTS)
    assert {place for row in ROWS.values() for place in row.places} <= set(HOSTS)


def test_every_method_has_a_sentence_on_when_to_use_it() -> None:
    text = (DOCS / "methods.md").read_text(encoding="utf-8").partition("## Which one")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^- \*\*(\w+)\*\*: ", text, re.MULTILINE)) == sorted(ROWS)


@pytest.mark.parametrize("kind", ROWS)
def test_class_peft_type_and_paper(kind: str) -> None:
    row, cls = ROWS[kind], method_class(kind)
    assert row.name == cls.__name__
    assert row.peft == (cls.peft_type or "–")
    number = re.search(r"\d{4}\.\d{5}", row.paper)
    assert (f"arxiv.org/abs/{number[0]})" in row.paper and number[0] in cls.paper) if number else row.paper == cls.paper


@pytest.mark.parametrize(("kind", "host", "sits", "starred"), CELLS)
def test_sits_on(kind: str, host: Host, sits: bool, starred: bool | None, tmp_path: Path) -> None:
    model, x = fresh(host), host.inputs()
    base, before = output(model, x), model.state_dict()
    if accepts(kind, model, "model" if host.target is ROOT else ""):
        pytest.skip("sits at the entry of any such model, which has its own row")
    if not sits:
        with pytest.raises(InlayError) as caught:
            inlay.attach(model, aimed(kind, host.target))
        assert method_class(kind).__name__ in str(caught.value)
        assert find_adapters(model) is None
        assert model.state_dict().keys() == before.keys()
        return
    inlay.attach(model, aimed(kind, host.target))
    names = [site.name for site, _ in adapters_of(model).get("default").pieces()]
    assert any(re.match(host.path, name) for name in names)
    found = output(moved(model), x)
    assert found.shape == base.shape
    assert not torch.equal(found, base)
    inlay.save(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
    expected = {method_class(kind).peft_type or "INLAY"} | ({"INLAY"} if starred or "ensemble" in FIELDS.get(kind, {}) else set())
    assert written in expected
    again = inlay.load(fresh(host), tmp_path)
    assert torch.equal(output(again, x), found)


@pytest.mark.parametrize("kind", [kind for kind, row in ROWS.items() if any(row.places.values())])
def test_a_star_stands_where_peft_lacks_some_form(kind: str, tmp_path: Path) -> None:
    for place, starred in ROWS[kind].places.items():
        written = set()
        for number, host in enumerate(HOSTS[place]):
            model = inlay.attach(fresh(host), aimed(kind, host.target))
            folder = inlay.save(model, tmp_path / f"{place}{number}")
            written.add(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"])
        assert ("INLAY" in written) == starred, place


def test_prompts_in_pefts_format(tmp_path: Path) -> None:
    for kind in set(UNTARGETED) & set(ROWS):
        model = inlay.attach(fresh(HOSTS["model"][0]), make_method(kind, {"num_virtual_tokens": 3}))
        inlay.save(model, tmp_path / kind)
        config = json.loads((tmp_path / kind / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["peft_type"] == ROWS[kind].peft


@pytest.mark.parametrize(("kind", "host", "sits", "starred"), SITTING)
def test_merges(kind: str, host: Host, sits: bool, starred: bool) -> None:
    x = host.inputs()
    model = moved(inlay.attach(fresh(host), aimed(kind, host.target)))
    expected, before = output(model, x), {name: value.clone() for name, value in model.state_dict().items()}
    if ROWS[kind].merges == "no":
        with pytest.raises(UnsupportedError, match="not a change of the weights"):
            inlay.merge(model)
    else:
        assert ROWS[kind].merges == "yes"
        inlay.merge(model)
        # Sums in another order: a few roundings of fp32 relative to outputs of order one.
        torch.testing.assert_close(output(model, x), expected, rtol=1e-5, atol=1e-5)
        inlay.unmerge(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(("kind", "host", "sits", "starred"), SITTING)
def test_parameters(kind: str, host: Host, sits: bool, starred: bool) -> None:
    model = fresh(host)
    expected = counted(kind, host, model)
    inlay.attach(model, aimed(kind, host.target))
    assert inlay.summary(model).trainable_parameters == expected


def counted(kind: str, host: Host, model: nn.Module) -> int:
    """The table's formula over the places of a host."""
    formula = ROWS[kind].parameters
    inside = dict(model.named_parameters())
    inside = {name: p for name, p in inside.items() if re.match(host.path, name)}
    copied = {"size": _sum(inside), "bias": _sum({n: p for n, p in inside.items() if n.endswith("bias")})}
    if re.fullmatch(r"size|bias", formula):
        return copied[formula]
    sizes = list(host.sizes) or [{}]
    if kind == "adapter":  # one at the place as a whole; what goes in is what came out of it
        sizes = [{**one, "d_in": one["d_out"]} for one in (sizes if host.target == "mlp" else sizes[-1:])]
    return sum(evaluated(formula, {**SYMBOLS, **one, "d_l": one.get("d_out", 0)}) for one in sizes)


def _sum(parameters: Mapping[str, Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


def evaluated(formula: str, symbols: Mapping[str, int]) -> int:
    assert re.fullmatch(r"[\w\s*/+()]+", formula), formula
    value = eval(formula, {"__builtins__": {}}, dict(symbols))
    assert value == int(value)
    return int(value)


@pytest.mark.parametrize(
    ("kind", "fields", "symbols"),
    [
        ("ia3", {"feedforward": ("place",)}, {"d_l": 6}),
        ("adapter", {"placement": "parallel"}, {"m": 3, "d_in": 6, "d_out": 10}),
        ("lora", {"r": 3, "layers": None}, {"r": 3, "d_in": 6, "d_out": 10, "E": 1, "k": 1, "g": 1}),
    ],
)
def test_parameters_with_other_fields(kind: str, fields: dict[str, Any], symbols: dict[str, int]) -> None:
    (host,) = HOSTS["linear"]
    model = inlay.attach(fresh(host), aimed(kind, host.target, **fields))
    assert inlay.summary(model).trainable_parameters == evaluated(ROWS[kind].parameters, {"E": 1, **symbols})


# -- the formulas, computed here from the adapter's tensors ----------------------------------------------------------------


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters by the last part of their names."""
    pieces = adapters_of(model).get("default").pieces()
    return {name: p for _, piece in pieces for name, p in piece.named_parameters()}


def linear(change: Callable[..., Tensor]) -> Callable[[str], tuple[Tensor, Tensor]]:
    """An oracle on a linear: `change(x, W, b, **tensors)` is what the adapted linear should compute."""

    def check(kind: str) -> tuple[Tensor, Tensor]:
        (host,) = HOSTS["linear"]
        model, x = moved(inlay.attach(fresh(host), aimed(kind, host.target))), host.inputs()
        base: Any = fresh(host).place
        named = {name.replace(".", "_"): tensor for name, tensor in tensors(model).items()}
        with torch.no_grad():
            return output(model, x), change(x, base.weight, base.bias, **named)

    return check


def lora(x: Tensor, w: Tensor, b: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return F.linear(x, w, b) + 16 / 2 * (x @ lora_A.T @ lora_B.T)


def dora(x: Tensor, w: Tensor, b: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
    direction = w + 16 / 2 * lora_B @ lora_A
    return F.linear(x, magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True), b)


def ia3(x: Tensor, w: Tensor, b: Tensor, ia3_l: Tensor) -> Tensor:
    return ia3_l.flatten() * F.linear(x, w, b)


def adapter(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    hidden = F.relu(F.linear(h, t["bottleneck_down_weight"], t["bottleneck_down_bias"]))
    return h + 2.0 * F.linear(hidden, t["bottleneck_up_weight"], t["bottleneck_up_bias"])


def copied(kind: str) -> tuple[Tensor, Tensor]:
    (host,) = HOSTS["linear"]
    model, x = moved(inlay.attach(fresh(host), aimed(kind, host.target))), host.inputs()
    weight, bias = (piece.value for _, piece in adapters_of(model).get("default").pieces())
    with torch.no_grad():
        return output(model, x), F.linear(x, weight, bias)


def bitfit(x: Tensor, w: Tensor, b: Tensor, value: Tensor) -> Tensor:
    return F.linear(x, w, value)


def norm(kind: str) -> tuple[Tensor, Tensor]:
    host = HOSTS["norm"][0]
    model, x = moved(inlay.attach(fresh(host), aimed(kind, host.target))), host.inputs()
    gain, bias = (piece.value for _, piece in adapters_of(model).get("default").pieces())
    sigma = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    with torch.no_grad():
        return output(model, x), gain * (x - x.mean(-1, keepdim=True)) / sigma + bias


def tokens(kind: str) -> tuple[Tensor, Tensor]:
    (host,) = HOSTS["embedding"]
    model = moved(inlay.attach(fresh(host), aimed(kind, host.target)))
    base: Any = fresh(host).place
    table = base.weight.detach().clone()
    table[[3, 7]] = tensors(model)["value"].detach()
    x = torch.arange(11)
    return output(model, x), table[x]


def prompt(kind: str) -> tuple[Tensor, Tensor]:
    model, ids = build("llama", "causal"), torch.randint(3, 60, (2, 5))
    base = copy.deepcopy(model)
    inlay.attach(model, make_method(kind, {"num_virtual_tokens": 3}))
    vectors = next(iter(tensors(model).values()))
    with torch.no_grad():
        embedded = torch.cat((vectors.expand(2, -1, -1), base.model.embed_tokens(ids)), dim=1)
        return model(ids).logits, base(inputs_embeds=embedded).logits[:, 3:]


def prefix(kind: str) -> tuple[Tensor, Tensor]:
    model, ids = build("llama", "causal"), torch.randint(3, 60, (2, 5))
    base = copy.deepcopy(model)
    inlay.attach(model, make_method(kind, {"num_virtual_tokens": 3}))
    cache = DynamicCache(config=base.config)
    sources = [p for p in adapters_of(model).get("default").parameters()]
    for layer, rows in enumerate(sources):  # (n, 2 · heads · width): keys, then values
        keys, values = (half.detach().view(1, 3, 2, 8).transpose(1, 2).expand(2, -1, -1, -1) for half in rows.chunk(2, -1))
        cache.update(keys, values, layer)
    with torch.no_grad():
        return model(ids).logits, base(ids, past_key_values=cache).logits


FORMULAS: dict[str, tuple[str, Callable[[str], tuple[Tensor, Tensor]]]] = {
    "adapter": ("h + s · (W_up f(W_down h + b_down) + b_up)", linear(adapter)),
    "bitfit": ("y = W x + b′", linear(bitfit)),
    "dora": ("W′ = m · V / ‖V‖, V = W + s · B A", linear(dora)),
    "freezing": ("W′ = a trained copy of chosen W", copied),
    "full": ("W′ = a trained copy of every W", copied),
    "head": ("y = head(f(x)), f frozen", copied),
    "ia3": ("y = l ⊙ (W x + b), or y = W (l ⊙ x) + b", linear(ia3)),
    "layer_norm": ("y = γ′ ⊙ (x − μ) / σ + β′", norm),
    "lora": ("y = W x + s · B (A x)", linear(lora)),
    "prefix_tuning": ("softmax(q [K_p ; K]ᵀ / √d) [V_p ; V]", prefix),
    "prompt_tuning": ("E′ = [p_1 … p_n ; E(x)]", prompt),
    "trainable_tokens": ("E′[i] = v_i for chosen ids i", tokens),
}


@pytest.mark.parametrize("kind", ROWS)
def test_formula(kind: str) -> None:
    text, oracle = FORMULAS[kind]
    assert ROWS[kind].formula == text
    found, expected = oracle(kind)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # fp32 sums, in another order


# -- the pages ---------------------------------------------------------------------------------------------------------

COMMON = {field.name for field in dataclasses.fields(Method)}


@pytest.mark.parametrize("kind", ROWS)
def test_a_page_lists_the_fields_and_their_defaults(kind: str) -> None:
    own = [field for field in dataclasses.fields(method_class(kind)) if field.name not in COMMON]
    found = next((table[1:] for table in tables(DOCS / "methods" / f"{kind}.md") if table[0][0] == "Field"), [])
    assert [cells[0] for cells in found] == [f"`{field.name}`" for field in own]
    for field, cells in zip(own, found, strict=True):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        assert eval(cells[1].strip("`")) == default, field.name
        assert cells[2]
    headings = re.findall(r"^## (.+)$", (DOCS / "methods" / f"{kind}.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == ["Fields", "Where it sits", "Parameters", "In Python", "On the command line", "Files", "Traps"]


def test_the_common_fields_are_listed() -> None:
    (table,) = (table for table in tables(DOCS / "methods.md") if table[0][0] == "Field")
    assert {cells[0].strip("`") for cells in table[1:]} == COMMON
