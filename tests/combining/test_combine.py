"""combine and to_lora: every rule on the changes of the weights, against brute force and HF peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engine import tiny
from engine.small import randomise
from torch import Tensor, nn

import inlay
from inlay.combining.low_rank import Change, added, factored
from inlay.combining.rules import agreed, drop, rule, top
from inlay.engine.adapters import adapters_of
from inlay.errors import AdapterError, ConfigError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(2, 22).reshape(2, 10)


def model(name: str = "bert", head: str = "trunk", **methods: inlay.Method) -> nn.Module:
    """A tiny model with adapters "law" and "poems", whose every tensor matters."""
    methods = methods or {
        "law": inlay.LoRA(r=2, alpha=3, targets="query,value"),
        "poems": inlay.LoRA(r=3, rank_stabilised=True, targets="query,key"),
    }
    base = tiny.build(name, head).requires_grad_(False)
    for adapter, method in methods.items():
        inlay.attach(base, method, adapter)
        randomise(base, adapter)
    inlay.activate(base, "law")
    return base


def deltas(base: nn.Module, name: str) -> dict[str, Tensor]:
    """ΔW at each place, by brute force."""
    found = {}
    for site, piece in adapters_of(base).get(name).pieces():
        if not piece.replaces:
            weight = (site.weight.T if site.transposed else site.weight).detach()
            found[site.name] = (piece.weight(weight) - weight).detach()
    return found


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # fp32 sums in another order


# -- rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -1.0), (0.0, 2.0)])
def test_linear_is_the_sum_of_the_changes(weights: tuple[float, float]) -> None:
    base = model()
    inlay.combine(base, {"law": weights[0], "poems": weights[1]}, name="both")
    law, poems, both = (deltas(base, name) for name in ("law", "poems", "both"))
    assert both.keys() == law.keys() | poems.keys()
    for place, found in both.items():
        zero = torch.zeros_like(found)
        close(found, weights[0] * law.get(place, zero) + weights[1] * poems.get(place, zero))


def test_in_double_precision_the_sum_is_exact_to_it() -> None:
    base = model().double()
    for parameter in base.parameters():
        parameter.data.mul_(1 + 1e-9)  # numbers that fp32 does not have
    inlay.combine(base, {"law": 1.0, "poems": 1.0}, name="sum")
    found = []
    for active in (("law", "poems"), ("sum",)):
        with inlay.using(base, *active), torch.no_grad():
            found.append(base(IDS).last_hidden_state)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_top_keeps_the_largest_and_drop_keeps_the_mean() -> None:
    change = torch.tensor([[3.0, -4.0], [0.5, 1.0]])
    assert top(change, 0.5).tolist() == [[3.0, -4.0], [0.0, 0.0]]
    dropped = drop(torch.ones(200, 200), 0.25, torch.Generator().manual_seed(0))
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert abs(dropped.mean() - 1) < 4 * (3 / 40_000) ** 0.5  # four standard errors


def test_ties_by_hand() -> None:
    changes = torch.tensor([[1.0, 2.0, -1.0, 0.0], [3.0, -1.0, -3.0, 0.0], [-1.0, -0.5, 1.0, 0.0]])
    assert agreed(changes, "total").tolist() == [2.0, 2.0, -2.0, 0.0]
    assert agreed(changes, "frequency").tolist() == [2.0, -0.75, -2.0, 0.0]


def test_a_negative_weight_votes_against() -> None:
    one, other = torch.tensor([2.0]), torch.tensor([3.0])
    found = rule("ties", 1.0, "total", torch.Generator())([one, other], [1.0, -1.0])
    assert found.tolist() == [-3.0]


@pytest.mark.parametrize("how", ["magnitude_prune", "dare_linear"])
def test_at_density_one_nothing_is_pruned(how: str) -> None:
    base = model()
    inlay.combine(base, {"law": 0.5, "poems": 2.0}, how, "pruned", density=1.0, rank=16)
    inlay.combine(base, {"law": 0.5, "poems": 2.0}, name="summed")
    for found, expected in zip(deltas(base, "pruned").values(), deltas(base, "summed").values(), strict=True):
        close(found, expected)


def test_dare_is_the_same_for_the_same_seed() -> None:
    base = model()
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        inlay.combine(base, {"law": 1.0}, "dare_linear", name, seed=seed, rank=16)
    one, again, other = (deltas(base, name) for name in ("one", "again", "other"))
    assert all(torch.equal(one[place], again[place]) for place in one)
    assert not any(torch.equal(one[place], other[place]) for place in one)


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_a_lower_rank_is_the_nearest_there_is() -> None:
    base = model()
    inlay.combine(base, {"law": 1.0, "poems": 0.5}, name="exact")
    inlay.combine(base, {"law": 1.0, "poems": 0.5}, name="thin", rank=2)
    for found, whole in zip(deltas(base, "thin").values(), deltas(base, "exact").values(), strict=True):
        u, s, vh = torch.linalg.svd(whole)
        close(found, u[:, :2] * s[:2] @ vh[:2])


@pytest.mark.parametrize("rank", [None, 1, 3, 0.5, 0.99])
def test_factors_and_matrices_give_the_same(rank: int | float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 12, generator=generator), torch.randn(9, 5, generator=generator)
    thin, dense = (factored(change, rank) for change in (Change(a, b), Change(matrix=b @ a)))
    close(thin[1] @ thin[0], dense[1] @ dense[0])
    assert rank is None or thin[0].shape == dense[0].shape


def test_a_share_is_kept() -> None:
    matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0]))  # squares: 16, 4, 1, 1 of 22
    assert [factored(Change(matrix=matrix), share)[0].shape[0] for share in (0.5, 0.9, 0.95, 0.999)] == [1, 2, 3, 4]


def test_sums_of_factors_and_matrices() -> None:
    a, b, m = torch.randn(2, 4), torch.randn(3, 2), torch.randn(3, 4)
    close(added([Change(a, b), Change(matrix=m)]).dense(), b @ a + m)


# -- against HF peft ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "theirs", "options"),
    [
        ("linear", "cat", {}),
        ("linear", "svd", {"rank": 4}),
        ("magnitude_prune", "magnitude_prune_svd", {"rank": 4, "density": 0.3}),
        ("ties", "ties_svd", {"rank": 4, "density": 0.3}),
        ("ties", "ties_svd", {"rank": 4, "density": 0.3, "sign": "frequency"}),
    ],
)
def test_the_same_as_hf_peft(how: str, theirs: str, options: dict[str, Any], tmp_path: Path) -> None:
    methods = {name: inlay.LoRA(r=r, alpha=3, targets="query,value") for name, r in (("law", 2), ("poems", 3))}
    ours = model(**methods)
    for name in methods:
        inlay.save(ours, tmp_path / name, name=name)
    inlay.combine(ours, {"law": 0.5, "poems": 0.5}, how, "both", **options)
    inlay.activate(ours, "both")
    reference = peft.PeftModel.from_pretrained(tiny.build("bert"), tmp_path / "law", adapter_name="law")
    reference.load_adapter(tmp_path / "poems", "poems")
    renamed = {"rank": "svd_rank", "sign": "majority_sign_method", "density": "density"}
    given = {renamed[name]: value for name, value in options.items()}
    reference.add_weighted_adapter(["law", "poems"], [0.5, 0.5], "both", combination_type=theirs, **given)
    reference.set_adapter("both")
    close(ours(IDS).last_hidden_state, reference(IDS).last_hidden_state)
    inlay.save(ours, tmp_path / "both", name="both")
    back = peft.PeftModel.from_pretrained(tiny.build("bert"), tmp_path / "both")
    close(ours(IDS).last_hidden_state, back(IDS).last_hidden_state)


# -- any adapter -------------------------------------------------------------------------------------------------------


HOSTS: dict[str, tuple[str, inlay.Method]] = {
    "lora": ("llama", inlay.LoRA(r=2, targets="all-linear")),
    "pissa": ("bert", inlay.LoRA(r=2, init="pissa", targets="attention")),
    "transposed": ("gpt2", inlay.LoRA(r=2, targets="attention")),
    "a table": ("bert", inlay.LoRA(r=2, targets="word_embeddings")),
    "loha": ("bert", inlay.LoHa(r=2, targets="attention")),
    "dora": ("llama", inlay.DoRA(r=2, targets="attention")),
    "ia3": ("llama", inlay.IA3()),
}


@pytest.mark.parametrize("kind", HOSTS)
def test_any_change_of_weights_becomes_a_lora(kind: str, tmp_path: Path) -> None:
    name, method = HOSTS[kind]
    base = model(name, law=method)
    expected = base(IDS).last_hidden_state
    inlay.to_lora(base, "law", "thin", rank=64)
    inlay.activate(base, "thin")
    close(base(IDS).last_hidden_state, expected)
    inlay.save(base, tmp_path, name="thin")
    close(inlay.load(tiny.build(name), tmp_path)(IDS).last_hidden_state, expected)


def test_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)).requires_grad_(False)
    for name in ("law", "poems"):
        inlay.attach(net, inlay.LoRA(r=2, targets="0,1"), name)
        randomise(net, name)
    inlay.combine(net, {"law": 0.5, "poems": -2.0}, name="both")
    both, law, poems = (deltas(net, name) for name in ("both", "law", "poems"))
    for place, found in both.items():
        close(found, 0.5 * law[place] - 2.0 * poems[place])


def test_heads_are_combined_as_changes_of_the_base() -> None:
    base = model("bert", "sequence")
    own = {name: dict(adapters_of(base).get(name).placed[1]) for name in ("law", "poems")}
    values = {name: {s.name: p.get_parameter("value") for s, p in placed.items()} for name, placed in own.items()}
    inlay.combine(base, {"law": 0.5, "poems": 0.25}, name="both")
    for site, piece in adapters_of(base).get("both").placed[1]:
        start = site.weight
        expected = start + 0.5 * (values["law"][site.name] - start) + 0.25 * (values["poems"][site.name] - start)
        close(piece.get_parameter("value"), expected)


# -- what it leaves alone ----------------------------------------------------------------------------------------------


def test_the_new_adapter_is_neither_active_nor_trainable() -> None:
    base = model()
    before, trained = base(IDS).last_hidden_state, {n for n, p in base.named_parameters() if p.requires_grad}
    inlay.combine(base, {"law": 1.0, "poems": 1.0}, name="both")
    assert inlay.active(base) == ("law",)
    assert {name for name, p in base.named_parameters() if p.requires_grad} == trained
    assert torch.equal(base(IDS).last_hidden_state, before)


BAD: dict[str, tuple[type[Exception], str, Any]] = {
    "no adapters": (ConfigError, "no adapters", lambda base: inlay.combine(base, {})),
    "unknown": (AdapterError, "no adapter 'lwa'.*did you mean 'law'", lambda base: inlay.combine(base, {"lwa": 1.0})),
    "taken": (AdapterError, "'poems' is loaded already", lambda base: inlay.combine(base, {"law": 1.0}, name="poems")),
    "rule": (ConfigError, "how='tise'.*did you mean 'ties'", lambda base: inlay.combine(base, {"law": 1.0}, "tise")),
    "density": (ConfigError, "density=0", lambda base: inlay.combine(base, {"law": 1.0}, "ties", density=0)),
    "no number": (ConfigError, "'law': 'a'", lambda base: inlay.combine(base, {"law": "a"})),  # type: ignore[dict-item]
    "no finite one": (ConfigError, "finite number", lambda base: inlay.combine(base, {"law": float("nan")})),
    "seed": (ConfigError, "seed='a'", lambda base: inlay.combine(base, {"law": 1.0}, "dare_linear", seed="a")),  # type: ignore[arg-type]
    "rank": (ConfigError, "rank=0", lambda base: inlay.combine(base, {"law": 1.0}, rank=0)),
    "share": (ConfigError, r"rank=1\.5", lambda base: inlay.combine(base, {"law": 1.0}, rank=1.5)),
    "no rank": (ConfigError, "say a rank", lambda base: inlay.to_lora(base, "law", rank=None)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    error, message, act = BAD[case]
    base = model()
    before = list(base.state_dict())
    with pytest.raises(error, match=message):
        act(base)
    assert list(base.state_dict()) == before


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (inlay.PromptTuning(num_virtual_tokens=2), "PromptEntry"),
        (inlay.IA3(), "changes the bias too"),
        (inlay.BitFit(), "TrainedCopy"),
    ],
)
def test_what_is_no_change_of_a_weight_is_refused(method: inlay.Method, message: str) -> None:
    base = model("bert", law=method)
    for name, parameter in base.named_parameters():
        if name.endswith(".bias"):
            parameter.data.fill_(0.1)
    before = list(base.state_dict())
    with pytest.raises(UnsupportedError, match=f"'law' cannot be combined: .*{message}"):
        inlay.to_lora(base, "law")
    assert list(base.state_dict()) == before
