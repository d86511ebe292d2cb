"""hot_swap: a folder's values into a loaded adapter, in place, or nothing at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engine import tiny
from engine.small import IDS, Net, adapted, randomise
from torch import nn
from torch._dynamo.utils import counters

import inlay
from inlay.engine.adapters import adapters_of
from inlay.engine.hot_swap import hot_swap
from inlay.errors import AdapterError, BaseModelError, CheckpointError, InlayError

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""A scale that is folded into B is rounded once more."""
PLACES = "first,second"


def net(method: Any = None, seed: int = 1) -> nn.Module:
    return adapted(seed, method or inlay.LoRA(r=4, alpha=3, targets=PLACES))


def stored(folder: Path, method: Any, seed: int = 9) -> tuple[Path, torch.Tensor]:
    """An adapter in a folder, and what the model computes with it."""
    model = adapted(seed, method)
    return inlay.save(model, folder), model(IDS)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that could change: objects, values, flags."""
    named = model.named_parameters()
    return {name: (id(p), p.data_ptr(), p.requires_grad, p.detach().tolist()) for name, p in named}


METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: inlay.LoRA(r=4, alpha=3, targets=PLACES),
    "dora": lambda: inlay.DoRA(r=4, targets=PLACES),
    "ia3": lambda: inlay.IA3(targets=PLACES, feedforward=("second",)),
    "adapter": lambda: inlay.Adapter(bottleneck=3, targets=PLACES),
    "pissa": lambda: inlay.LoRA(r=2, init="pissa", targets=PLACES),
    "a bias too": lambda: inlay.LoRA(r=2, bias="all", targets=PLACES),
    "a table": lambda: inlay.LoRA(r=2, targets="table"),
    "several": lambda: [inlay.LoRA(r=2, targets="first"), inlay.IA3(targets="second", feedforward=())],
    "frozen A": lambda: inlay.LoRA(r=2, freeze_a=True, targets=PLACES),
}


@pytest.mark.parametrize("kind", METHODS)
def test_the_model_computes_what_the_folder_says(tmp_path: Path, kind: str) -> None:
    folder, expected = stored(tmp_path / "new", METHODS[kind]())
    model = net(METHODS[kind]())
    before = snapshot(model)
    assert not torch.allclose(model(IDS), expected, atol=1e-3)
    assert hot_swap(model, folder) is model
    torch.testing.assert_close(model(IDS), expected, **CLOSE)
    after = snapshot(model)
    assert {name: entry[:3] for name, entry in after.items()} == {name: entry[:3] for name, entry in before.items()}
    assert all(after[name] == before[name] for name in before if ".inlays." not in name)


@pytest.mark.parametrize("method", [inlay.LoRA, inlay.DoRA])
@pytest.mark.parametrize(
    "fields", [{"r": 1}, {"r": 3, "alpha": 20}, {"r": 4, "alpha": 0.5}, {"r": 2, "rank_stabilised": True}]
)
def test_lower_ranks_and_other_scales(tmp_path: Path, method: Any, fields: dict[str, Any]) -> None:
    folder, expected = stored(tmp_path / "new", method(targets=PLACES, **fields))
    model = net(method(r=4, alpha=3, targets=PLACES))
    hot_swap(model, folder)
    torch.testing.assert_close(model(IDS), expected, **CLOSE)
    assert model.first.inlays.default[method.kind].lora_A.shape[0] == 4  # type: ignore[union-attr, index]


def test_lower_ranks_with_a_bias_on_b_and_on_a_table(tmp_path: Path) -> None:
    for number, fields in enumerate([{"lora_bias": True, "targets": PLACES}, {"targets": "table"}]):
        folder, expected = stored(tmp_path / str(number), inlay.LoRA(r=2, alpha=7, **fields))
        model = net(inlay.LoRA(r=3, alpha=2, **fields))
        torch.testing.assert_close(hot_swap(model, folder)(IDS), expected, **CLOSE)


def test_what_is_active_and_trainable_stays(tmp_path: Path) -> None:
    folder, _ = stored(tmp_path / "new", METHODS["lora"]())
    model = net()
    inlay.attach(model, inlay.LoRA(r=1, targets="first"), "other")
    randomise(model, "other")
    inlay.activate(model, "other")
    inlay.trainable(model, "other")
    before, others = model(IDS), [p.clone() for p in adapters_of(model).get("other").parameters()]
    hot_swap(model, folder)
    assert torch.equal(model(IDS), before)
    assert inlay.active(model) == ("other",)
    assert [p.requires_grad for p in adapters_of(model).get("default").parameters()] == [False] * 4
    for parameter, value in zip(adapters_of(model).get("other").parameters(), others, strict=True):
        assert torch.equal(parameter, value)


def test_a_head_of_its_own(tmp_path: Path) -> None:
    x = torch.randint(3, 60, (2, 6))
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = inlay.attach(tiny.build("bert", "sequence"), inlay.LoRA(r=2))
        randomise(model)
        models.append(model)
    folder = inlay.save(models[0], tmp_path / "head")
    hot_swap(models[1], folder)
    assert torch.equal(models[1](x).logits, models[0](x).logits)


@pytest.mark.parametrize("fields", [{"r": 4, "lora_alpha": 3}, {"r": 2, "lora_alpha": 5, "use_rslora": True}])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks by the old name
def test_files_of_peft(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    x = torch.randint(3, 60, (2, 6))
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], use_dora=kind == "dora", **fields)
    theirs = peft.get_peft_model(tiny.build("llama", "causal"), config)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(str(tmp_path))
    method = {"lora": inlay.LoRA, "dora": inlay.DoRA}[kind](r=4, alpha=9)
    model = inlay.attach(tiny.build("llama", "causal"), method)
    randomise(model)
    hot_swap(model, tmp_path)
    torch.testing.assert_close(model(x).logits, theirs.eval()(x).logits, **CLOSE)


# -- what goes on ------------------------------------------------------------------------------------------------------


def test_an_optimiser_goes_on(tmp_path: Path) -> None:
    folder, expected = stored(tmp_path / "new", METHODS["lora"]())
    model = net()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    hot_swap(model, folder)
    model(IDS).sum().backward()
    optimiser.step()
    assert not torch.allclose(model(IDS), expected, atol=1e-3)


@pytest.mark.parametrize("grad", [True, False])
def test_banks_go_on(tmp_path: Path, grad: bool) -> None:
    folder, _ = stored(tmp_path / "new", inlay.LoRA(r=2, targets=PLACES))
    model = net()
    inlay.attach(model, inlay.LoRA(r=4, targets=PLACES), "other")
    randomise(model, "other")
    rows = ["default", "other"]
    with torch.set_grad_enabled(grad):
        with inlay.per_row(model, rows):
            for _ in range(3):
                before = model(IDS)
            hot_swap(model, folder)
            found = [model(IDS), model(IDS)]
        expected = []
        for number, name in enumerate(rows):
            with inlay.using(model, name):
                expected.append(model(IDS[number : number + 1]))
    for y in found:
        torch.testing.assert_close(y, torch.cat(expected), **CLOSE)
    assert not torch.allclose(before[0], found[0][0], atol=1e-3)
    torch.testing.assert_close(found[0][1], before[1], **CLOSE)


@pytest.mark.parametrize("switching", [True, False])
def test_a_compiled_model_is_not_compiled_again(tmp_path: Path, switching: bool) -> None:
    folder, expected = stored(tmp_path / "new", inlay.LoRA(r=2, alpha=7, targets=PLACES))
    model = net()
    if switching:
        inlay.switchable(model)
    torch.compiler.reset()
    counters.clear()
    fast = torch.compile(model, fullgraph=True, backend="eager")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            fast(IDS)
    compiled = counters["stats"]["unique_graphs"]
    hot_swap(model, folder)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(fast(IDS), expected, **CLOSE)
    assert counters["stats"]["unique_graphs"] == compiled
    torch.compiler.reset()


# -- what is refused ---------------------------------------------------------------------------------------------------

MISFITS: dict[str, tuple[Any, str]] = {
    "another method": (inlay.IA3(targets=PLACES, feedforward=()), r"holds IA3, and adapter 'default' is LoRA"),
    "one more": ([METHODS["lora"](), inlay.IA3(targets="first", feedforward=())], r"holds LoRA, IA3, and adapter"),
    "fewer places": (inlay.LoRA(r=2, targets="first"), r"at 1 places, and .* at 2: second is in the loaded"),
    "more places": (inlay.LoRA(r=2, targets="table,first,second"), r"table is in the file only"),
    "a higher rank": (inlay.LoRA(r=5, targets=PLACES), r"at first, its lora_A is \(5, 8\), which does not fit"),
    "a bias on B": (inlay.LoRA(r=4, lora_bias=True, targets=PLACES), r"at first, it has lora_A, lora_B, lora_bias"),
    "factors of W": (inlay.LoRA(r=4, init="pissa", targets=PLACES), r"start_A"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_changes_nothing(tmp_path: Path, misfit: str) -> None:
    method, message = MISFITS[misfit]
    folder, _ = stored(tmp_path / "new", method)
    _refused(net(), folder, CheckpointError, message)


def _refused(model: nn.Module, folder: Path, error: type[InlayError], message: str, name: str = "default") -> None:
    before, output, modules = snapshot(model), model(IDS), list(model.named_modules())
    with pytest.raises(error, match=message):
        hot_swap(model, folder, name)
    assert snapshot(model) == before
    assert list(model.named_modules()) == modules
    assert torch.equal(model(IDS), output)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    folder, _ = stored(tmp_path / "new", inlay.Adapter(bottleneck=3, targets=PLACES, scale=2.0))
    slot = net(inlay.Adapter(bottleneck=3, targets=PLACES))
    _refused(slot, folder, CheckpointError, r"its bottleneck.scale is 2.0, and 1.0 here")
    wide, _ = stored(tmp_path / "wide", inlay.Adapter(bottleneck=5, targets=PLACES))
    _refused(slot, wide, CheckpointError, r"its bottleneck.down.weight is \(5, 12\), and \(3, 12\) here")


def test_the_last_place_is_looked_at_before_the_first_is_written(tmp_path: Path) -> None:
    folder, _ = stored(tmp_path / "new", inlay.LoRA(r=2, targets=PLACES, overrides={"second": {"r": 7}}))
    _refused(net(), folder, CheckpointError, r"at second, its lora_A is \(7, 12\)")


def test_another_base_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = inlay.attach(Net(seed=4), inlay.LoRA(r=4, targets=PLACES))
    folder = inlay.save(other, tmp_path / "new")
    model = net()
    _refused(model, folder, BaseModelError, "another base model")
    hot_swap(model, folder, strict=False)


def test_files_that_are_damaged_or_missing(tmp_path: Path) -> None:
    _refused(net(), tmp_path / "none", CheckpointError, "there is no folder")
    folder, _ = stored(tmp_path / "new", METHODS["lora"]())
    config = json.loads((folder / "adapter_config.json").read_text())
    config["r"] = 3
    (folder / "adapter_config.json").write_text(json.dumps(config))
    _refused(net(), folder, CheckpointError, "edited by hand")
    (folder / "adapter_model.safetensors").write_bytes(b"12345678")
    _refused(net(), folder, CheckpointError, "damaged")


def test_unknown_names_and_merged_models(tmp_path: Path) -> None:
    folder, _ = stored(tmp_path / "new", METHODS["lora"]())
    model = net()
    _refused(model, folder, AdapterError, "did you mean 'default'", "defualt")
    inlay.merge(model)
    with pytest.raises(AdapterError, match="unmerge"):
        hot_swap(model, folder)
