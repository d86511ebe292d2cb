"""Several adapters in one model, and the three states that nothing but their own verb may change."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from properties.models import base_bits, base_output, close, fresh, gradients, output, perturb, snapshot
from safetensors.torch import load_file
from torch import nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.engine.host import hosted
from inlay.engine.piece import Method

LORA = inlay.LoRA(r=2, targets="all-linear")
CHANGES: dict[str, Method] = {
    "lora": LORA,
    "dora": inlay.DoRA(r=2, targets="attention,ffn"),
    "ia3": inlay.IA3(),
    "bitfit": inlay.BitFit(),
    "layer_norm": inlay.LayerNormTuning(),
    "freezing": inlay.PartialFineTuning(top_k=1),
    "heads": inlay.PartialFineTuning(heads={0: [1]}),
    "full": inlay.FullFineTuning(),
}
LAYERS: dict[str, Method] = {
    "adapter": inlay.Adapter(activation="gelu"),
    "prompt_tuning": inlay.PromptTuning(num_virtual_tokens=2),
    "prefix_tuning": inlay.PrefixTuning(num_virtual_tokens=2),
}
PAIRS = [(a, b) for a in CHANGES for b in CHANGES if a < b]


def two(host: str, first: Method, second: Method) -> nn.Module:
    """A host with two perturbed adapters, "default" and "law"."""
    model = inlay.attach(fresh(host), first)
    inlay.attach(model, second, name="law")
    return perturb(perturb(model), "law")


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}


# -- two at once -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_two_methods_at_once_merge_to_what_they_compute_in_both_orders(names: tuple[str, str]) -> None:
    model = two("bert", CHANGES[names[0]], CHANGES[names[1]])
    before, outputs = base_bits(model), []
    for order in (("default", "law"), ("law", "default")):
        inlay.activate(model, *order)
        outputs.append(output(model, "bert"))
        inlay.merge(model)
        close(output(model, "bert"), outputs[-1], 1e-5)
        inlay.unmerge(model)
        assert base_bits(model) == before
        assert torch.equal(output(model, "bert"), outputs[-1])
    inlay.detach(model)
    assert torch.equal(output(model.requires_grad_(False), "bert"), base_output("bert"))


def test_the_order_of_activation_is_the_order_of_composition() -> None:
    """By hand, on one linear: W' = m · (W + sBA) / ‖W + sBA‖ of the inner adapter is the W of the outer."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    inlay.attach(model, inlay.DoRA(r=2, targets="0"))
    inlay.attach(model, inlay.LoRA(r=2, targets="0"), name="law")
    perturb(perturb(model), "law")
    dora, lora = (next(adapters_of(model).get(name).pieces())[1] for name in ("default", "law"))

    def of_dora(weight: torch.Tensor) -> torch.Tensor:
        changed = weight + 16 / 2 * dora.lora_B @ dora.lora_A
        return dora.magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)

    def of_lora(weight: torch.Tensor) -> torch.Tensor:
        return weight + 16 / 2 * lora.lora_B @ lora.lora_A

    x, weight = torch.randn(3, 6), model[0].weight
    orders: dict[tuple[str, ...], torch.Tensor] = {
        ("default", "law"): of_lora(of_dora(weight)),
        ("law", "default"): of_dora(of_lora(weight)),
    }
    for order, expected in orders.items():
        inlay.activate(model, *order)
        torch.testing.assert_close(model(x), x @ expected.T)
    assert not torch.allclose(*orders.values())


