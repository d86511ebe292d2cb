"""What administering adapters does not do: walk over modules to switch, draw numbers to load, look at a model twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.engine import adapters, fingerprint
from inlay.engine.adapters import adapters_of
from inlay.engine.sites import SiteIndex
from inlay.engine.walk import modules
from inlay.pieces.lora.piece import LoRAPiece


def stack(layers: int, wide: int = 8) -> nn.Module:
    """Linears with two adapters, "default" active."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(wide, wide) for _ in range(layers)))
    for name in ("default", "second"):
        inlay.attach(net, inlay.LoRA(r=2, targets="all-linear", init="random"), name=name)
    inlay.activate(net, "default")
    return net


def count(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """Every call of `owner.name` from now on adds an entry to the list."""
    calls: list[str] = []
    function = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def disable_and_enable(net: nn.Module) -> None:
    """Into the block and out again."""
    with inlay.disabled(net):
        pass


def use_and_return(net: nn.Module) -> None:
    """Into the block and out again."""
    with inlay.using(net, "second"):
        pass


SWITCHES: dict[str, Callable[[nn.Module], Any]] = {
    "one": lambda net: inlay.activate(net, "second"),
    "two": lambda net: inlay.activate(net, "second", "default"),
    "none": inlay.activate,
    "disabled": disable_and_enable,
    "using": use_and_return,
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("layers", [1, 40])
def test_switching_and_disabling_touch_no_module(
    layers: int, switch: Callable[[nn.Module], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = stack(layers)

    def touched(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a module was touched")

    with monkeypatch.context() as patched:
        for name in ("__getattr__", "__setattr__", "named_modules", "modules", "named_children", "children", "apply"):
            patched.setattr(nn.Module, name, touched)
        for name in ("parameters", "named_parameters", "requires_grad_", "train"):
            patched.setattr(nn.Module, name, touched)
        switch(net)
    reached = [path for path, _ in modules(net)]
    assert len(reached) == layers + 1  # the guard has been lifted: it was no module that is never asked


@pytest.mark.parametrize("layers", [1, 40])
def test_finding_the_adapters_stops_at_the_module_that_has_them(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = stack(layers)
    visited: list[str] = []

    def walking(model: nn.Module) -> Any:
        for path, module in modules(model):
            visited.append(path)
            yield path, module

    monkeypatch.setattr(adapters, "modules", walking)
    inlay.activate(nn.Sequential(net), "second")  # as inside DistributedDataParallel
    assert visited == ["", "0"]


def test_a_load_draws_no_numbers_and_every_number_comes_from_the_file(tmp_path: Path) -> None:
    net = stack(3)
    inlay.save(net, tmp_path / "second", name="second")
    before = torch.get_rng_state()
    inlay.load(net, tmp_path / "second", name="third")
    assert torch.equal(torch.get_rng_state(), before)
    loaded = adapters_of(net).get("third").parameters()
    assert len(loaded) == 6
    for ours, theirs in zip(loaded, adapters_of(net).get("second").parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_places_of_a_model_are_found_once_for_each_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = stack(3)
    calls = count(monkeypatch, SiteIndex, "__init__")
    inlay.attach(net, inlay.LoRA(r=2, targets="0,1"), name="third")
    assert len(calls) == 1
    inlay.save(net, tmp_path)
    assert len(calls) == 2
    inlay.load(net, tmp_path, name="fourth")
    assert len(calls) == 3
    inlay.merge(net)
    inlay.unmerge(net)
    assert len(calls) == 3


def test_the_base_is_looked_through_once_to_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = stack(3)
    inlay.save(net, tmp_path)
    calls = count(monkeypatch, fingerprint, "base_parameters")
    inlay.load(net, tmp_path, name="third")
    assert len(calls) == 1


def test_merging_computes_each_weight_once_and_only_where_an_active_adapter_sits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = stack(4)
    inlay.attach(net, inlay.LoRA(r=2, targets="1"), name="third")
    inlay.activate(net, "third")
    calls = count(monkeypatch, LoRAPiece, "weight")
    before = [layer.weight for layer in net.children()]
    inlay.merge(net)
    assert len(calls) == 1
    assert [layer.weight is weight for layer, weight in zip(net.children(), before, strict=True)] == [
        True, False, True, True
    ]  # fmt: skip
    inlay.unmerge(net)
    assert all(layer.weight is weight for layer, weight in zip(net.children(), before, strict=True))


def test_what_a_merge_puts_in_shares_no_memory_with_what_it_came_from() -> None:
    """A trained copy gives the very tensor that it keeps: an optimiser's step must not reach the merged weight."""
    net = nn.Sequential(nn.Linear(4, 4))
    inlay.attach(net, inlay.FullFineTuning())
    inlay.merge(net)
    own = {p.untyped_storage().data_ptr() for p in adapters_of(net).get("default").parameters()}
    merged = [net[0]._parameters[name] for name in ("weight", "bias")]
    assert own
    assert not own & {p.untyped_storage().data_ptr() for p in merged if p is not None}


def test_first_values_are_uniform_within_one_over_the_root_of_the_inputs_and_follow_the_seed() -> None:
    drawn = []
    for seed in (0, 0, 1):
        net = nn.Sequential(nn.Linear(400, 300), nn.Conv2d(8, 4, 5))
        torch.manual_seed(seed)
        inlay.attach(net, inlay.LoRA(r=50, targets="re:.*", dropout=0.0))
        drawn.append([net[place].inlays.default.lora.lora_A.detach() for place in (0, 1)])
    for a, fan_in in zip(drawn[0], (400, 8 * 25), strict=True):
        bound = fan_in**-0.5
        assert a.abs().max() <= bound
        # 10,000 draws or more of variance bound²/3: the mean square is within 5 of its standard errors (each 0.9 %)
        assert a.square().mean().item() == pytest.approx(bound**2 / 3, rel=0.045)
        assert a.mean().abs() < 5 * bound / (3 * a.numel()) ** 0.5
    assert all(torch.equal(one, two) for one, two in zip(drawn[0], drawn[1], strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(drawn[0], drawn[2], strict=True))


def test_the_walk_is_that_of_named_modules_without_pieces() -> None:
    shared = nn.Linear(3, 3)
    net = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.ModuleList([shared, nn.Linear(3, 3)])})
    net.register_module("nothing", None)
    plain = list(net.named_modules())
    assert list(modules(net)) == plain
    inlay.attach(net, inlay.LoRA(r=1, targets="all-linear"))
    assert len(list(net.named_modules())) > len(plain)
    assert [path for path, _ in modules(net)] == [path for path, _ in plain]
