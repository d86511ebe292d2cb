"""Starts from data: against HF peft, against a brute-force SVD of what the places read, and with the base as it was."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engine import tiny
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.eva import get_eva_state_dict
from peft.tuners.lora.loraga import preprocess_loraga
from properties.models import base_bits, perturb, snapshot
from torch import Tensor, nn

import inlay
from inlay import LoRA
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError, DataError, UnsupportedError
from inlay.pieces.lora.data_start import DataStart, ranks_by_share

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def rows(number: int = 1, padding: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(number):
        ids = torch.randint(3, 60, (8, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[:, 12 - padding :] = 0
        labels = ids.clone()
        labels[:, :2] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def inputs_of(model: nn.Module, batches: list[dict[str, Tensor]], path: str) -> Tensor:
    """The rows that count, of what a place reads, (n, in)."""
    heard: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: heard.append(args[0].detach()))
    for batch in batches:
        model(**batch)
    handle.remove()
    real = [(batch["attention_mask"] != 0) & (batch["labels"] != -100) for batch in batches]
    return torch.cat([x[mask] for x, mask in zip(heard, real, strict=True)]).double()


def found(method: Any) -> dict[str, Tensor]:
    assert isinstance(method.init, DataStart)
    assert method.init.found is not None
    return {name: a for name, (a, _) in method.init.found.items()}


@pytest.fixture
def llama() -> nn.Module:
    return tiny.build("llama", "causal").eval()


# -- EVA ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_eva_is_pefts(llama: nn.Module, rank_stabilised: bool) -> None:
    """At rho = 2 the ranks are peft's, and so is A up to sign; peft's SVD is randomised, with room to spare there."""
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0)
    )
    theirs = get_eva_state_dict(copy.deepcopy(llama), rows(), config, show_progress_bar=False)
    method = LoRA(r=3, alpha=6, targets=TARGETS, init="eva", rank_stabilised=rank_stabilised)
    ours = method.prepare(llama, rows())
    assert {name: len(a) for name, a in found(ours).items()} == {name: len(a) for name, a in theirs.items()}
    assert len({len(a) for a in theirs.values()}) > 1
    for name, a in theirs.items():
        cosines = torch.cosine_similarity(found(ours)[name], a.float()).abs()
        assert (cosines > 0.999).all()  # ours are exact; see the next test
    inlay.attach(llama, ours)
    pieces = adapters_of(llama).get("default").pieces()
    assert {site.name: len(piece.lora_A) for site, piece in pieces} == {name: len(a) for name, a in theirs.items()}
    for site, piece in pieces:
        assert torch.equal(piece.lora_A.detach(), found(ours)[site.name])
        assert piece.scale == pytest.approx(method.scale)  # peft's alpha · r′/r keeps it only without rank_stabilised


@pytest.mark.parametrize("order", [1, -1])
def test_eva_is_the_svd_of_what_was_read_whatever_the_order(llama: nn.Module, order: int) -> None:
    seen = rows(3)
    ours = LoRA(r=4, targets=TARGETS, init={"kind": "eva", "rho": 1}).prepare(llama, seen[::order])
    assert ours.overrides == {}
    for name, a in found(ours).items():
        x = inputs_of(llama, seen, name)
        _, _, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        cosines = torch.cosine_similarity(a.double(), v[:4]).abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-5)  # a is fp32


def test_whitened_directions_are_seen_to_vary_by_one(llama: nn.Module) -> None:
    seen = rows(3)
    ours = LoRA(r=4, targets=TARGETS, init={"kind": "eva", "rho": 1, "whiten": True}).prepare(llama, seen)
    for name, a in found(ours).items():
        h = inputs_of(llama, seen, name) @ a.double().T
        h = h - h.mean(0)
        torch.testing.assert_close(h.T @ h / len(h), torch.eye(4, dtype=h.dtype), rtol=0, atol=1e-4)  # a is fp32


def peft_whitens(model: nn.Module, targets: list[str]) -> dict[str, Tensor]:
    """How long the rows of peft's A are, relative to the first: it counts a batch as often as it looks at it."""
    eva = peft.EvaConfig(rho=1.0, whiten=True)
    config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights="eva", eva_config=eva)
    theirs = get_eva_state_dict(copy.deepcopy(model), rows(), config, show_progress_bar=False)
    lengths = {name: a.float().norm(dim=1) for name, a in theirs.items()}
    return {name: length / length[0] for name, length in lengths.items()}


