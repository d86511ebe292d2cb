"""What is active beside compositions and after them, in files, copies and runs; and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from combining.composed import BOTTLENECK, MODELS, TEXT, close, model, run, shared
from engine import tiny
from engine.small import IDS, Net, randomise
from torch import nn

import inlay
from inlay import AdapterDrop, Average, BatchSplit, Fuse, Parallel, Split, Stack
from inlay.engine.adapters import adapters_of
from inlay.engine.host import base_class
from inlay.errors import AdapterError, ConfigError, InlayError, UnsupportedError

# -- states ------------------------------------------------------------------------------------------------------------


def test_what_is_active_is_data_and_comes_back() -> None:
    base = model("bert")
    whole = Stack("a", Parallel("b", BatchSplit("c", None, sizes=[1, 3])))
    inlay.activate(base, whole)
    assert inlay.active(base) == ("a", Parallel("b", BatchSplit("c", None, sizes=[1, 3])))
    assert inlay.summary(base).active == ("a", "b", "c")
    before = base(TEXT)[0]
    with inlay.using(base, "c"):
        assert inlay.active(base) == ("c",)
    with inlay.disabled(base), inlay.using(base, Average("a", "b")):
        base(TEXT)
    assert inlay.active(base) == ("a", Parallel("b", BatchSplit("c", None, sizes=[1, 3])))
    assert torch.equal(base(TEXT)[0], before)
    for again in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert torch.equal(again(TEXT)[0], before)
        assert inlay.active(again) == inlay.active(base)
    assert repr(whole) == "Stack('a', Parallel('b', BatchSplit('c', None, sizes=(1, 3))))"
    assert len({whole, Stack("a", Parallel("b", BatchSplit("c", None, sizes=(1, 3)))), Stack("a")}) == 2
    assert Stack("a", "b") != Parallel("a", "b")


def test_loading_attaching_and_detaching_around_a_composition(tmp_path: Path) -> None:
    base = model("bert")
    cls = base_class(type(base))
    inlay.save(base, tmp_path, "c")
    inlay.activate(base, Parallel("a", "b"))
    inlay.load(base, tmp_path, "d")
    assert inlay.active(base) == (Parallel("a", "b"),)
    with pytest.raises(AdapterError, match=r"'a' is part of Parallel\('a', 'b'\)"):
        inlay.detach(base, "a")
    assert list(adapters_of(base).loaded) == ["a", "b", "c", "d"]
    inlay.detach(base, "c")
    inlay.attach(base, BOTTLENECK, "e")
    assert inlay.active(base) == (Parallel("a", "b"), "e")
    randomise(base, "e")
    close(base(TEXT)[0], torch.cat([run(base, "a", "e"), run(base, "b", "e")]))
    with pytest.raises(UnsupportedError, match="cannot merge"):
        inlay.merge(base)
    assert inlay.controllers(base) == []
    inlay.detach(base)
    assert type(base) is cls
    assert torch.equal(base(TEXT)[0], tiny.build("bert")(TEXT)[0])


def test_compositions_and_shared_calls() -> None:
    base = model("bert", method=inlay.LoRA(r=2))
    inlay.activate(base, Average("a", "b"))
    before = base(TEXT)[0]
    with inlay.per_row(base, ["a", "b", "c", None]):
        assert torch.equal(base(TEXT)[0][3], tiny.build("bert")(TEXT)[0][3])
    assert torch.equal(base(TEXT)[0], before)
    with pytest.raises(AdapterError, match="which no numbers can switch"):
        inlay.switchable(base)
    inlay.activate(base, "a")
    inlay.switchable(base)
    with pytest.raises(AdapterError, match="does not run while"):
        inlay.activate(base, Average("a", "b"))
    inlay.switchable(base, False)
    inlay.merge(base)
    with pytest.raises(AdapterError, match="are merged"):
        inlay.activate(base, Parallel("a", "b"))


@pytest.mark.parametrize(
    "composition", [Parallel("a", Stack("a", "b")), Average("a", "b"), Split("a", "b", sizes=[2, 3])]
)
def test_one_graph(composition: Any) -> None:
    net = Net()
    for name in "ab":
        inlay.attach(net, inlay.LoRA(r=2, targets="first,second"), name)
        randomise(net, name)
    inlay.activate(net, composition)
    plain = net(IDS)
    close(torch.compile(net, fullgraph=True, backend="eager")(IDS), plain)


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    def steps(base: Any, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            (base(TEXT)[0] * torch.linspace(-1, 1, 32)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def trainer(base: Any) -> torch.optim.Optimizer:
        inlay.trainable(base, "a", "b")
        inlay.activate(base, Stack(AdapterDrop("a", first=(0, 1)), Average("b", None)))
        return torch.optim.AdamW([p for p in base.train().parameters() if p.requires_grad], lr=0.01)

    base = model("bert", adapters="ab")
    optimizer = trainer(base)
    torch.manual_seed(3)
    steps(base, optimizer, 3)
    for name in "ab":
        inlay.save(base, tmp_path / name, name)
    state, random = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    steps(base, optimizer, 3)
    again = tiny.build("bert")
    for name in "ab":
        inlay.load(again, tmp_path / name, name)
    optimizer = trainer(again)
    optimizer.load_state_dict(state)
    torch.set_rng_state(random)
    steps(again, optimizer, 3)
    for name in "ab":
        pairs = zip(adapters_of(base).get(name).parameters(), adapters_of(again).get(name).parameters(), strict=True)
        assert all(torch.equal(mine, other) for mine, other in pairs)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (Stack, ConfigError, r"Stack\(\): name adapters"),
        (lambda: Stack(["a", "b"]), ConfigError, "parts are names"),  # type: ignore[arg-type]
        (lambda: BatchSplit("a", "b", sizes=[1]), ConfigError, "2 are needed"),
        (lambda: Split("a", "b", sizes=[1, -1]), ConfigError, "whole numbers"),
        (lambda: Average("a", weights=[1, 2]), ConfigError, "1 are needed"),
        (lambda: Average("a", "b", weights=["x", 1]), ConfigError, "numbers are needed"),  # type: ignore[list-item]
        (lambda: Average("a", "b", weights=[float("nan"), 1]), ConfigError, "numbers are needed"),
        (lambda: AdapterDrop("a", first=-1), ConfigError, "least, most"),
        (lambda: AdapterDrop("a", first=None), ConfigError, "least, most"),  # type: ignore[arg-type]
        (lambda: AdapterDrop("a", first=(3, 1)), ConfigError, "least, most"),
        (lambda: AdapterDrop(None, first=1), ConfigError, "name an adapter"),  # type: ignore[arg-type]
        (lambda: Parallel("a", "q"), AdapterError, "no adapter 'q' is loaded"),
        (lambda: Average("a", Parallel("b", "c")), ConfigError, "outermost"),
        (lambda: AdapterDrop(Stack("a", Parallel("b", "c")), first=1), ConfigError, "outermost"),
        (lambda: Stack(Parallel("a", "b"), Parallel("c", None)), ConfigError, "one is enough"),
        (lambda: Stack("a", Parallel("b", "a")), AdapterError, "twice"),
        (lambda: Parallel("a", "prompt"), UnsupportedError, "'prompt'"),
        (lambda: Average("a", "prefix"), UnsupportedError, "'prefix'"),
        (lambda: BatchSplit("a", "pair", sizes=[2, 2]), UnsupportedError, "'pair'"),
        (lambda: Fuse("a", Stack("b")), ConfigError, "names of adapters"),
    ],
)
def test_what_cannot_be(make: Callable[[], Any], error: type[InlayError], message: str) -> None:
    base = refusing()
    inlay.activate(base, "a")
    with pytest.raises(error, match=message):
        inlay.activate(base, make())
    assert inlay.active(base) == ("a",)
    assert type(base) is base_class(type(base)) or "prompt" in adapters_of(base).loaded


def refusing() -> nn.Module:
    if "refusing" not in MODELS:
        base = model("bert")
        inlay.attach(base, inlay.PromptTuning(num_virtual_tokens=2), "prompt")
        inlay.attach(base, inlay.PrefixTuning(num_virtual_tokens=2), "prefix")
        inlay.attach(base, inlay.Adapter(placement="parallel", bottleneck=4), "pair")
        MODELS["refusing"] = base
    return MODELS["refusing"]


def test_names_twice_and_two_parallels_at_the_top() -> None:
    base = refusing()
    with pytest.raises(AdapterError, match="twice"):
        inlay.activate(base, "a", Parallel("a", "b"))
    with pytest.raises(ConfigError, match="one is enough"):
        inlay.activate(base, Parallel("a", None), Parallel("b", None))


def test_sizes_that_do_not_fit_the_batch() -> None:
    base = shared("lora-with-heads")
    for composition, message in (
        (BatchSplit("a", "b", sizes=[1, 2]), "3 rows"),
        (Split("a", "b", sizes=[3, 3]), "without tokens"),  # the head's rows have none
        (Split("a", "b", sizes=[3, 4]), "7 tokens"),
    ):
        inlay.activate(base, composition)
        with pytest.raises(UnsupportedError, match=message):
            base(TEXT)
    inlay.activate(base)
    conv = inlay.attach(tiny.Plain(), inlay.LoRA(r=2, targets="mix,out"), "a")
    with pytest.raises(UnsupportedError, match="cannot run the adapter 'a'"):
        inlay.activate(conv, Split("a", None, sizes=[1, 4]))
