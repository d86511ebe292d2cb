"""Defects that users of HF peft 0.21 suffer, each shown not to exist here. The numbers are its issues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from properties.models import base_bits, base_output, close, fresh, gradients, output, perturb, snapshot
from safetensors.torch import load_file
from torch import nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.errors import AdapterError, InlayError, TargetError

LORA = inlay.LoRA(r=2, targets="all-linear")


@pytest.mark.parametrize("method", [LORA, inlay.DoRA(r=2), inlay.IA3()], ids=lambda method: method.kind)
def test_two_adapters_merged_differ_from_unmerged(method: inlay.Method) -> None:
    """There C3A overwrites its input after the first adapter, and OFT merges two in the other order."""
    model = inlay.attach(fresh("llama"), method)
    perturb(perturb(inlay.attach(model, method, name="law")), "law")
    expected = output(model, "llama")
    close(output(inlay.merge(model), "llama"), expected, 1e-5)


def test_disable_adapter_unfreezes() -> None:
    """There leaving `disable_adapter()` makes an adapter loaded for inference trainable."""
    model = inlay.attach(fresh("bert"), LORA)
    inlay.trainable(model)
    for _ in range(2):
        with inlay.disabled(model):
            assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_dropout_is_active_in_an_eval_model() -> None:
    """There wrapping a model in eval mode leaves the new dropout layers in training mode."""
    model = perturb(inlay.attach(fresh("bert"), inlay.LoRA(r=2, dropout=0.9)))
    assert torch.equal(output(model, "bert"), output(model, "bert"))
    model.train()
    assert not torch.equal(output(model, "bert"), output(model, "bert"))


def test_dropout_is_active_in_an_adapter_loaded_into_an_eval_model(tmp_path: Path) -> None:
    """#3766."""
    model = perturb(inlay.attach(fresh("bert"), inlay.LoRA(r=2, dropout=0.9)))
    inlay.save(model, tmp_path)
    assert torch.equal(output(inlay.load(fresh("bert"), tmp_path, trainable=True), "bert"), output(model, "bert"))


@pytest.mark.parametrize("field", ["targets", "exclude", "overrides"])
def test_a_misspelt_name_beside_a_valid_one_is_ignored(field: str) -> None:
    """#1959, #3554: there half of a model is silently left out."""
    model = fresh("bert")
    before = snapshot(model)
    names = ["query", "valeu"]
    given = {name: {"r": 4} for name in names} if field == "overrides" else names
    targets = {} if field == "targets" else {"targets": "query,value"}
    with pytest.raises(TargetError, match=r"valeu.*did you mean 'value'"):
        inlay.attach(model, inlay.LoRA(**targets, **{field: given}))
    assert snapshot(model) == before


@pytest.mark.parametrize("host", ["bert", "llama", "conv", "torch"])
def test_merging_in_bfloat16_drifts(host: str) -> None:
    """There ten cycles of merging and unmerging move the weights by 0.1 % to 0.2 %: it subtracts what it had added."""
    targets = "line,plane,space" if host == "conv" else "all-linear"
    model = perturb(inlay.attach(fresh(host).bfloat16(), inlay.LoRA(r=2, targets=targets)))
    before, expected = base_bits(model), output(model, host)
    for _ in range(10):
        assert base_bits(inlay.merge(model)) != before
        assert base_bits(inlay.unmerge(model)) == before
    assert torch.equal(output(model, host), expected)