def test_whitening_can_be_pefts(llama: nn.Module) -> None:
    """Whose spread grows with the number of rows; and which divides again for each place that reads the same."""
    method, lengths = LoRA(r=3, targets=["q_proj", "v_proj", "o_proj"]), {}
    for whiten in (True, "authors"):
        once, twice = (
            found(method.replace(init={"kind": "eva", "rho": 1, "whiten": whiten}).prepare(llama, seen))
            for seen in (rows(), [*rows(), *rows()])
        )
        for name, a in once.items():
            grown = 1 if whiten is True else 2**0.25
            torch.testing.assert_close(twice[name] * grown, a, rtol=1e-4, atol=1e-5)
            lengths[name] = a.norm(dim=1) / a[0].norm()  # in the end, the authors'
    alone = peft_whitens(llama, ["q_proj", "o_proj"])
    for name, theirs in alone.items():
        close = 1e-3 if "o_proj" in name else 2e-2  # where directions are nearly equal, a randomised SVD is less exact
        torch.testing.assert_close(theirs, lengths[name], rtol=close, atol=0)
    for name, theirs in peft_whitens(llama, ["q_proj", "v_proj"]).items():
        torch.testing.assert_close(theirs, alone[name.replace("v_proj", "q_proj")] ** 2, rtol=1e-4, atol=0)


def test_only_the_batches_asked_for_are_looked_at(llama: nn.Module) -> None:
    some = LoRA(r=2, targets=TARGETS, init={"kind": "eva", "batches": 2}).prepare(llama, rows(3))
    same = LoRA(r=2, targets=TARGETS, init="eva").prepare(llama, rows(3)[:2])
    assert all(torch.equal(a, found(same)[name]) for name, a in found(some).items())


def test_ranks_go_where_the_shares_are_largest() -> None:
    shares = {"a": torch.tensor([0.5, 0.1]), "b": torch.tensor([0.9, 0.6]), "c": torch.tensor([0.05, 0.01])}
    assert ranks_by_share(shares, 3) == {"a": 1, "b": 2, "c": 0}
    assert ranks_by_share(shares, 6) == {"a": 2, "b": 2, "c": 2}
    equal = {"a": torch.full((2,), 0.5), "b": torch.full((2,), 0.5)}
    assert ranks_by_share(equal, 2) == {"a": 2, "b": 0}


def test_a_place_without_ranks_is_left_out(llama: nn.Module) -> None:
    ours = LoRA(r=1, targets=[*TARGETS, "up_proj"], init={"kind": "eva", "rho": 3}).prepare(llama, rows())
    empty = {name for name, a in found(ours).items() if not len(a)}
    assert empty
    inlay.attach(llama, ours)
    assert {site.name for site, _ in adapters_of(llama).get("default").pieces()} == found(ours).keys() - empty
    assert inlay.summary(llama).trainable_parameters == sum(
        len(a) * sum(llama.get_submodule(name).weight.shape) for name, a in found(ours).items()
    )


@pytest.mark.parametrize(
    ("name", "init"),
    [("llama", "eva"), ("bert", "eva"), ("t5", "eva"), ("llama", "corda"), ("gpt2", "corda"), ("gpt2", "lora_ga")],
)
def test_the_model_starts_as_the_base_and_keeps_its_bits(name: str, init: Any) -> None:
    model = tiny.build(name, {"bert": "sequence", "t5": "conditional"}.get(name, "causal")).train()
    batch = rows()[0]
    batch = {**batch, "labels": torch.arange(8) % 2} if name == "bert" else batch
    before, bits, state = snapshot(model), base_bits(model), torch.get_rng_state()
    method = LoRA(r=2, targets="attention", init=init, overrides={"role:value": {"r": 1}})
    ours = method.prepare(model, [batch])
    assert torch.equal(torch.get_rng_state(), state)
    assert snapshot(model) == before
    model.eval().requires_grad_(False)
    with torch.no_grad():
        expected = model(**batch).logits
        inlay.attach(model, ours, modules_to_save=[])
        assert torch.equal(model(**batch).logits, expected)
    assert base_bits(model) == bits


