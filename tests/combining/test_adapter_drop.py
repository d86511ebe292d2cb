"""AdapterDrop: dropped blocks are the base's, and training draws how many once a pass."""

from __future__ import annotations

import copy

import pytest
import torch
from combining.composed import BOTTLENECK, TEXT, close, model, run
from torch import nn

import inlay
from inlay import AdapterDrop, BatchSplit, Parallel, Stack
from inlay.engine.adapters import adapters_of


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("bert", BOTTLENECK),
        ("bert", inlay.Adapter(placement="houlsby", bottleneck=4)),
        ("bert", inlay.Adapter(placement="parallel", bottleneck=4)),
        ("t5", inlay.LoRA(r=2)),
        ("gpt2", inlay.BitFit()),
    ],
)
def test_dropped_blocks_are_the_base_s(name: str, method: inlay.Method) -> None:
    base = model(name, method=method, adapters="a")
    assert torch.equal(run(base, AdapterDrop("a", first=0)), run(base, "a"))
    for first in (1, 2, 5):
        found = run(base, AdapterDrop("a", first=first))
        without = copy.deepcopy(base)
        for site, piece in adapters_of(without).get("a").pieces():  # in those blocks, pieces that change nothing
            if site.layer is not None and site.layer < first:
                for key, parameter in piece.named_parameters():
                    last = key.startswith(("bottleneck.up", "lora_B"))
                    with torch.no_grad():
                        parameter.copy_(site.weight) if piece.replaces else parameter.mul_(0 if last else 1)
        close(found, run(without, "a"))
        assert not torch.equal(found, run(base, "a"))


def test_training_draws_the_number_of_blocks_once_a_pass() -> None:
    base = model("bert", adapters="ab")
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    each = [run(base, AdapterDrop("a", first=first)) for first in range(3)]
    inlay.trainable(base, "a")
    inlay.activate(base, AdapterDrop("a", first=(0, 2)))
    assert torch.equal(base(TEXT)[0], each[0])  # in evaluation, the least
    base.train()
    torch.manual_seed(0)
    seen = []
    for _ in range(24):
        output = base(TEXT)[0]
        (number,) = [n for n, expected in enumerate(each) if torch.equal(output, expected)]
        seen.append(number)
        blocks = {}
        if output.requires_grad:
            output.square().mean().backward()
            blocks = {int(name.split(".")[2]) for name, p in base.named_parameters() if p.grad is not None}
            base.zero_grad(set_to_none=True)
        assert blocks == set(range(number, 2)) or number == 2
    assert min(seen.count(number) for number in range(3)) >= 3
    torch.manual_seed(0)
    assert [int(torch.randint(0, 3, ())) for _ in range(24)] == seen
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable  # type: ignore[union-attr]
    gradients = []
    for kept in (True, False):
        inlay.activate(base, AdapterDrop("a", first=(0, 1)))
        torch.manual_seed(2)
        for _ in range(3):
            base(TEXT)[0].square().mean().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in adapters_of(base).get("a").parameters()])
        base.zero_grad(set_to_none=True)
        if kept:
            enable({"use_reentrant": False})  # type: ignore[operator]
    for mine, other in zip(*gradients, strict=True):
        assert mine is not None
        assert other is not None
        close(mine, other)


def test_drop_inside_and_around_other_compositions() -> None:
    base = model("bert")
    some = torch.cat([run(base, AdapterDrop("a", first=1)), run(base, "b")])
    close(run(base, Parallel(AdapterDrop("a", first=1), "b")), some)
    close(run(base, AdapterDrop(Stack("a", "b"), first=2)), run(base))
    close(
        run(base, AdapterDrop(BatchSplit("a", "b", sizes=[2, 2]), first=0)),
        run(base, BatchSplit("a", "b", sizes=[2, 2])),
    )
    inlay.activate(base, Parallel(AdapterDrop("a", first=(0, 2)), "b"))
    base.train()
    assert base(TEXT)[0].shape[0] == 8


def test_blocks_computed_again_are_left_out_as_in_their_own_call() -> None:
    """Several calls before one backward, each with its own draw."""
    base = model("bert", method=inlay.LoRA(r=2), adapters="a")
    inlay.trainable(base, "a")
    inlay.activate(base, AdapterDrop("a", first=(0, 1)))
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients() -> list[torch.Tensor]:
        base.zero_grad()
        torch.manual_seed(0)
        sum(base(TEXT + shift)[0].square().mean() for shift in range(4)).backward()  # type: ignore[union-attr]
        return [p.grad.clone() for p in adapters_of(base).get("a").parameters() if p.grad is not None]

    base.train()
    torch.manual_seed(0)
    assert len({int(torch.randint(0, 2, ())) for _ in range(4)}) == 2
    expected = gradients()
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # type: ignore[operator]
    for found, gradient in zip(gradients(), expected, strict=True):
        close(found, gradient)
