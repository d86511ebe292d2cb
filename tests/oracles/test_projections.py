"""Methods whose places share tensors, against HF peft: outputs, gradients, files both ways; and the sharing itself."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import re
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles import other_methods
from oracles.against_peft import CLOSE, Case, gradients, gradients_of_peft, read_by_peft, run
from oracles.other_methods import both_ways, ids, model, perturbed_peft
from properties.models import fresh, output, perturb
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay
from inlay.engine.adapters import adapters_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) :UserWarning"),  # peft's own
]

ATTENTION = ["query", "key", "value", "attention.output.dense"]
FFN = ["intermediate.dense", "output.dense"]
CASES: dict[str, tuple[str, inlay.Method, Callable[[], peft.PeftConfig]]] = {
    "vera": (
        "bert", inlay.VeRA(r=5, d_initial=0.3, targets="attention"),
        partial(peft.VeraConfig, r=5, d_initial=0.3, target_modules=ATTENTION),
    ),
    "vera, sizes": (
        "bert", inlay.VeRA(r=40, seed=3, targets="all-linear"),
        partial(peft.VeraConfig, r=40, projection_prng_key=3, target_modules=[*ATTENTION, *FFN]),
    ),
    "vera, seed only": (
        "bert", inlay.VeRA(r=5, seed=9, save_projection=False, targets="ffn"),
        partial(peft.VeraConfig, r=5, projection_prng_key=9, save_projection=False, target_modules=FFN),
    ),
    "vera, Conv1D": (
        "gpt2", inlay.VeRA(r=5, targets="c_attn,c_fc"),
        partial(peft.VeraConfig, r=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    ),
    "pvera": (
        "bert", inlay.PVeRA(r=5, d_initial=0.3, targets="attention"),
        partial(peft.PveraConfig, r=5, d_initial=0.3, target_modules=ATTENTION),
    ),
    "pvera, seed only": (
        "bert", inlay.PVeRA(r=5, seed=9, save_projection=False, targets="ffn"),
        partial(peft.PveraConfig, r=5, projection_prng_key=9, save_projection=False, target_modules=FFN),
    ),
    "pvera, Conv1D": (
        "gpt2", inlay.PVeRA(r=5, targets="c_attn,c_fc"),
        partial(peft.PveraConfig, r=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    ),
    "randlora": (
        "bert", inlay.RandLoRA(r=5, alpha=3, targets="attention", save_projection=True),
        partial(peft.RandLoraConfig, r=5, randlora_alpha=3, target_modules=ATTENTION),
    ),
    "randlora, wide and narrow": (
        "bert", inlay.RandLoRA(r=4, alpha=3, seed=2, targets="all-linear"),
        partial(peft.RandLoraConfig, r=4, randlora_alpha=3, projection_prng_key=2, save_projection=False,
                target_modules=[*ATTENTION, *FFN]),
    ),
    "randlora, sparse": (
        "bert", inlay.RandLoRA(r=4, alpha=3, sparse=True, targets="ffn"),
        partial(peft.RandLoraConfig, r=4, randlora_alpha=3, sparse=True, save_projection=False, target_modules=FFN),
    ),
    "randlora, very sparse": (
        "bert", inlay.RandLoRA(r=4, alpha=3, very_sparse=True, targets="query"),
        partial(peft.RandLoraConfig, r=4, randlora_alpha=3, very_sparse=True, save_projection=False,
                target_modules=["query"]),
    ),
    "randlora, Conv1D": (
        "gpt2", inlay.RandLoRA(r=5, alpha=3, targets="c_attn,c_fc", save_projection=True),
        partial(peft.RandLoraConfig, r=5, randlora_alpha=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    ),
    "vblora": (
        "bert", inlay.VBLoRA(r=3, num_vectors=20, vector_length=8, topk=3, targets="attention"),
        partial(peft.VBLoRAConfig, r=3, num_vectors=20, vector_length=8, topk=3, target_modules=ATTENTION),
    ),
    "vblora, sizes": (
        "bert", inlay.VBLoRA(num_vectors=20, vector_length=16, targets="all-linear"),
        partial(peft.VBLoRAConfig, num_vectors=20, vector_length=16, target_modules=[*ATTENTION, *FFN]),
    ),
    "vblora, Conv1D": (
        "gpt2", inlay.VBLoRA(num_vectors=20, vector_length=16, targets="c_attn,c_fc"),
        partial(peft.VBLoRAConfig, num_vectors=20, vector_length=16, target_modules=["c_attn", "c_fc"],
                fan_in_fan_out=True),
    ),
    "tinylora": (
        "bert", inlay.TinyLoRA(r=3, u=7, targets="attention"),
        partial(peft.TinyLoraConfig, r=3, u=7, target_modules=ATTENTION),
    ),
    "tinylora, seed only": (
        "bert", inlay.TinyLoRA(u=7, weight_tying=0.6, seed=3, save_projection=False, targets="all-linear"),
        partial(peft.TinyLoraConfig, u=7, weight_tying=0.6, projection_seed=3, save_projection=False,
                target_modules=[*ATTENTION, *FFN]),
    ),
    "tinylora, one vector": (
        "bert", inlay.TinyLoRA(r=3, u=7, weight_tying=1.0, targets="ffn"),
        partial(peft.TinyLoraConfig, r=3, u=7, weight_tying=1.0, target_modules=FFN),
    ),
    "tinylora, Conv1D": (
        "gpt2", inlay.TinyLoRA(u=7, targets="c_attn,c_fc"),
        partial(peft.TinyLoraConfig, u=7, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    ),
    "tinylora, embedding": (
        "bert", inlay.TinyLoRA(r=3, u=7, targets="query,word_embeddings", weight_tying=0.5),
        partial(peft.TinyLoraConfig, r=3, u=7, target_modules=["query", "word_embeddings"], weight_tying=0.5),
    ),
    "unilora": (
        "bert", inlay.UniLoRA(r=3, theta_d_length=50, targets="attention"),
        partial(peft.UniLoraConfig, r=3, theta_d_length=50, target_modules=ATTENTION),
    ),
    "unilora, long": (
        "bert", inlay.UniLoRA(theta_d_length=5000, seed=7, targets="all-linear"),
        partial(peft.UniLoraConfig, theta_d_length=5000, proj_seed=7, target_modules=[*ATTENTION, *FFN]),
    ),
    "unilora, indices": (
        "bert", inlay.UniLoRA(theta_d_length=50, save_indices=True, targets="ffn"),
        partial(peft.UniLoraConfig, theta_d_length=50, save_indices=True, target_modules=FFN),
    ),
    "unilora, Conv1D": (
        "gpt2", inlay.UniLoRA(targets="c_attn,c_fc"),
        partial(peft.UniLoraConfig, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    ),
}  # fmt: skip


def gradients_at_the_root(theirs: nn.Module) -> dict[str, Tensor]:
    """By the keys of the file: peft's model has what is shared in each place too, and there first."""
    shared = r"base_model\.model\..*\.((?:vblora_vector_bank|tinylora_v\.\d+|unilora_theta_d)$)"
    return {re.sub(shared, r"base_model.\1", key): value for key, value in gradients_of_peft(theirs).items()}


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_methods, "gradients_of_peft", gradients_at_the_root)
    base, method, config = CASES[name]
    both_ways(Case(model(base), ids, {}, method), config(), tmp_path)