def test_trainable_tokens_drop_the_bias_of_a_linear() -> None:
    """There the output is wrong right after wrapping."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.out = nn.Linear(8, 11)
            self.out.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.embed(ids))

    net, ids = Net(), torch.arange(11)
    before = net(ids)
    inlay.attach(net, inlay.TrainableTokens(targets="name:embed", token_indices=(1, 4)))
    assert torch.equal(net(ids), before)


@pytest.mark.parametrize("targets", ["LayerNorm", "word_embeddings", "encoder"])
def test_a_place_of_the_wrong_kind_gets_nothing_to_train(targets: str) -> None:
    """There OSF on anything but a linear says nothing and trains nothing."""
    model = fresh("bert")
    with pytest.raises(InlayError, match=targets):
        inlay.attach(model, inlay.IA3(targets=targets))


def test_a_second_adapter_freezes_the_first_or_steals_its_place(tmp_path: Path) -> None:
    """#2759, #3580, #3487: there `requires_grad` follows what is active."""
    model = perturb(inlay.attach(fresh("bert"), LORA))
    inlay.save(model, tmp_path)
    before, expected = {name for name, p in model.named_parameters() if p.requires_grad}, output(model, "bert")
    inlay.load(model, tmp_path, name="law")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
    assert inlay.active(model) == ("default",)
    assert torch.equal(output(model, "bert"), expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starting_from_factors_of_the_weight_corrupts_it_for_others(init: str, tmp_path: Path) -> None:
    """#2270, #1929, #1626: there such a start rewrites W, and every other adapter computes something else."""
    model = perturb(inlay.attach(fresh("gpt2"), LORA))
    expected, before = output(model, "gpt2"), base_bits(model)
    inlay.attach(model, inlay.LoRA(r=2, init=init, targets="attention"), name="law")
    assert base_bits(model) == before
    inlay.activate(model, "default")
    assert torch.equal(output(model, "gpt2"), expected)
    inlay.activate(model, "law")
    with inlay.disabled(model):
        assert torch.equal(output(model, "gpt2"), base_output("gpt2"))
    # And its file is a plain LoRA that fits the unchanged base.
    inlay.save(perturb(model, "law"), tmp_path, name="law")
    assert torch.equal(output(inlay.load(fresh("gpt2"), tmp_path), "gpt2"), output(model, "gpt2"))


def test_resuming_wraps_twice() -> None:
    """#859: there a second wrapping starts anew without a word."""
    model = inlay.attach(fresh("bert"), LORA)
    with pytest.raises(AdapterError, match="loaded already"):
        inlay.attach(model, LORA)


@pytest.mark.parametrize("name", ["lora", "lora_A", "base_layer", "model", "weight", "default-2"])
def test_a_name_for_an_adapter_breaks_the_matching_of_keys(name: str, tmp_path: Path) -> None:
    """#1932, #1323: there keys are matched by substrings."""
    model = perturb(inlay.attach(fresh("bert"), LORA, name=name), name)
    inlay.save(model, tmp_path, name=name)
    loaded = inlay.load(fresh("bert"), tmp_path, name=name)
    assert torch.equal(output(loaded, "bert"), output(model, "bert"))


def test_the_classification_head_is_lost_on_reload(tmp_path: Path) -> None:
    """#310, #577, #876."""
    model = perturb(inlay.attach(fresh("bert"), LORA))
    inlay.save(model, tmp_path)
    assert sum("classifier" in key for key in load_file(tmp_path / "adapter_model.safetensors")) == 2
    other = fresh("bert")
    nn.init.normal_(other.classifier.weight)  # a new process makes another one
    assert torch.equal(output(inlay.load(other, tmp_path), "bert"), output(model, "bert"))


def test_an_adapter_on_a_tied_embedding_unties_it_for_good() -> None:
    """#2777, #2018, #2244: there merging and reloading gives garbage."""
    model = perturb(inlay.attach(fresh("gpt2"), inlay.LoRA(r=2, targets="embed")))
    expected = output(model, "gpt2")
    close(output(inlay.merge(model), "gpt2"), expected, 1e-5)
    inlay.detach(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(output(model.requires_grad_(False), "gpt2"), base_output("gpt2"))


def test_gradient_checkpointing_leaves_layers_untrained() -> None:
    """#1142, #137: there the older kind trains nothing unless inputs are made to require gradients first."""
    model = perturb(inlay.attach(fresh("llama"), LORA))
    expected = gradients(model, "llama")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    found = gradients(model.train(), "llama")
    assert found.keys() == expected.keys()
    assert all(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters_lose_updates_or_the_base_its_type(dtype: torch.dtype) -> None:
    """#1706, #2421: the trained tensors are fp32, the base keeps its type and its bits."""
    model = fresh("llama").to(dtype)
    before = base_bits(model)
    inlay.attach(model, LORA)
    assert {parameter.dtype for parameter in adapters_of(model).get("default").parameters()} == {torch.float32}
    assert base_bits(model) == before
    assert output(model, "llama").dtype == dtype


def test_a_config_with_an_unknown_field_is_read_as_if_it_had_none(tmp_path: Path) -> None:
    """There unknown keys of a config only warn; here a misspelt field of a method is an error that names the field."""
    inlay.save(inlay.attach(fresh("bert"), LORA), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    method = config["auto_mapping"]["inlay"]["methods"][0]
    method["aplha"] = method.pop("alpha")
    path.write_text(json.dumps(config))
    with pytest.raises(InlayError, match=r"aplha.*did you mean 'alpha'"):
        inlay.load(fresh("bert"), tmp_path)