def test_its_file_is_a_plain_lora_with_the_ranks_found(llama: nn.Module, tmp_path: Path) -> None:
    bare = copy.deepcopy(llama)
    inlay.attach(llama, LoRA(r=3, targets=TARGETS, init="eva", rank_stabilised=True).prepare(llama, rows()))
    perturb(llama)
    inlay.save(llama, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["init_lora_weights"] is True
    assert config["rank_pattern"]
    with torch.no_grad():
        expected = llama(**rows()[0]).logits
        back = inlay.load(copy.deepcopy(bare), tmp_path)
        assert torch.equal(back(**rows()[0]).logits, expected)
        inlay.save(back, tmp_path / "again")
        weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "again")]
        assert weights[0] == weights[1]
        theirs = peft.PeftModel.from_pretrained(bare, tmp_path)
        torch.testing.assert_close(theirs(**rows()[0]).logits, expected, rtol=1e-4, atol=1e-5)  # sums in another order


def test_other_places_may_start_otherwise(llama: nn.Module) -> None:
    method = LoRA(r=2, targets="q_proj,embed_tokens", init="eva", overrides={"embed_tokens": {"init": "kaiming"}})
    ours = method.prepare(llama, rows())
    assert all(name.endswith("q_proj") for name in found(ours))
    inlay.attach(llama, ours)
    assert any(site.kind == "embedding" for site, _ in adapters_of(llama).get("default").pieces())


# -- CorDA -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:CorDA changes the base weights")
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_corda_is_pefts(name: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On what peft takes, one row without padding. It shares B A otherwise between A and B: by one factor a place."""
    if importlib.util.find_spec("attr") is None:  # peft's CorDA takes `dataclass` from attrs, which it does not require
        monkeypatch.setitem(sys.modules, "attr", dataclasses)
    from peft.tuners.lora.corda import preprocess_corda

    model, targets = tiny.build(name, "causal"), {"llama": ["q_proj", "down_proj"], "gpt2": ["c_fc"]}[name]
    ids = torch.randint(3, 60, (1, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    ours = inlay.attach(
        copy.deepcopy(model),
        LoRA(r=3, alpha=6, targets=targets, init={"kind": "corda", "mode": mode}).prepare(model, [batch]),
    )
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=targets,
        fan_in_fan_out=name == "gpt2",
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )
    preprocess_corda(model, config, run_model=lambda: model(**batch))
    theirs = peft.get_peft_model(model, config)
    for site, piece in adapters_of(ours).get("default").pieces():
        layer: Any = theirs.get_submodule(f"base_model.model.{site.path}")
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        # Both divide by C, whose condition is that of its damping, about 10³; theirs in fp32.
        torch.testing.assert_close(
            (piece.lora_B @ piece.lora_A).detach(), b @ a, rtol=0, atol=2e-3 * (b @ a).abs().max()
        )
        cosines = torch.cosine_similarity(piece.lora_A.detach(), a).abs()
        assert (cosines > 0.999).all()


class Reads(nn.Module):
    """A linear that reads what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8, bias=False)

    def forward(self, x: Tensor) -> Any:
        return types.SimpleNamespace(loss=self.a(x).sum())


def test_corda_on_white_inputs_is_pissa() -> None:
    torch.manual_seed(0)
    model = Reads()
    other = inlay.attach(copy.deepcopy(model), LoRA(r=2, targets="a", init="pissa"))
    inlay.attach(model, LoRA(r=2, targets="a", init="corda").prepare(model, [{"x": torch.eye(6)}]))
    ((_, ours),), ((_, theirs),) = (adapters_of(m).get("default").pieces() for m in (model, other))
    torch.testing.assert_close(ours.lora_B @ ours.lora_A, theirs.lora_B @ theirs.lora_A)


