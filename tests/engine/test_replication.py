"""Replicated layers: against a deeper model of the same blocks, against HF peft, in files, and undone."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engine import tiny
from engine.small import Net, randomise
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.engine.replication import replicated_layers
from inlay.errors import AdapterError, BaseModelError, CheckpointError, ConfigError, InlayError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(3, 17).reshape(2, 7)
RANGES = [(0, 2), (1, 2), (0, 1)]
ORDER = [0, 1, 1, 0]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def fresh(name: str = "llama") -> Any:
    return tiny.build(name, {"bert": "masked", "vit": "image"}.get(name, "causal"))


def inputs(name: str) -> dict[str, Tensor]:
    if name != "vit":
        return {"input_ids": IDS}
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def deeper(name: str) -> Any:
    """A model of four layers whose weights are those of the tiny one's two, in the order of the ranges."""
    small, head = fresh(name), {"bert": "masked", "vit": "image"}.get(name, "causal")
    types = (
        {"layer_types": [small.config.layer_types[n] for n in ORDER]} if hasattr(small.config, "layer_types") else {}
    )
    field = "n_layer" if name == "gpt2" else "num_hidden_layers"
    large = tiny.build(name, head, **{field: 4}, **types)
    stack = next(path for path, m in small.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    values = small.state_dict()
    for key in large.state_dict():
        if key.startswith(f"{stack}."):
            place, _, rest = key.removeprefix(f"{stack}.").partition(".")
            values[key] = small.state_dict()[f"{stack}.{ORDER[int(place)]}.{rest}"]
    large.load_state_dict(values)
    return large


def held(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each memory once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def described(model: Any) -> tuple[Any, ...]:
    """What must be as before: modules and parameters by identity, the config, the numbers of the blocks."""
    places = [(path, id(module), type(module)) for path, module in model.named_modules()]
    numbers = [module.layer_idx for module in model.modules() if hasattr(module, "layer_idx")]
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]
    return places, numbers, parameters, model.config.to_dict()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "gemma3", "mistral", "phi3", "qwen3-moe"])
def test_it_computes_what_a_deeper_model_of_these_blocks_computes(name: str) -> None:
    model, given = fresh(name), inputs(name)
    before, size, plain = described(model), held(model), model(**given).logits
    assert inlay.replicate_layers(model, RANGES) is model
    assert replicated_layers(model) == [list(pair) for pair in RANGES]
    assert held(model) == size
    assert model.config.num_hidden_layers == 4
    expected = deeper(name)
    torch.testing.assert_close(model(**given).logits, expected(**given).logits, **CLOSE)
    if name not in ("bert", "vit"):
        fixed = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        texts = [one.generate(IDS, use_cache=cached, **fixed) for one in (model, expected) for cached in (True, False)]
        assert all(torch.equal(text, texts[0]) for text in texts)
    inlay.restore_layers(model)
    assert described(model) == before
    assert torch.equal(model(**given).logits, plain)


def test_each_layer_has_a_lora_of_its_own_and_a_merge_keeps_them_apart() -> None:
    model = inlay.replicate_layers(fresh(), RANGES)
    expected = copy.deepcopy(model)
    inlay.attach(model, inlay.LoRA(r=2, targets="query,down"))
    assert inlay.summary(model).trainable_parameters == 4 * 2 * (32 + 32 + 48 + 32)
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    randomise(model)
    moved = model(IDS).logits
    deep: Any = deeper("llama")  # with weights of its own, so that plain sums can be written into it
    with torch.no_grad():
        for site, piece in adapters_of(model).get("default").pieces():
            weight = deep.get_submodule(site.path).weight
            weight.copy_(piece.weight(weight))
    torch.testing.assert_close(moved, deep(IDS).logits, **CLOSE)
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    inlay.merge(model)
    torch.testing.assert_close(model(IDS).logits, moved, **CLOSE)
    inlay.unmerge(model)
    assert all(torch.equal(bits[name], value) for name, value in model.state_dict().items())
    with pytest.raises(AdapterError, match=r"inlay\.detach"):
        inlay.restore_layers(model)
    inlay.detach(model)
    assert torch.equal(model(IDS).logits, expected(IDS).logits)  # asked for by itself, so it stays


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_outputs_gradients_and_files_are_hf_pefts(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    target = "q_proj" if name == "llama" else "query"
    config = peft.LoraConfig(
        r=2, target_modules=[target], init_lora_weights=False, layer_replication=[list(pair) for pair in RANGES]
    )
    theirs = peft.get_peft_model(fresh(name), config).eval()
    logits = theirs(input_ids=IDS).logits
    logits.square().sum().backward()
    theirs.save_pretrained(tmp_path / "theirs")
    gradients = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    ours: Any = fresh(name)
    before = described(ours)
    inlay.load(ours, tmp_path / "theirs", trainable=True)
    torch.testing.assert_close(ours(input_ids=IDS).logits, logits, **CLOSE)
    ours(input_ids=IDS).logits.square().sum().backward()
    for site, piece in adapters_of(ours).get("default").pieces():
        for letter in "AB":
            expected = gradients[f"base_model.model.{site.path}.lora_{letter}.default.weight"]
            torch.testing.assert_close(piece.get_parameter(f"lora_{letter}").grad, expected, rtol=1e-4, atol=1e-4)
    inlay.save(ours, tmp_path / "ours")
    left, right = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    back = peft.PeftModel.from_pretrained(fresh(name), tmp_path / "ours").eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, logits, **CLOSE)
    inlay.detach(ours)  # what load did for the adapter goes with it
    assert described(ours) == before

    inlay.load(ours, tmp_path / "ours")
    merged = inlay.merge(ours, keep_base=False)  # for good: there is nothing to go back to
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits, **CLOSE)
    assert replicated_layers(merged) is None
    wrong = theirs.merge_and_unload()  # peft 0.21.2 means to refuse this, and looks in the wrong place
    assert not torch.allclose(wrong(input_ids=IDS).logits, logits, rtol=1e-3, atol=1e-4)