@pytest.mark.parametrize("name", ["vera", "pvera", "randlora", "vblora", "tinylora", "unilora"])
def test_two_adapters(name: str, tmp_path: Path) -> None:
    base, _, config = CASES[name]
    theirs = perturbed_peft(model(base)(), config())
    theirs.add_adapter("law", config())
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.requires_grad_(True)  # the second adapter comes frozen
        for key, parameter in theirs.named_parameters():
            if "law" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.base_model.set_adapter(["default", "law"])
    theirs.save_pretrained(tmp_path)
    ours = inlay.load(model(base)(), tmp_path)
    inlay.load(ours, tmp_path / "law", name="law")
    inlay.activate(ours, "default", "law")
    torch.testing.assert_close(run(ours, ids(), backward=False), run(theirs, ids(), backward=False), **CLOSE)


@pytest.mark.parametrize("always", [True, False])
def test_pvera_draws_as_peft_does(always: bool, tmp_path: Path) -> None:
    config = peft.PveraConfig(r=5, pvera_dropout=0.2, target_modules=ATTENTION, sample_at_inference=always)
    theirs = perturbed_peft(model("bert")(), config)
    theirs.save_pretrained(tmp_path)
    ours = inlay.load(model("bert")(), tmp_path, trainable=True)
    for one in (theirs, ours):
        one.train(not always)
    torch.manual_seed(5)
    expected = run(theirs, ids())
    torch.manual_seed(5)  # dropout draws too, in the same order
    torch.testing.assert_close(run(ours, ids()), expected, **CLOSE)
    found = gradients(ours)
    for key, gradient in gradients_of_peft(theirs).items():
        torch.testing.assert_close(found[key], gradient, **CLOSE)
    inlay.save(ours, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["sample_at_inference"] is always


@pytest.mark.parametrize("k", [1, 2, 3])
def test_vblora_with_only_the_weights_that_count(k: int, tmp_path: Path) -> None:
    config = peft.VBLoRAConfig(
        r=3, num_vectors=20, vector_length=8, topk=k, target_modules=ATTENTION, save_only_topk_weights=True
    )
    theirs = perturbed_peft(model("bert")(), config)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = run(theirs, ids(), backward=False)
    ours = inlay.load(model("bert")(), tmp_path / "theirs", trainable=True)
    torch.testing.assert_close(run(ours, ids()), expected, **CLOSE)
    assert all(g.isfinite().all() for g in gradients(ours).values())
    inlay.save(ours, tmp_path / "ours")
    read_by_peft(Case(model("bert"), ids, {}, inlay.VBLoRA()), tmp_path / "ours", expected)
    left, right = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype
        torch.testing.assert_close(right[key], tensor)


REFUSED: dict[str, dict[str, Any]] = {
    "Vera": {"bias": "all"}, "Pvera": {"generator_seed": 3}, "RandLora": {"bias": "all"},
    "VBLoRA": {"bias": "vblora_only", "vector_length": 16}, "TinyLora": {"bias": "all"}, "UniLora": {"bias": "all"},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_here_is_refused_by_name(name: str, tmp_path: Path) -> None:
    entry = next(iter(REFUSED[name]))
    base = model("bert")()
    config = getattr(peft, f"{name}Config")(target_modules=["query"], **REFUSED[name])
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(inlay.InlayError, match=entry):
        inlay.load(model("bert")(), tmp_path)


# -- one object for all places -----------------------------------------------------------------------------------------

SHARING: dict[str, inlay.Method] = {
    "vera": inlay.VeRA(r=2),
    "pvera": inlay.PVeRA(r=2),
    "randlora": inlay.RandLoRA(r=2),
    "vblora": inlay.VBLoRA(r=2, num_vectors=5, vector_length=4),
    "tinylora": inlay.TinyLoRA(u=3, weight_tying=0.5),
    "unilora": inlay.UniLoRA(r=2, theta_d_length=9),
}


def shared(model: nn.Module) -> list[nn.Module]:
    """What each piece of the adapter has as `shared`."""
    return [piece.shared for _, piece in adapters_of(model).get("default").pieces() if hasattr(piece, "shared")]


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("twin", [copy.deepcopy, pickled, lambda model: model.double()])
@pytest.mark.parametrize("name", SHARING)
def test_copies_share_too_and_not_with_the_original(name: str, twin: Callable[[nn.Module], nn.Module]) -> None:
    model = perturb(inlay.attach(fresh("bert"), SHARING[name]))
    other = twin(model)
    assert len(shared(other)) == 4
    assert len({id(one) for one in shared(other)}) == 1
    if other is not model:
        pointers = {t.data_ptr() for m in (model, other) for t in shared(m)[0].root_tensors().values()}
        assert len(pointers) == 2 * len(shared(model)[0].root_tensors())
        assert torch.equal(output(other, "bert"), output(model, "bert"))


@pytest.mark.parametrize("name", SHARING)
def test_detach_frees_it(name: str) -> None:
    model = inlay.attach(fresh("bert"), SHARING[name])
    inlay.attach(model, SHARING[name], name="law")
    found = weakref.ref(shared(model)[0])
    inlay.detach(model, "default")
    gc.collect()
    assert found() is None


@pytest.mark.parametrize("name", SHARING)
def test_what_is_shared_cannot_be_overridden_at_a_place(name: str) -> None:
    field = {"tinylora": "u", "unilora": "theta_d_length"}.get(name, "r")
    with pytest.raises(inlay.InlayError, match=field):
        inlay.attach(fresh("bert"), SHARING[name].replace(overrides={"query": {field: 3}}))
