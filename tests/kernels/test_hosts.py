"""The fused functions in hosts of every sort, beside other adapters, against HF peft, and what a whole model keeps."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from oracles.plain_formulas import (
    ROUNDINGS,
    Net,
    attached,
    close,
    fused,
    gradients,
    kept,
    method,
    plainly,
    same,
    trained,
)
from torch import Tensor, nn

import inlay
from inlay.engine.adapters import adapters_of

KINDS = pytest.mark.parametrize("kind", ["lora", "dora"])


@pytest.mark.parametrize("kinds", [("lora", "lora"), ("dora", "lora"), ("lora", "dora"), ("lora", "ia3")])
def test_two_adapters_at_once_are_their_merged_weights(kinds: tuple[str, str]) -> None:
    base = Net()
    for kind, name in zip(kinds, ("one", "other"), strict=True):
        attached(kind, base, name=name)
    inlay.activate(base, "one", "other")
    inlay.trainable(base, "one", "other")
    x = torch.randn(9, 6, requires_grad=True)
    assert fused(base(x)) >= 3
    same(base, x)
    y = base(x).detach()
    close(inlay.merge(base)(x), y, ROUNDINGS)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_linears_stored_transposed(kind: str) -> None:
    base = nn.ModuleDict({
        "first": transformers.pytorch_utils.Conv1D(8, 6),
        "gate": transformers.pytorch_utils.Conv1D(8, 6),
        "last": transformers.pytorch_utils.Conv1D(5, 8),
    })  # fmt: skip
    base.forward = Net.forward.__get__(base)  # type: ignore[method-assign]
    for name in base:
        nn.init.normal_(base[name].weight, std=0.3)
    model, x = attached(kind, base), torch.randn(2, 9, 6, requires_grad=True)
    if kind != "ia3":
        assert fused(Net.forward(model, x)) == 3
    y = Net.forward(model, x)
    found = gradients(y, *trained(model).values(), x)
    with plainly():
        truth = Net.forward(model, x)
        expected = gradients(truth, *trained(model).values(), x)
    close(y, truth, ROUNDINGS)
    for one, other in zip(found, expected, strict=True):
        close(one, other, ROUNDINGS)


class Doubled(nn.Linear):
    """A linear that does more than its class says."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Doubled.calls += 1
        return 2 * super().forward(x)


@KINDS
def test_a_linear_with_a_forward_of_its_own_is_called(kind: str) -> None:
    model, x = attached(kind, nn.Sequential(Doubled(6, 5)), targets="0"), torch.randn(9, 6, requires_grad=True)
    before = Doubled.calls
    model(x)
    assert Doubled.calls == before + 1
    if kind == "lora":
        base = 2 * nn.functional.linear(x, model[0].weight, model[0].bias)
        ((_, piece),) = adapters_of(model).get("default").pieces()
        close(model(x), base + x @ piece.delta().t(), ROUNDINGS)
    same(model, x)


@KINDS
def test_a_forward_set_on_the_instance_is_called(kind: str) -> None:
    """As accelerate's device hooks set it."""
    base, calls = Net(), []
    inner = base.first.forward
    base.first.forward = lambda x: calls.append(1) or inner(x) * 2  # type: ignore[method-assign]
    model, x = attached(kind, base), torch.randn(9, 6, requires_grad=True)
    model(x)
    assert calls == [1]
    same(model, x)


@pytest.mark.parametrize("precision", ["exact", "model"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_with_the_tensors_of_hf_peft_it_computes_what_hf_peft_computes(
    precision: str, dora: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(4)
    base = Net(width=32).to(dtype)
    ours = attached("dora" if dora else "lora", copy.deepcopy(base), precision=precision)
    config = peft.LoraConfig(r=3, lora_alpha=2.1, target_modules=["first", "gate", "last"], use_dora=dora)
    theirs = peft.get_peft_model(base, config, autocast_adapter_dtype=precision == "exact")
    pairs: list[tuple[Tensor, Tensor]] = []
    for site, piece in adapters_of(ours).get("default").pieces():
        layer = theirs.base_model.model.get_submodule(site.path)
        pairs += [(piece.lora_A, layer.lora_A.default.weight), (piece.lora_B, layer.lora_B.default.weight)]
        if dora:
            pairs.append((piece.magnitude, layer.lora_magnitude_vector.default.weight))
    with torch.no_grad():
        for mine, their in pairs:
            mine.copy_(mine.to(dtype))  # numbers that both can hold
            their.copy_(mine)
    x = torch.randn(60, 32).to(dtype)
    y, truth = ours(x), theirs(x)
    assert y.dtype == truth.dtype == dtype
    bf16 = dtype == torch.bfloat16
    close(y, truth, 6 if bf16 else ROUNDINGS)
    found = gradients(y, *[mine for mine, _ in pairs])
    expected = gradients(truth, *[their for _, their in pairs])
    for one, other in zip(found, expected, strict=True):
        close(one, other, 8 if bf16 else ROUNDINGS, dtype)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_a_model_keeps_is_a_sum_of_its_parts(kind: str) -> None:
    """x once for two siblings, h for each host, y for each host of DoRA: where torch's own operations keep y too."""
    model, x = inlay.attach(Net(), method(kind)), torch.randn(9, 6, requires_grad=True)  # with factors near one
    with kept(*model.parameters()) as found:
        y = model(x)
    own = {t.untyped_storage().data_ptr() for t in (x, y)}
    shapes = sorted(tuple(t.shape) for t in found if t.untyped_storage().data_ptr() not in own and t.dim() > 1)
    # tanh(first), gate and their product are torch's and last's; DoRA adds the output of first.
    assert shapes == sorted([(9, 3)] * 3 + [(9, 8)] * (3 if kind == "lora" else 4))
    with kept(*model.parameters()) as nothing, torch.no_grad():
        model(x)
    assert nothing == []


def test_a_frozen_a_keeps_no_x() -> None:
    base = nn.Sequential(nn.Linear(6, 8))
    model, x = attached("lora", base, targets="0", freeze_a=True), torch.randn(9, 6)
    with kept(*model.parameters(), *model.buffers()) as found:
        y = model(x)
    assert fused(y) == 1
    assert [tuple(t.shape) for t in found] == [(9, 3)]