def test_the_two_modes_of_all_directions_are_the_whole_weight() -> None:
    """U S V C⁻¹ = W: the r largest and the others make it up. The largest lose least of W x on the rows seen."""
    torch.manual_seed(0)
    model, x = Reads(), torch.randn(40, 6) * torch.arange(1, 7)
    w = model.a.weight.detach().clone()
    parts = {}
    for mode, r in (("ipm", 2), ("kpm", 4)):
        method = LoRA(r=r, alpha=3 * r, targets="a", init={"kind": "corda", "mode": mode}).prepare(model, [{"x": x}])
        assert isinstance(method.init, DataStart)
        assert method.init.found is not None
        a, b = method.init.found["a"]
        assert b is not None
        parts[mode] = 3 * b @ a
    torch.testing.assert_close(parts["ipm"] + parts["kpm"], w, rtol=1e-4, atol=1e-5)
    assert (x @ parts["kpm"].T).norm() < 0.5 * (x @ w.T).norm()


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_its_file_is_a_plain_lora_of_twice_the_rank(llama: nn.Module, tmp_path: Path, init: Any) -> None:
    bare = copy.deepcopy(llama)
    method = LoRA(r=3, targets=TARGETS, init=init, overrides={"o_proj": {"r": 2}})
    inlay.attach(llama, method.prepare(llama, rows()))
    perturb(llama, std=0.01)
    inlay.save(llama, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["init_lora_weights"]) == (6, {"o_proj": 4}, True)
    with torch.no_grad():
        expected = llama(**rows()[0]).logits
        assert torch.equal(inlay.load(copy.deepcopy(bare), tmp_path)(**rows()[0]).logits, expected)
        theirs = peft.PeftModel.from_pretrained(bare, tmp_path)(**rows()[0]).logits
        # Two large halves that cancel: one digit fewer than elsewhere.
        torch.testing.assert_close(theirs, expected, rtol=1e-3, atol=1e-4)


# -- LoRA-GA -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora_ga_is_the_svd_of_the_mean_gradient(name: str) -> None:
    """Directions are peft's too, up to sign; peft scales B by S as well, and A not at all, which is not the paper's."""
    model, targets = tiny.build(name, "causal"), {"llama": ["q_proj", "down_proj"], "gpt2": ["c_fc"]}[name]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # peft takes its gradients in training mode
    seen = rows(2)
    method = LoRA(r=3, targets=targets, init={"kind": "lora_ga", "gamma": 4}).prepare(model, seen)
    ours = inlay.attach(copy.deepcopy(model), method)
    config = peft.LoraConfig(
        r=3,
        target_modules=targets,
        fan_in_fan_out=name == "gpt2",
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction="ArB2r", scale="unit"),
    )
    plain = copy.deepcopy(model).requires_grad_(True)
    for batch in seen:
        (plain(**batch).loss / len(seen)).backward()

    preprocess_loraga(model, config, lambda: [model(**batch).loss.backward() for batch in seen])
    theirs = peft.get_peft_model(model, config)
    for site, piece in adapters_of(ours).get("default").pieces():
        gradient = plain.get_parameter(f"{site.path}.weight").grad
        assert gradient is not None
        u, _, v = torch.linalg.svd(gradient.T if site.transposed else gradient, full_matrices=False)
        size = site.out_features**0.25 / 2
        a, b = piece.lora_A.detach(), piece.lora_B.detach()
        torch.testing.assert_close((a @ v[:3].T).abs(), size * torch.eye(3), rtol=1e-3, atol=1e-3 * size)
        torch.testing.assert_close((u[:, 3:6].T @ b).abs(), size * torch.eye(3), rtol=1e-3, atol=1e-3 * size)
        layer: Any = theirs.get_submodule(f"base_model.model.{site.path}")
        cosines = torch.cosine_similarity(layer.lora_A["default"].weight.detach(), a).abs()
        assert (cosines > 0.999).all()
        cosines = torch.cosine_similarity(layer.lora_B["default"].weight.detach(), b, dim=0).abs()
        assert (cosines > 0.99).all()  # smaller directions; their SVD is randomised


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_a_run_looks_by_itself() -> None:
    assert LoRA(init="eva").wants_data
    assert not LoRA().wants_data
    assert not LoRA(init=DataStart(kind="eva", found={})).wants_data


