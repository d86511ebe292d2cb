"""docs/methods.md says what is so: every cell of its table is tried out on tiny places of every kind."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from docs.places import (
    AFTER,
    DOCS,
    HOSTS,
    OWN_SYMBOLS,
    PLACES,
    ROWS,
    SYMBOLS,
    Host,
    Whole,
    aimed,
    cells,
    fresh,
    moved,
    output,
)
from torch import Tensor, nn

import inlay
from inlay.engine.adapters import adapters_of, find_adapters
from inlay.engine.registry import kinds, make_method, method_class
from inlay.errors import InlayError, UnsupportedError


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


@pytest.mark.parametrize(("kind", "place", "host"), cells(sitting=True))
def test_sits_there_counts_so_much_and_merges_or_not(kind: str, place: str, host: Host, tmp_path: Path) -> None:
    model, x = fresh(host), host.inputs()
    base, expected = output(model, x), counted(kind, host, model)
    inlay.attach(model, aimed(kind, host.target))
    assert any(re.match(host.path, site.name) for site, _ in adapters_of(model).get("default").pieces())
    assert inlay.summary(model).trainable_parameters == expected
    found = output(moved(model), x)
    assert found.shape == base.shape
    assert not torch.equal(found, base)
    known = ROWS[kind].peft.replace("–", "INLAY")
    assert peft_type(model, tmp_path) in ({known} if not ROWS[kind].places[place] else {"INLAY", known})
    assert torch.equal(output(inlay.load(fresh(host), tmp_path), x), found)
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    if ROWS[kind].merges == "no":
        with pytest.raises(UnsupportedError, match="not a change of the weights"):
            inlay.merge(model)
    else:
        assert ROWS[kind].merges == "yes"
        inlay.merge(model)
        # Sums in another order: a few roundings of fp32 relative to outputs of order one.
        torch.testing.assert_close(output(model, x), found, rtol=1e-5, atol=1e-5)
        inlay.unmerge(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in bits.items())


@pytest.mark.parametrize(("kind", "place", "host"), cells(sitting=False))
def test_refuses_by_name_to_sit_elsewhere(kind: str, place: str, host: Host) -> None:
    model = fresh(host)
    before = list(model.state_dict())
    with pytest.raises(InlayError, match=method_class(kind).__name__):
        inlay.attach(model, aimed(kind, host.target))
    assert find_adapters(model) is None
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("kind", ROWS)
def test_a_star_stands_where_peft_lacks_some_form(kind: str, tmp_path: Path) -> None:
    for place, starred in ROWS[kind].places.items():
        if starred or len(HOSTS[place]) > 1:  # the others are looked at above
            written = {
                peft_type(inlay.attach(fresh(host), aimed(kind, host.target)), tmp_path / f"{place}{number}")
                for number, host in enumerate(HOSTS[place])
            }
            assert ("INLAY" in written) == (starred or ROWS[kind].peft == "–"), place


def peft_type(model: nn.Module, folder: Path) -> str:
    """What the adapter's file says that it is."""
    content = json.loads((inlay.save(model, folder) / "adapter_config.json").read_text(encoding="utf-8"))
    return str(content["peft_type"])


@pytest.mark.parametrize(
    ("norm", "shape"), [(nn.RMSNorm(6), (2, 6)), (nn.BatchNorm1d(6), (2, 6)), (nn.GroupNorm(2, 6), (2, 6, 4))]
)
def test_other_norms(norm: nn.Module, shape: Sequence[int]) -> None:
    model, x = Whole(norm).eval(), torch.randn(*shape)
    base = output(model, x)
    inlay.attach(model, inlay.LayerNormTuning())
    assert inlay.summary(model).trainable_parameters == sum(p.numel() for p in norm.parameters(recurse=False))
    assert not torch.equal(output(moved(model), x), base)


def test_an_ensemble_of_prompts_is_beyond_peft(tmp_path: Path) -> None:
    (host,) = HOSTS["model"]
    fields = {"num_virtual_tokens": 3, "ensemble": 2}
    model = inlay.attach(fresh(host), make_method("prompt_tuning", fields))
    expected = evaluated(ROWS["prompt_tuning"].parameters, {"n": 3, "d": 32, "ensemble": 2})
    assert inlay.summary(model).trainable_parameters == expected
    assert peft_type(model, tmp_path) == "INLAY"


def counted(kind: str, host: Host, model: nn.Module) -> int:
    """The table's formula over the places of a host."""
    formula = ROWS[kind].parameters
    inside = dict(model.named_parameters())
    inside = {name: p for name, p in inside.items() if re.match(host.path, name)}
    copied = {"size": _sum(inside), "bias": _sum({n: p for n, p in inside.items() if n.endswith("bias")})}
    if re.fullmatch(r"size|bias", formula):
        return copied[formula]
    sizes = list(host.sizes) or [{}]
    if kind in AFTER:  # one at the place as a whole; what goes in is what came out of it
        sizes = [{**one, "d_in": one["d_out"]} for one in (sizes if host.target == "mlp" else sizes[-1:])]
    symbols = {**SYMBOLS, **OWN_SYMBOLS.get(kind, {})}
    turned = [{"d_t": one.get("d_in", 0) * one.get("k", 1) // one.get("g", 1)} for one in sizes]
    return sum(
        evaluated(formula, {**symbols, **rows, **one, "d_l": one.get("d_out", 0)})
        for one, rows in zip(sizes, turned, strict=True)
    )


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