def test_any_method_in_files_of_ours(tmp_path: Path) -> None:
    model = inlay.replicate_layers(fresh("gpt2"), RANGES)
    inlay.attach(model, inlay.IA3())
    randomise(model)
    inlay.save(model, tmp_path / "ia3")
    said = json.loads((tmp_path / "ia3" / "adapter_config.json").read_text())
    assert (said["peft_type"], said["layer_replication"]) == ("INLAY", [list(pair) for pair in RANGES])
    again = inlay.load(fresh("gpt2"), tmp_path / "ia3")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    inlay.load(again, tmp_path / "ia3", "second")
    inlay.detach(again, "default")
    assert replicated_layers(again) is not None
    for twin in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        inlay.activate(twin, "second")
        assert torch.equal(twin(IDS).logits, model(IDS).logits)
        assert held(twin) == held(again)
        inlay.detach(twin)
        assert torch.equal(twin(IDS).logits, fresh("gpt2")(IDS).logits)
    enable = getattr(again, "activation_checkpointing_enable", None) or again.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    inlay.trainable(again, "second")
    inlay.activate(again, "second")
    again.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapters_of(again).get("second").parameters())


def test_a_file_that_does_not_fit_leaves_the_model_alone(tmp_path: Path) -> None:
    model = inlay.replicate_layers(fresh(), RANGES)
    inlay.attach(model, inlay.LoRA(r=2))
    inlay.save(model, tmp_path)
    inlay.detach(inlay.attach(model, inlay.LoRA(r=2), name="b"))
    with pytest.raises(BaseModelError, match="num_hidden_layers"):  # made for the plain model
        inlay.save(plain := inlay.attach(fresh(), inlay.LoRA(r=2)), tmp_path / "plain")
        inlay.load(model, tmp_path / "plain")
    with pytest.raises(BaseModelError, match="adapters sit in its own layers"):
        inlay.load(plain, tmp_path, "second")
    with pytest.raises(BaseModelError, match=r"its layers are \[\[0, 1\]\]"):
        inlay.load(inlay.replicate_layers(fresh(), [(0, 1)]), tmp_path)
    other = fresh()
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1)
    before = described(other)
    with pytest.raises(BaseModelError, match="the weights"):
        inlay.load(other, tmp_path)
    assert described(other) == before
    config = tmp_path / "adapter_config.json"
    for wrong in ([[0, 5]], "all", [[1, 1]]):
        config.write_text(json.dumps({**json.loads(config.read_text()), "layer_replication": wrong}))
        with pytest.raises(CheckpointError, match="layer_replication="):
            inlay.load(fresh(), tmp_path)


@pytest.mark.parametrize(
    ("name", "ranges", "error", "message"),
    [
        ("llama", [], ConfigError, "of the 2 layers from 0 to 1"),
        ("llama", [(0, 3)], ConfigError, "ranges="),
        ("llama", [(1, 1)], ConfigError, "ranges="),
        ("llama", [(0, 1, 2)], ConfigError, "ranges="),
        ("t5", RANGES, UnsupportedError, "several stacks"),
        ("inverse", RANGES, UnsupportedError, "scale_attn_by_inverse_layer_idx"),
        ("albert", [(0, 1)], UnsupportedError, "config says 2 of them, and there are 1"),
        ("net", RANGES, UnsupportedError, "no nn.ModuleList of blocks"),
        ("moved", RANGES, UnsupportedError, "load the model on one device"),
    ],
)
def test_what_cannot_be(name: str, ranges: Any, error: type[InlayError], message: str) -> None:
    model: Any
    if name == "net":
        model = Net()
    elif name == "inverse":
        model = tiny.build("gpt2", "causal", scale_attn_by_inverse_layer_idx=True)
    else:
        model = tiny.build({"moved": "llama"}.get(name, name))
    if name == "moved":
        model.layers[1].mlp.forward = model.layers[1].mlp.forward
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        inlay.replicate_layers(model, ranges)
    assert list(model.state_dict()) == keys
    assert replicated_layers(model) is None


def test_twice_or_never() -> None:
    model = inlay.replicate_layers(fresh(), RANGES)
    with pytest.raises(ConfigError, match=r"inlay\.restore_layers first"):
        inlay.replicate_layers(model, RANGES)
    with pytest.raises(ConfigError, match="not replicated"):
        inlay.restore_layers(inlay.restore_layers(model))
    inlay.attach(model, inlay.LoRA(r=2))
    with pytest.raises(AdapterError, match=r"inlay\.detach"):
        inlay.replicate_layers(model, RANGES)
