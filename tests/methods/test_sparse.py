"""Chosen entries, trained: the others keep their bits whatever the optimiser does, and files hold just the chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from properties.models import base_bits, bits, close, fresh, gradients, output, perturb
from safetensors.torch import load_file, save_file
from torch import nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.errors import CheckpointError, ConfigError
from inlay.pieces.subsets.sparse import SparseLinear, SparseParameter
from inlay.pieces.subsets.subset import Subset

HOSTS = ("bert", "gpt2", "tied", "conv")


def some(model: nn.Module, budget: float = 0.1, granularity: str = "element") -> Subset:
    return inlay.select(model, budget=budget, score="random", granularity=granularity)


def optimisers(model: nn.Module) -> list[torch.optim.Optimizer]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5),
        torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.5),
    ]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_that_were_not_chosen_keep_their_bits(host: str, dtype: torch.dtype) -> None:
    model = fresh(host).to(dtype)
    model.get_parameter(next(name for name, _ in model.named_parameters())).data[0] = -0.0  # the bits of zero too
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    subset = some(model)
    inlay.attach(model, inlay.SparseDelta(subset=subset), modules_to_save=[])
    for optimizer in optimisers(model):
        for _ in range(2):
            gradients(model, host)
            optimizer.step()
    inlay.merge(model, keep_base=False)
    changed = 0
    for name, value in model.named_parameters():
        kept = ~subset.mask(name) if name in subset.entries else torch.ones_like(value, dtype=torch.bool)
        assert bits(value[kept]) == bits(before[name][kept])
        changed += int((value != before[name]).sum())
    # In bfloat16 a change may be lost to rounding, and tokens that are not there have no gradient.
    assert changed > subset.count * (0.9 if host == "conv" and dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("granularity", ["element", "row", "tensor"])
def test_gradients_are_those_of_the_whole_at_the_entries(host: str, granularity: str) -> None:
    whole = gradients(fresh(host), host)
    model = fresh(host)
    subset = some(model, 0.3, granularity)
    inlay.attach(model, inlay.SparseDelta(subset=subset), modules_to_save=[])
    gradients(model, host)
    found = 0
    for site, piece in adapters_of(model).get("default").pieces():
        name = f"{site.name}.weight" if site.parameter is None else site.name
        if name not in subset.entries:  # the other place of a tied parameter
            continue
        expected = whole[name][subset.mask(name)]
        if isinstance(piece, SparseLinear):
            if site.transposed:
                expected = whole[name].t()[subset.mask(name).t()]
            gradient = piece.shira_weight.grad  # type: ignore[union-attr]
        else:
            assert isinstance(piece, SparseParameter)
            gradient = piece.entries.values.grad  # type: ignore[union-attr]
        assert gradient is not None
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)  # fp32 sums in another order
        found += len(gradient)
    assert found == subset.count


def test_tied_parameters_change_together() -> None:
    model = perturb(inlay.attach(fresh("tied"), inlay.SparseDelta(score="random", budget=0.5)))
    assert torch.equal(model.embed.weight, model.unembed.weight)
    assert not torch.equal(model.embed.weight, fresh("tied").embed.weight)


def test_adapters_of_subsets_that_do_not_meet_add_up() -> None:
    model = fresh("bert")
    first = inlay.select(model, budget=300, score="random")
    others = {name: (~first.mask(name)).flatten().nonzero().flatten()[:5] for name in list(first.entries)[:4]}
    second = Subset(others, {name: first.shapes[name] for name in others}, first.base)
    for name, subset in (("a", first), ("b", second)):
        inlay.attach(model, inlay.SparseDelta(subset=subset), name=name, modules_to_save=[])
        perturb(model, name)
    both = output(model, "bert")
    inlay.merge(model)
    close(output(model, "bert"), both, 1e-5)
    for name in others:
        path, _, parameter = name.rpartition(".")
        change = (getattr(model.get_submodule(path), parameter) - fresh("bert").get_parameter(name)) != 0
        assert torch.equal(change, first.mask(name) | second.mask(name))


def test_a_choice_from_data_asks_for_it_and_prepare_makes_it() -> None:
    model = fresh("bert")
    with pytest.raises(ConfigError, match=r"SparseDelta\(score='fisher'\) has to see data.*prepare\(model, batches\)"):
        inlay.attach(model, inlay.SparseDelta())
    batches = [{"input_ids": torch.randint(3, 64, (2, 7)), "labels": torch.tensor([0, 1])}]
    method = inlay.SparseDelta(budget=40, targets="query").prepare(model, batches)
    assert not method.wants_data
    inlay.attach(model, method, modules_to_save=[])
    assert inlay.summary(model).trainable_parameters == 40
    assert method.subset == inlay.select(fresh("bert"), batches, 40, targets="query")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "whole number from 1"),
        ({"r": 2, "threshold": 0.1}, "no threshold beside it"),
        ({"budget": -1}, "a number of entries"),
        ({"score": "fish"}, "did you mean 'fisher'"),
        ({"overrides": {"query": {"budget": 3}}}, "leave overrides out"),
    ],
)
def test_fields_that_cannot_be_used(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        inlay.SparseDelta(**fields)


def test_more_than_a_weight_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a budget of 1280 for .* which has 1,024 entries"):
        inlay.attach(fresh("bert"), inlay.SparseDelta(score="random", r=20, targets="query"))


# -- APET --------------------------------------------------------------------------------------------------------------


def test_apet_draws_exactly_n_entries_or_at_most_n_in_tensors() -> None:
    sizes = [parameter.numel() for name, parameter in fresh("bert").named_parameters() if "classifier" not in name]
    for budget in (97, 1000, 5000):
        model = inlay.attach(fresh("bert"), inlay.APET(budget=budget), modules_to_save=[])
        assert inlay.summary(model).trainable_parameters == budget
        model = inlay.attach(fresh("bert"), inlay.APET(budget=budget, granularity="tensor"), modules_to_save=[])
        assert budget - max(sizes) <= inlay.summary(model).trainable_parameters <= budget


def test_apet_of_one_seed_is_one_adapter() -> None:
    def drawn(seed: int) -> Subset:
        found = inlay.APET(budget=500, granularity="tensor", seed=seed).prepare(fresh("bert"), None).subset
        assert isinstance(found, Subset)
        return found

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_apet_in_tensors_trains_like_copies_of_them() -> None:
    model = inlay.attach(fresh("bert"), inlay.APET(budget=500, granularity="tensor"), modules_to_save=[])
    whole = gradients(fresh("bert"), "bert")
    for site, piece in adapters_of(model).get("default").pieces():
        if piece.count:
            assert piece.count == site.weight.numel()
    found = {name.replace(".inlays.default", ""): value for name, value in gradients(model, "bert").items()}
    for name, value in found.items():
        place = name.partition(".apet")[0] + "." + (name.partition(".apet_")[2].partition(".")[0] or "weight")
        torch.testing.assert_close(value, whole[place].flatten(), rtol=1e-4, atol=1e-5)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_has_the_entries_and_their_places_and_no_more(tmp_path: Path) -> None:
    model = fresh("bert")
    subset = some(model, 0.01)
    perturb(inlay.attach(model, inlay.SparseDelta(subset=subset), modules_to_save=[]))
    inlay.save(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    values = {key: value for key, value in tensors.items() if value.is_floating_point()}
    assert sum(value.numel() for value in values.values()) == subset.count
    assert len(tensors) == 2 * len(subset.entries)
    loaded = inlay.load(fresh("bert"), tmp_path)
    assert torch.equal(output(loaded, "bert"), output(model, "bert"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (method,) = config["auto_mapping"]["inlay"]["methods"]
    assert (method["kind"], method["subset"], config["peft_type"]) == ("sparse", None, "INLAY")


@pytest.mark.parametrize("damage", ["outside", "negative", "twice"])
def test_damaged_places_are_refused(tmp_path: Path, damage: str) -> None:
    model = inlay.attach(fresh("bert"), inlay.SparseDelta(subset=some(fresh("bert"), 0.05)))
    inlay.save(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    for ending in ("shira_indices", "sparse_indices"):
        tensors = load_file(path)
        key = next(key for key, value in tensors.items() if key.endswith(ending) and value.shape[-1] > 1)
        where = tensors[key].clone()
        where[..., 0] = {"outside": 10**6, "negative": -1, "twice": where[..., 1]}[damage]
        damaged = tmp_path / f"{damage}-{ending}"
        damaged.mkdir()
        (damaged / "adapter_config.json").write_text((tmp_path / "adapter_config.json").read_text())
        save_file({**tensors, key: where}, damaged / path.name)
        before = base_bits(target := fresh("bert"))
        with pytest.raises(CheckpointError, match="outside the weight, or one twice"):
            inlay.load(target, damaged)
        assert base_bits(target) == before


def test_r_entries_in_each_weight_are_a_shira_of_hf_peft(tmp_path: Path) -> None:
    model = inlay.attach(fresh("bert"), inlay.SparseDelta(score="magnitude", r=2, targets="query"), modules_to_save=[])
    inlay.save(perturb(model), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("SHIRA", 2)
    del config["auto_mapping"]  # as peft would have written it
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = inlay.load(fresh("bert"), tmp_path)
    assert isinstance(adapters_of(loaded).get("default").methods[0], inlay.SHiRA)
    assert torch.equal(output(loaded, "bert"), output(model, "bert"))
    inlay.attach(model, inlay.SparseDelta(score="magnitude", budget=100, targets="query"), name="other")
    inlay.save(model, tmp_path / "other", name="other")
    assert json.loads((tmp_path / "other" / "adapter_config.json").read_text())["peft_type"] == "INLAY"
