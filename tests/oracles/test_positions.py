"""Methods with numbers at fixed positions, against HF peft: outputs, gradients, files both ways, two adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles.against_peft import CLOSE, Case, run
from oracles.other_methods import both_ways, ids, model, perturbed_peft

import inlay

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),  # peft's own
]

ATTENTION = ["query", "key", "value", "attention.output.dense"]
CASES: dict[str, tuple[inlay.Method, peft.PeftConfig]] = {
    "c3a": (inlay.C3A(block_size=8, targets="attention"), peft.C3AConfig(block_size=8, target_modules=ATTENTION)),
    "c3a, patterns": (
        inlay.C3A(block_size=16, targets="query,key", overrides={"query": {"block_size": 4}}),
        peft.C3AConfig(block_size=16, block_size_pattern={"query": 4}, target_modules=["query", "key"]),
    ),
    "fourierft": (
        inlay.FourierFT(n_frequency=40, scaling=30, targets="attention"),
        peft.FourierFTConfig(n_frequency=40, scaling=30, target_modules=ATTENTION),
    ),
    "fourierft, thin": (
        inlay.FourierFT(n_frequency=2, scaling=60, random_loc_seed=5, targets="attention"),
        peft.FourierFTConfig(n_frequency=2, scaling=60, random_loc_seed=5, target_modules=ATTENTION),
    ),
    "fourierft, patterns": (
        inlay.FourierFT(n_frequency=40, targets="query,key", overrides={"query": {"n_frequency": 9}}),
        peft.FourierFTConfig(n_frequency=40, n_frequency_pattern={"query": 9}, target_modules=["query", "key"]),
    ),
    "glora": (inlay.GLoRA(r=2, targets="attention"), peft.GloraConfig(r=2, target_modules=ATTENTION)),
    **{
        f"glora, {ab}, {c}, {de}": (
            inlay.GLoRA(r=2, weights=ab, coupling=c, biases=de, targets="attention"),
            peft.GloraConfig(r=2, config_A_B=ab, config_C=c, config_D_E=de, target_modules=ATTENTION),
        )
        for ab, c, de in (
            ("vector", "vector", "vector"),
            ("constant", "none", "constant"),
            ("none", "lora", "none"),
            ("lora", "none", "none"),
        )
    },
    "peanut": (inlay.PEANuT(r=3, targets="attention"), peft.PeanutConfig(r=3, target_modules=ATTENTION)),
    "peanut, deep": (
        inlay.PEANuT(r=4, depth=2, act_fn="gelu", scaling=0.5, targets="ffn"),
        peft.PeanutConfig(
            r=4, depth=2, act_fn="gelu", scaling=0.5, target_modules=["intermediate.dense", "output.dense"]
        ),
    ),
    "shira": (inlay.SHiRA(r=3, targets="attention"), peft.ShiraConfig(r=3, target_modules=ATTENTION)),
    "shira, seed": (
        inlay.SHiRA(r=2, random_seed=5, targets="ffn"),
        peft.ShiraConfig(r=2, random_seed=5, target_modules=["intermediate.dense", "output.dense"]),
    ),
    "supertuning": (
        inlay.Supertuning(sparsity=0.9, targets="attention"),
        peft.SupertuningConfig(sparsity=0.9, target_modules=ATTENTION),
    ),
    "supertuning, smallest": (
        inlay.Supertuning(sparsity=0.8, select_top=False, targets="ffn"),
        peft.SupertuningConfig(sparsity=0.8, select_top=False, target_modules=["intermediate.dense", "output.dense"]),
    ),
    "supertuning, lora": (
        inlay.Supertuning(sparsity=0.9, r=2, targets="attention"),
        peft.SupertuningConfig(sparsity=0.9, r=2, target_modules=ATTENTION),
    ),
    "supertuning, alpha": (
        inlay.Supertuning(sparsity=0.9, r=2, alpha=3, targets="query"),
        peft.SupertuningConfig(sparsity=0.9, r=2, lora_alpha=3, target_modules=["query"]),
    ),
    "waveft": (
        inlay.WaveFT(n_frequency=50, scaling=2, targets="attention"),
        peft.WaveFTConfig(n_frequency=50, scaling=2, target_modules=ATTENTION),
    ),
    "waveft, patterns": (
        inlay.WaveFT(n_frequency=50, scaling=2, targets="query,key", overrides={"query": {"n_frequency": 9}}),
        peft.WaveFTConfig(n_frequency=50, scaling=2, n_frequency_pattern={"query": 9}, target_modules=["query", "key"]),
    ),
    "waveft, bare": (
        inlay.WaveFT(n_frequency=50, use_idwt=False, random_loc_seed=3, targets="ffn"),
        peft.WaveFTConfig(
            n_frequency=50, use_idwt=False, random_loc_seed=3, target_modules=["intermediate.dense", "output.dense"]
        ),
    ),
    **{
        f"waveft, {family}, {n}": (
            inlay.WaveFT(n_frequency=n, scaling=1, wavelet_family=family, targets="attention"),
            peft.WaveFTConfig(n_frequency=n, scaling=1, wavelet_family=family, target_modules=ATTENTION),
        )
        for family, n in (("db2", 7), ("db2", 100), ("db5", 50), ("db10", 50))
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    method, config = CASES[name]
    both_ways(Case(model("bert"), ids, {}, method), config, tmp_path)


# A change that reads W: here the second adapter reads what the first made of it, in peft the base's W.
OF_THE_WEIGHT = ("peanut", "peanut, deep")


@pytest.mark.parametrize("name", [name for name in CASES if name not in OF_THE_WEIGHT])
def test_two_adapters_as_peft_merges_them(name: str, tmp_path: Path) -> None:
    build, (_, config) = model("bert"), CASES[name]
    theirs = perturbed_peft(build(), config)
    theirs.add_adapter("other", config)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if ".other" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    theirs.base_model.merge_adapter(adapter_names=["default", "other"])
    ours = inlay.load(build(), tmp_path)
    inlay.load(ours, tmp_path / "other", name="other")
    inlay.activate(ours, "default", "other")
    torch.testing.assert_close(run(ours, ids(), backward=False), run(theirs, ids(), backward=False), **CLOSE)


def test_fourierft_on_conv1d(tmp_path: Path) -> None:
    config = peft.FourierFTConfig(n_frequency=40, target_modules=["c_attn"], fan_in_fan_out=True)
    both_ways(Case(model("gpt2"), ids, {}, inlay.FourierFT(n_frequency=40, targets="c_attn")), config, tmp_path)


def test_waveft_on_conv1d(tmp_path: Path) -> None:
    config = peft.WaveFTConfig(n_frequency=40, target_modules=["c_attn"], fan_in_fan_out=True)
    both_ways(Case(model("gpt2"), ids, {}, inlay.WaveFT(n_frequency=40, targets="c_attn")), config, tmp_path)


def test_glora_without_biases(tmp_path: Path) -> None:
    config = peft.GloraConfig(r=2, target_modules=["q_proj", "v_proj"])
    both_ways(Case(model("llama"), ids, {}, inlay.GLoRA(r=2)), config, tmp_path)


REFUSED: dict[str, dict[str, Any]] = {
    "c3a": {"bias": "all"},
    "fourierft": {"bias": "all"},
    "glora": {"bias": "all"},
    "peanut": {"act_fn": "quick_gelu"},
    "shira": {"mask_type": "own"},
    "supertuning": {"save_precomputed_indices": False},
    "waveft": {"wavelet_family": "sym4"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_here_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (entry,), (_, config) = REFUSED[name], CASES[name]
    peft.get_peft_model(model("bert")(), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | REFUSED[name]))
    with pytest.raises(inlay.InlayError, match=entry):
        inlay.load(model("bert")(), tmp_path)


def test_c3a_of_two_adapters_feeds_both_with_x(tmp_path: Path) -> None:
    """In peft the second adapter gets what came out of the first, unless they are merged."""
    build, (_, config) = model("bert"), CASES["c3a"]
    theirs = perturbed_peft(build(), config)
    theirs.add_adapter("other", config)
    theirs.base_model.set_adapter(["default", "other"])
    apart = run(theirs, ids(), backward=False)
    theirs.base_model.merge_adapter(adapter_names=["default", "other"])
    assert (apart - run(theirs, ids(), backward=False)).abs().max() > 1e-3


def test_the_gradient_of_x_through_c3a_is_that_of_its_matrix(tmp_path: Path) -> None:
    """In peft it is that of another matrix, whose kernels run backwards."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(16, 16))
    config = peft.C3AConfig(block_size=8, target_modules=["0"])
    theirs = perturbed_peft(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    ours = inlay.load(copy.deepcopy(base), tmp_path)
    weight: Any = inlay.merge(inlay.load(base, tmp_path))[0].weight  # type: ignore[index]
    given = torch.randn(3, 16)

    def gradient(whole: Any) -> torch.Tensor:
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        whole(x).backward(given)
        assert x.grad is not None
        return x.grad

    assert torch.allclose(gradient(ours), given @ weight, atol=1e-6)
    assert (gradient(theirs) - given @ weight).abs().max() > 1e-3


def query(whole: Any) -> Any:
    return whole.encoder.layer[0].attention.self.query


def test_shira_of_one_seed_has_the_places_of_peft() -> None:
    ours = inlay.attach(model("bert")(), inlay.SHiRA(r=2, random_seed=5, targets="query"))
    theirs = peft.get_peft_model(model("bert")(), peft.ShiraConfig(r=2, random_seed=5, target_modules=["query"]))
    expected = query(theirs.base_model.model).shira_indices["default"]
    assert torch.equal(query(ours).inlays.default.shira.shira_indices, expected)


def test_shira_without_a_seed_has_other_places_everywhere() -> None:
    """In peft an unset seed is one fixed seed: every weight of one shape, in every run, changes at the same places."""
    ours: Any = inlay.attach(model("bert")(), inlay.SHiRA(r=2, targets="query"))
    first, second = (layer.attention.self.query.inlays.default.shira.shira_indices for layer in ours.encoder.layer)
    assert not torch.equal(first, second)