@pytest.mark.parametrize("host", ["bert", "llama", "t5"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_and_changes_of_weights_stand_beside_each_other(name: str, host: str) -> None:
    model = two(host, LAYERS[name], LORA)
    both = output(model, host)
    with inlay.using(model, "law"):
        one = output(model, host)
    with inlay.disabled(model):
        assert torch.equal(output(model, host), base_output(host))
    inlay.detach(model, "default")
    assert torch.equal(output(model, host), one)
    assert not torch.equal(one, both)


@pytest.mark.parametrize("name", LAYERS)
def test_two_layers_of_one_kind_run_at_once(name: str) -> None:
    for host in ("bert", "llama", "t5"):
        model = two(host, LAYERS[name], LAYERS[name])
        both = output(model, host)
        with inlay.using(model, "law"):
            assert not torch.equal(output(model, host), both)
        inlay.detach(model)
        assert torch.equal(output(model.requires_grad_(False), host), base_output(host))


def test_methods_in_one_adapter_train_save_and_load_together(tmp_path: Path) -> None:
    methods = [LORA, inlay.BitFit(), inlay.Adapter(activation="gelu"), inlay.PrefixTuning(num_virtual_tokens=2)]
    model = perturb(inlay.attach(fresh("bert"), methods, modules_to_save=["classifier", "pooler"]))
    own = {id(parameter) for parameter in adapters_of(model).get("default").parameters()}
    assert {name for name, p in model.named_parameters() if id(p) in own} == set(gradients(model, "bert"))
    inlay.save(model, tmp_path)
    assert torch.equal(output(inlay.load(fresh("bert"), tmp_path), "bert"), output(model, "bert"))


def test_each_adapter_has_its_own_head() -> None:
    model = two("bert", LORA, inlay.IA3())
    heads = []
    for name in ("default", "law"):
        with inlay.using(model, name):
            heads.append(model.classifier.weight.detach().clone())
    with inlay.disabled(model):
        heads.append(model.classifier.weight.detach().clone())
    assert len({head.numpy().tobytes() for head in heads}) == 3


# -- what no verb but its own changes ----------------------------------------------------------------------------------


def _save(model: nn.Module, folder: Path) -> None:
    inlay.save(model, folder)


def _load(model: nn.Module, folder: Path) -> None:
    inlay.save(model, folder)
    inlay.load(model, folder, name="third")
    inlay.detach(model, "third")


def _disabled(model: nn.Module, folder: Path) -> None:
    before = flags(model)
    with inlay.disabled(model):
        assert flags(model) == before
        output(model, "bert")


def _using(model: nn.Module, folder: Path) -> None:
    with inlay.using(model, "law"), inlay.using(model, "default"):
        output(model, "bert")


def _error_inside(model: nn.Module, folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), inlay.disabled(model):
        raise ZeroDivisionError


def _merge(model: nn.Module, folder: Path) -> None:
    inlay.unmerge(inlay.merge(inlay.merge(model)))


def _third(model: nn.Module, folder: Path) -> None:
    inlay.attach(model, inlay.IA3(), name="third")
    inlay.detach(model, "third")


def _calls(model: nn.Module, folder: Path) -> None:
    model.train()
    output(model, "bert")
    model.eval()
    inlay.summary(model)
    inlay.controllers(model)
    copy.deepcopy(model)


ACTIONS = [_save, _load, _disabled, _using, _error_inside, _merge, _third, _calls]


@pytest.mark.parametrize("trained", [("default",), ("law",), (), ("default", "law")], ids="+".join)
@pytest.mark.parametrize("act", ACTIONS, ids=lambda act: act.__name__.strip("_"))
def test_nothing_but_trainable_changes_what_is_trainable(
    act: Callable[[nn.Module, Path], None], trained: tuple[str, ...], tmp_path: Path
) -> None:
    model = two("bert", LORA, inlay.BitFit())
    inlay.trainable(model, *trained)
    inlay.activate(model, "law", "default")
    before, expected = snapshot(model), output(model, "bert")
    act(model, tmp_path / "adapter")
    assert snapshot(model) == before
    assert inlay.active(model) == ("law", "default")
    assert torch.equal(output(model, "bert"), expected)


def test_trainable_and_active_are_apart() -> None:
    model = two("bert", LORA, inlay.BitFit())
    inlay.trainable(model, "default")
    inlay.activate(model, "law")
    assert not any("law" in name.split(".") for name, required in flags(model).items() if required)
    output(model, "bert")
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradients(model, "bert")


@pytest.mark.parametrize("method", [*CHANGES.values(), *LAYERS.values()], ids=[*CHANGES, *LAYERS])
def test_an_eval_model_stays_in_eval_and_a_mixed_one_mixed(method: Method, tmp_path: Path) -> None:
    model = fresh("bert")
    inlay.attach(model, method)
    assert not any(module.training for module in model.modules())
    inlay.save(model, tmp_path)
    inlay.load(model, tmp_path, name="law")
    assert not any(module.training for module in model.modules())
    inlay.detach(model)
    model.train()
    model.bert.encoder.layer[0].eval()
    before = {path: module.training for path, module in model.named_modules()}
    inlay.attach(model, method)
    after = {path: module.training for path, module in model.named_modules()}
    assert {path: after[path] for path in before} == before
    assert all(module.training for module in model.bert.encoder.layer[1].modules())
    assert not any(module.training for module in model.bert.encoder.layer[0].modules())


# -- nothing is left ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*CHANGES.values(), *LAYERS.values()], ids=[*CHANGES, *LAYERS])
def test_attaching_and_detaching_many_times_leaves_nothing(method: Method) -> None:
    model = fresh("bert")
    before = snapshot(model)

    def once() -> None:
        inlay.attach(model, method)
        output(model, "bert")
        inlay.detach(model)

    once()  # caches of torch and transformers fill
    classes = hosted.cache_info().currsize
    gc.collect()
    gc.freeze()  # what exists by now is not looked at again
    try:
        for _ in range(5):
            once()
        gc.collect()
        left = [type(found) for found in gc.get_objects()]
    finally:
        gc.unfreeze()
    assert not [kind for kind in left if issubclass(kind, (inlay.Piece, torch.Tensor))]
    assert hosted.cache_info().currsize == classes
    assert snapshot(model) == before


def test_detaching_in_any_order_leaves_the_others_as_they_are() -> None:
    model = two("llama", LORA, inlay.PrefixTuning(num_virtual_tokens=2))
    inlay.attach(model, inlay.IA3(), name="third")
    before = None
    for gone, left in (("law", ("default", "third")), ("default", ("third",))):
        with inlay.using(model, *left):
            before = output(model, "llama")
        inlay.detach(model, gone)
        assert inlay.active(model) == left
        assert torch.equal(output(model, "llama"), before)
    inlay.detach(model, "third")
    assert torch.equal(output(model.requires_grad_(False), "llama"), base_output("llama"))


def test_an_adapter_detached_while_others_are_used_does_not_come_back() -> None:
    model = two("bert", LORA, inlay.BitFit())
    with inlay.using(model, "law"):
        inlay.detach(model, "default")
    assert inlay.active(model) == ("law",)
    with inlay.disabled(model):
        inlay.detach(model)
    assert torch.equal(output(model.requires_grad_(False), "bert"), base_output("bert"))


# -- merged ------------------------------------------------------------------------------------------------------------


def test_a_merged_model_saves_the_adapter_that_was_merged(tmp_path: Path) -> None:
    model = perturb(inlay.attach(fresh("bert"), [LORA, inlay.BitFit()]))
    expected = output(model, "bert")
    inlay.save(model, tmp_path / "before")
    inlay.merge(model)
    inlay.save(model, tmp_path / "merged")
    before, merged = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "merged"))
    assert before.keys() == merged.keys()
    assert all(torch.equal(before[key], merged[key]) for key in before)
    assert torch.equal(output(inlay.load(fresh("bert"), tmp_path / "merged"), "bert"), expected)


def test_a_copy_of_a_merged_model_unmerges_by_itself() -> None:
    model = perturb(inlay.attach(fresh("bert"), LORA))
    before = base_bits(model)
    inlay.merge(model)
    other = copy.deepcopy(model)
    inlay.unmerge(other)
    assert base_bits(other) == before
    assert base_bits(model) != before
    inlay.detach(model)
    assert torch.equal(output(model.requires_grad_(False), "bert"), base_output("bert"))
