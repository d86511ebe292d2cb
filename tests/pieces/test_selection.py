"""Which entries are chosen: scores against their formulas, budgets to the last entry, and a model left as it was."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.tiny import build
from properties.models import base_bits, fresh, snapshot
from torch import Tensor, nn
from torch.nn import functional

import inlay
from inlay.engine.batches import Batches
from inlay.errors import BaseModelError, CheckpointError, ConfigError, DataError, TargetError, UnsupportedError
from inlay.pieces.subsets import searches
from inlay.pieces.subsets.scores import SCORES
from inlay.pieces.subsets.subset import Subset

CLASSES, FEATURES = 3, 5


class Softmax(nn.Module):
    """One softmax layer, whose Fisher information is known."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def cross_entropy(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"])


def rows(number: int = 12, size: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(number, FEATURES, generator=generator)
    y = torch.randint(CLASSES, (number,), generator=generator)
    return [{"x": a, "y": b} for a, b in zip(x.split(size), y.split(size), strict=True)]


def softmax() -> Softmax:
    torch.manual_seed(0)
    return Softmax()


def texts(number: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (number, 2, 7), generator=generator)
    return [{"input_ids": one, "labels": torch.tensor([0, 1])} for one in ids]


def best(scores: Mapping[str, Tensor], count: int) -> dict[str, list[int]]:
    """By a plain sort of everything."""
    order = torch.cat([one.flatten() for one in scores.values()]).sort(descending=True, stable=True).indices[:count]
    found, start = {}, 0
    for name, one in scores.items():
        found[name] = sorted(int(place) - start for place in order if start <= place < start + one.numel())
        start += one.numel()
    return {name: places for name, places in found.items() if places}


def places(subset: Subset) -> dict[str, list[int]]:
    return {name: subset.mask(name).flatten().nonzero().flatten().tolist() for name in subset.entries}


def expected_scores(score: str) -> dict[str, Tensor]:
    """By closed forms: the gradient of softmax with cross-entropy is (p − y) xᵀ."""
    model, batches = softmax(), rows()
    weight, bias = model.layer.weight.detach(), model.layer.bias.detach()
    x, y = torch.cat([one["x"] for one in batches]), torch.cat([one["y"] for one in batches])
    error = functional.linear(x, weight, bias).softmax(-1) - functional.one_hot(y, CLASSES)
    of_weight, of_bias = error[:, :, None] * x[:, None], error
    if score == "fisher":
        return {"layer.weight": of_weight.square().mean(0), "layer.bias": of_bias.square().mean(0)}
    means = {"layer.weight": of_weight.mean(0).abs(), "layer.bias": of_bias.mean(0).abs()}
    if score == "gradient":
        return means
    sizes = {"layer.weight": weight.abs(), "layer.bias": bias.abs()}
    return sizes if score == "magnitude" else {name: means[name] * sizes[name] for name in means}


@pytest.mark.parametrize("score", ["magnitude", "gradient", "snip", "fisher"])
@pytest.mark.parametrize("count", [1, 5, 17])
def test_scores_are_their_formulas(score: str, count: int) -> None:
    found = inlay.select(softmax(), rows(), count, score=score, loss=cross_entropy)
    assert places(found) == best(expected_scores(score), count)
    assert found.count == count


def test_the_size_of_batches_does_not_matter_to_fisher() -> None:
    one, other = (inlay.select(softmax(), rows(12, size), 6, loss=cross_entropy) for size in (1, 6))
    assert one == other


def test_a_threshold_takes_what_reaches_it() -> None:
    scores = expected_scores("fisher")
    limit = float(torch.cat([one.flatten() for one in scores.values()]).median())
    found = inlay.select(softmax(), rows(), threshold=limit * 1.0001, loss=cross_entropy)
    assert places(found) == {name: (one.flatten() > limit).nonzero().flatten().tolist() for name, one in scores.items()}


def test_only_the_first_batches_are_looked_at_and_a_generator_will_do() -> None:
    found = inlay.select(softmax(), (one for one in rows()), 5, batches=2, loss=cross_entropy)
    assert found == inlay.select(softmax(), rows()[:2], 5, loss=cross_entropy)


def test_no_gradient_is_kept_from_one_batch_to_the_next() -> None:
    held = []

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        held.append([parameter.grad for parameter in model.parameters()])
        return cross_entropy(model, batch)

    inlay.select(softmax(), rows(), 5, loss=loss)
    assert len(held) == 12
    assert all(gradient is None for gradients in held for gradient in gradients)


@pytest.mark.parametrize("score", SCORES)
def test_the_model_is_left_as_it_was(score: str) -> None:
    model = fresh("bert")
    next(model.children()).train()
    next(model.parameters()).requires_grad_(False)
    head = model.get_parameter("classifier.bias")
    head.grad = torch.ones_like(head)
    before, state = snapshot(model), torch.get_rng_state()
    found = inlay.select(model, texts(), 0.05, score=score, search_steps=2)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(head.grad, torch.ones_like(head))
    assert found.count == round(0.05 * sum(p.numel() for n, p in model.named_parameters() if "classifier" not in n))
    assert not [name for name in found.entries if "classifier" in name]
    assert found == inlay.select(model, texts(), 0.05, score=score, search_steps=2)


def test_scope_divides_the_budget_by_size() -> None:
    found = inlay.select(softmax(), budget=6, score="magnitude", scope="tensor")
    assert found.counts() == {"layer.weight": 5, "layer.bias": 1}
    found = inlay.select(softmax(), budget={"layer.bias": 2}, score="magnitude")
    assert found.counts() == {"layer.bias": 2}


@pytest.mark.parametrize(
    ("host", "granularity"),
    [("gpt2", "row"), ("gpt2", "column"), ("llama", "row"), ("llama", "head"), ("bert", "tensor"), ("bert", "head")],
)
def test_groups_are_whole_and_fit(host: str, granularity: str) -> None:
    model = fresh(host)
    targets = "attention"
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    budget, largest = 1600, {"row": 32, "column": 96, "tensor": 3072, "head": 1536}[granularity]
    found = inlay.select(model, budget=budget, score="magnitude", granularity=granularity, targets=targets)
    assert budget - largest < found.count <= budget
    for name in found.entries:
        mask = found.mask(name)
        if mask.dim() == 2 and granularity in ("row", "column"):
            across = (granularity == "column") == (host == "gpt2")  # gpt2 stores (in, out)
            assert torch.equal(mask, mask.any(1 if across else 0, keepdim=True).expand_as(mask))
        elif granularity == "tensor":
            assert found.counts()[name] == sizes[name]


def test_a_head_is_rows_of_the_inputs_and_columns_of_the_output() -> None:
    """llama: 4 query heads of width 8 share 2 key and value heads, so two queries belong to one group."""
    found = inlay.select(fresh("llama"), budget=2 * 16 * 32 + 2 * 8 * 32, score="magnitude", granularity="head")
    (query,) = [name for name in found.entries if "q_proj" in name]
    block = query.removesuffix("q_proj.weight")
    assert {name.removeprefix(block) for name in found.entries} == {f"{letter}_proj.weight" for letter in "qkvo"}
    rows_of_query = found.mask(query).all(1)
    assert rows_of_query.sum() == 16
    assert torch.equal(found.mask(f"{block}o_proj.weight").all(0), rows_of_query)
    assert found.mask(f"{block}k_proj.weight").all(1).sum() == found.mask(f"{block}v_proj.weight").all(1).sum() == 8


def test_tied_parameters_count_once() -> None:
    found = inlay.select(fresh("tied"), budget=1.0, score="random")
    assert set(found.entries) == {"embed.weight", "mix.weight", "mix.bias"}


def test_chance_is_reproducible_and_differs_by_seed() -> None:
    model = fresh("bert")
    for granularity in ("element", "tensor"):
        first, again, other = (
            inlay.select(model, budget=0.1, score="random", granularity=granularity, seed=seed) for seed in (0, 0, 1)
        )
        assert first == again
        assert first != other


def test_scores_of_an_adapted_model_are_those_of_its_base() -> None:
    model = fresh("bert")
    expected = inlay.select(model, texts(), 0.01)
    inlay.attach(model, inlay.LoRA(r=2, init="gaussian"))
    assert inlay.select(model, texts(), 0.01) == expected


# -- searches ----------------------------------------------------------------------------------------------------------


def test_lottery_keeps_what_full_fine_tuning_moved_most() -> None:
    model = build("bert", "sequence", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    found = inlay.select(model, texts(), 100, score="lottery", search_steps=4, search_learning_rate=1e-2)
    trained = fresh_copy(model).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 4)
        trained(**texts()[step % 3]).loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    before = dict(model.named_parameters())
    moved = {name: (value - before[name]).detach().abs() for name, value in trained.named_parameters()}
    assert places(found) == best({name: one for name, one in moved.items() if "classifier" not in name}, 100)
    assert found.values is None


def fresh_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def test_l0_starts_where_the_gated_change_ended() -> None:
    model = fresh("bert")
    found = inlay.select(model, texts(), 50, score="l0", search_steps=4, search_learning_rate=1e-2)
    assert found.values is not None
    method = inlay.SparseDelta(subset=found)
    bits, base = base_bits(model), model(**texts()[0]).logits
    inlay.attach(model, method)
    assert not torch.equal(model(**texts()[0]).logits, base)
    inlay.merge(model)
    for name, mask in ((name, found.mask(name)) for name in found.entries):
        change = (model.get_parameter(name) - fresh("bert").get_parameter(name))[mask].abs()
        assert change.min() > 0
        assert change.max() <= 0.03  # four steps of at most 0.01 each
    inlay.unmerge(model)
    assert base_bits(model) == bits


def gates(alpha: float, whole: float) -> searches.Gates:
    site = next(site for site in inlay.SiteIndex(softmax()).parameters() if site.parameter == "weight")
    body = searches.Gates(site)
    with torch.no_grad():
        body.w.fill_(2.0)
        body.alpha.fill_(alpha)
        body.alpha_whole.fill_(whole)
    return body


def test_gates_are_hard_concrete_and_cost_their_chance_of_being_open() -> None:
    body = gates(0.7, 40.0)
    piece = searches.Gated(body)
    torch.manual_seed(0)
    draws = torch.stack([piece.change() for _ in range(2000)]).detach() / 2
    assert draws.min() == 0
    assert draws.max() == 1
    expected = float(searches.L0([body], 1.0).expected(body).detach()) / body.w.numel()
    # 30,000 draws: a share has a standard error of 0.003
    assert abs(float((draws > 0).float().mean()) - expected) < 0.012
    assert torch.equal(piece.eval().change(), piece.change())
    middle = torch.sigmoid(torch.tensor(0.7)) * 3 - 1.5
    torch.testing.assert_close(piece.change(), 2 * middle.expand_as(body.w))


def test_the_penalty_closes_gates() -> None:
    body = gates(0.0, 5.0)
    loss = searches.L0([body], 0.5).extra_loss()
    assert loss is not None
    loss.backward()
    assert body.alpha.grad is not None
    assert bool((body.alpha.grad > 0).all())
    assert searches.L0([], 0.5).extra_loss() is None


# -- plain data --------------------------------------------------------------------------------------------------------


def test_a_subset_comes_back_from_its_file(tmp_path: Path) -> None:
    found = inlay.select(fresh("bert"), budget=0.2, score="magnitude", granularity="tensor")
    again = Subset.read(found.save(tmp_path / "below" / "subset.safetensors"))
    assert again == found
    assert (again.base, again.made) == (found.base, found.made)
    assert again.made["granularity"] == "tensor"
    element = inlay.select(fresh("bert"), texts(), 30, score="l0", search_steps=2)
    again = Subset.read(element.save(tmp_path / "subset.safetensors"))
    assert again == element
    assert again.values is not None
    assert element.values is not None
    assert all(torch.equal(again.values[name], value) for name, value in element.values.items())
    assert inlay.SparseDelta(subset=str(tmp_path / "subset.safetensors")).subset == element


def test_a_subset_of_another_base_is_refused(tmp_path: Path) -> None:
    found = inlay.select(fresh("bert"), budget=20, score="magnitude")
    other = fresh("bert")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    before = snapshot(other)
    with pytest.raises(BaseModelError, match="this subset was made for another base model: the weights"):
        inlay.attach(other, inlay.SparseDelta(subset=found))
    with pytest.raises(BaseModelError, match="no such parameter here"):
        inlay.attach(fresh("llama"), inlay.SparseDelta(subset=found))
    assert snapshot(other) == before
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no subset can be read"):
        inlay.SparseDelta(subset=str(tmp_path / "no.safetensors"))


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"score": "fischer"}, ConfigError, "did you mean 'fisher'"),
        ({"granularity": "rows"}, ConfigError, "did you mean 'row'"),
        ({"budget": 0}, ConfigError, "whole number from 1"),
        ({"budget": 1.5}, ConfigError, "their share"),
        ({"budget": 10**9}, ConfigError, "give 1 to"),
        ({"budget": None}, ConfigError, "not both"),
        ({"threshold": 1.0}, ConfigError, "not both"),
        ({"batches": 0}, ConfigError, "at least 1"),
        ({"data": None}, ConfigError, "has to see data"),
        ({"data": []}, DataError, "no batch"),
        ({"data": [{"input_ids": torch.tensor([[3, 4]])}]}, DataError, "gives no loss"),
        ({"targets": "qery"}, TargetError, "qery"),
        ({"granularity": "tensor", "score": "random", "budget": 3}, ConfigError, "no tensor is within it"),
    ],
)
def test_what_cannot_be_used_is_an_error_before_anything_changes(
    fields: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = fresh("bert")
    before = snapshot(model)
    given: dict[str, Any] = {"data": texts(), "budget": 10, **fields}
    with pytest.raises(error, match=words):
        inlay.select(model, **given)
    assert snapshot(model) == before


def test_quantised_weights_are_refused() -> None:
    model = softmax()
    model.layer.weight = nn.Parameter(torch.ones(CLASSES, FEATURES, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"layer.weight holds torch.int8 codes.*such as LoRA"):
        inlay.select(model, budget=3, score="random")


def test_progress_is_told_and_batches_repeat() -> None:
    said: list[str] = []
    model = softmax()
    batches = Batches(rows(), cross_entropy, said.append)
    assert len(list(batches.repeated(model, 7, "again"))) == 7
    assert len(list(batches.first(model, 7, "once"))) == 3
    assert len(list(batches.examples(model, 2, "one by one"))) == 8