# -- what is refused ---------------------------------------------------------------------------------------------------

ONES = {"x": torch.ones(3, 2)}
WRONG: list[tuple[Callable[[nn.Module], Any], type[Exception], str]] = [
    (lambda m: inlay.attach(m, LoRA(init="eva")), ConfigError, r"attach LoRA\(…\)\.prepare\(model, batches\)"),
    (lambda m: LoRA(init="eva").prepare(m, None), DataError, "give an iterable of the model's inputs with labels"),
    (lambda m: LoRA(init="eva").prepare(m, []), DataError, "there is no batch to look at"),
    (lambda m: LoRA(init="eva", targets="embed_tokens").prepare(m, rows()), UnsupportedError, "is for linears"),
    (lambda m: LoRA(init="eva", r=32).prepare(m, [few(4)]), DataError, r"takes r=32 directions .* in the 4 rows seen"),
    (lambda _: LoRA(init="eva", targets="b").prepare(Unused(), [{"x": torch.ones(3, 2)}]), DataError, "no row .* b in"),
    (lambda m: LoRA(init={"kind": "eva", "rho": 0.5}), ConfigError, "rho=0.5: a number of at least 1"),
    (lambda m: LoRA(init={"kind": "corda", "mode": "kmp"}), ConfigError, "choose one of ipm, kpm"),
    (lambda m: LoRA(init="corda", r=40).prepare(m, rows()), ConfigError, "takes 40 directions at r=40"),
    (lambda m: LoRA(init="lora_ga", r=17).prepare(m, rows()), ConfigError, "takes 34 directions at r=17"),
    (lambda m: LoRA(init={"kind": "lora_ga", "gamma": 0}), ConfigError, "gamma=0"),
    (
        lambda _: LoRA(init="lora_ga", r=1, targets="b").prepare(Unused(), [{"x": torch.ones(3, 2)}]),
        DataError,
        "no grad",
    ),
    (lambda m: LoRA(init={"kind": "eva", "batches": 0}), ConfigError, "batches=0"),
    (lambda m: LoRA(init={"kind": "eva", "whiten": "zca"}), ConfigError, "whiten='zca': choose one of True, False"),
    (lambda m: LoRA(init={"kind": "eve"}), ConfigError, "choose one of eva, corda, lora_ga"),
    (lambda m: LoRA(init={"rho": 1}), ConfigError, "a kind is needed"),
    (lambda m: LoRA(init={"kind": "eva", "rh": 1}), ConfigError, "did you mean 'rho'"),
    (lambda m: LoRA(overrides={"query": {"init": "eva"}}), ConfigError, "which all places do or none"),
    (lambda m: inlay.DoRA(init="eva"), ConfigError, "choose one of kaiming"),
    (
        lambda m: inlay.attach(m, LoRA(init="eva", r=2).prepare(m, rows()).replace(targets="all-linear")),
        ConfigError,
        "has seen no data at",
    ),
]


class Unused(nn.Module):
    """One of its linears is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        return types.SimpleNamespace(loss=self.a(x).sum())


def few(real: int) -> dict[str, Tensor]:
    """A batch of which so many tokens count."""
    batch = rows()[0]
    batch["labels"][:] = -100
    batch["labels"].view(-1)[:real] = 5
    batch["attention_mask"][:] = 1
    return batch


@pytest.mark.parametrize(("act", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_bad_input_is_refused_and_the_model_left_alone(
    act: Callable[[nn.Module], Any], error: type[Exception], message: str
) -> None:
    model = tiny.build("llama", "causal")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        act(model)
    assert snapshot(model) == before
