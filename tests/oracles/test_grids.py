"""Methods whose change has a structure, against HF peft: outputs, gradients, and files both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from oracles.against_peft import CLOSE, Case, randomise, run, shift
from oracles.other_methods import both_ways, ids, model
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ATTENTION = ["query", "key", "value", "attention.output.dense"]
CASES: dict[str, tuple[inlay.Method, peft.PeftConfig]] = {
    "hira": (inlay.HiRA(r=3, targets="attention"), peft.HiraConfig(r=3, target_modules=ATTENTION)),
    "hira on an embedding": (
        inlay.HiRA(r=3, targets="word_embeddings"), peft.HiraConfig(r=3, target_modules=["word_embeddings"])
    ),
    "gralora": (
        inlay.GraLoRA(r=4, k=4, alpha=3, targets="attention"),
        peft.GraloraConfig(r=4, gralora_k=4, alpha=3, target_modules=ATTENTION)
    ),
    "gralora, hybrid": (
        inlay.GraLoRA(r=6, hybrid_r=2, targets="query,up"),
        peft.GraloraConfig(r=6, hybrid_r=2, target_modules=["query", "intermediate.dense"]),
    ),
    "delora": (
        inlay.DeLoRA(r=3, strength=2.5, targets="attention"),
        peft.DeloraConfig(r=3, delora_lambda=2.5, target_modules=ATTENTION)
    ),
    "delora, patterns": (
        inlay.DeLoRA(r=2, targets="query,key", overrides={"query": {"r": 4}, "key": {"strength": 5}}),
        peft.DeloraConfig(r=2, target_modules=["query", "key"], rank_pattern={"query": 4}, lambda_pattern={"key": 5}),
    ),
    "lokr": (inlay.LoKr(r=2, targets="attention"), peft.LoKrConfig(r=2, target_modules=ATTENTION)),
    "lokr, full": (
        inlay.LoKr(r=6, alpha=3, targets="ffn", decompose_factor=4),
        peft.LoKrConfig(r=6, alpha=3, decompose_factor=4, target_modules=["intermediate.dense", "output.dense"]),
    ),
    "lokr, both": (
        inlay.LoKr(r=2, targets="query", decompose_both=True, decompose_factor=8),
        peft.LoKrConfig(r=2, decompose_both=True, decompose_factor=8, target_modules=["query"]),
    ),
    "lokr, patterns": (
        inlay.LoKr(r=2, targets="query,key", overrides={"query": {"r": 1}, "key": {"alpha": 5}}),
        peft.LoKrConfig(r=2, target_modules=["query", "key"], rank_pattern={"query": 1}, alpha_pattern={"key": 5}),
    ),
    "miss": (inlay.MiSS(r=4, targets="attention"), peft.MissConfig(r=4, target_modules=ATTENTION)),
    "miss, shards that do not divide the inputs": (
        inlay.MiSS(r=5, targets="attention"), peft.MissConfig(r=5, target_modules=ATTENTION)
    ),
    "miss, mini": (
        inlay.MiSS(r=4, variant="mini", mini_r=8, targets="attention"),
        peft.MissConfig(r=4, init_weights="mini", mini_r=8, target_modules=ATTENTION),
    ),
    "miss, bat": (
        inlay.MiSS(r=4, variant="bat", targets="query,up"),
        peft.MissConfig(r=4, init_weights="bat", target_modules=["query", "intermediate.dense"]),
    ),
    "beft": (inlay.BEFT(), peft.BeftConfig(target_modules=["value"])),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    method, config = CASES[name]
    both_ways(Case(model("bert"), ids, {}, method), config, tmp_path)


class Picture(nn.Module):
    """Convolutions over one, two and three dimensions, one of them grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.plane = nn.Conv1d(4, 8, 3, padding=1), nn.Conv2d(8, 6, (3, 2), stride=2, bias=False)
        self.grouped, self.space = nn.Conv2d(6, 4, 2, groups=2, padding=1), nn.Conv3d(4, 4, (1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.plane(self.line(x).unflatten(-1, (6, 4)))
        result: Tensor = self.space(self.grouped(x).unsqueeze(2)).flatten(1)
        return result


CONVOLUTIONS: dict[str, tuple[inlay.Method, peft.PeftConfig]] = {
    "hira": (
        inlay.HiRA(r=2, targets="line,plane,space"), peft.HiraConfig(r=2, target_modules=["line", "plane", "space"])
    ),
    "lokr": (
        inlay.LoKr(r=1, targets="line,plane,grouped"), peft.LoKrConfig(r=1, target_modules=["line", "plane", "grouped"])
    ),
    "lokr, full": (
        inlay.LoKr(r=4, targets="plane,grouped"), peft.LoKrConfig(r=4, target_modules=["plane", "grouped"])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_both_ways(name: str, tmp_path: Path) -> None:
    method, config = CONVOLUTIONS[name]
    torch.manual_seed(0)
    built = Picture().eval()
    x = torch.randn(2, 4, 24)
    both_ways(Case(lambda: copy.deepcopy(built), lambda: {"x": x}, {}, method), config, tmp_path)


def test_peft_has_no_kronecker_product_on_1d_convolutions_of_full_rank(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(Picture(), peft.LoKrConfig(r=4, target_modules=["line"]))
    shift(theirs.parameters())
    place = theirs.base_model.model.line
    first, second = place.lokr_w1["default"], place.lokr_w2["default"]  # (2, 2) and (4, 2, 3)
    expected = torch.einsum("lm,knp->lkmnp", first, second).reshape(8, 4, 3) * 2
    assert (place.get_delta_weight("default") - expected).abs().max() > 0.01
    theirs.save_pretrained(tmp_path)
    with pytest.raises(inlay.InlayError, match="1-D convolutions W₂ has to be of low rank, so r below 2"):
        inlay.load(Picture(), tmp_path)


@pytest.mark.filterwarnings("ignore:.*Unsupported layer type:UserWarning")
@pytest.mark.parametrize("name", [name for name in CASES if "hira" not in name])
def test_two_adapters_add_up_as_in_peft(name: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(model("bert")(), CASES[name][1])
    theirs.add_adapter("second", CASES[name][1])
    theirs.base_model.set_adapter(["default", "second"])
    shift(parameter for key, parameter in theirs.named_parameters() if "default" in key or "second" in key)
    theirs.eval().save_pretrained(tmp_path, save_embedding_layers=False)
    ours = inlay.load(model("bert")(), tmp_path)
    inlay.activate(inlay.load(ours, tmp_path / "second", "second"), "default", "second")
    expected = run(theirs, ids(), backward=False)
    torch.testing.assert_close(run(ours, ids(), backward=False), expected, **CLOSE)
    torch.testing.assert_close(run(inlay.merge(ours), ids(), backward=False), expected, **CLOSE)


def test_two_hira_adapters_multiply_where_peft_adds() -> None:
    base = nn.Sequential(nn.Linear(6, 5))
    weight, x = base[0].weight.detach().clone(), torch.randn(3, 6)
    ours = inlay.attach(base, inlay.HiRA(r=2, targets="0"))
    inlay.activate(inlay.attach(ours, inlay.HiRA(r=2, targets="0"), name="second"), "default", "second")
    for name in ("default", "second"):
        randomise(ours, name)
        piece = getattr(base[0].inlays, name).hira
        weight = weight * (1 + piece.hira_B @ piece.hira_A)
    torch.testing.assert_close(ours(x), F.linear(x, weight, base[0].bias))


def test_peft_ignores_the_rank_pattern_of_a_first_hira_adapter(tmp_path: Path) -> None:
    config = peft.HiraConfig(r=2, target_modules=["query", "key"], rank_pattern={"query": 4})
    theirs = peft.get_peft_model(model("bert")(), config)
    theirs.save_pretrained(tmp_path)
    assert {len(t) for key, t in load_file(tmp_path / "adapter_model.safetensors").items() if "hira_A" in key} == {2}
    inlay.load(model("bert")(), tmp_path)
    ours = inlay.attach(model("bert")(), inlay.HiRA(r=2, targets="query,key", overrides={"query": {"r": 4}}))
    inlay.save(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == "INLAY"


DROPPING = [
    inlay.HiRA(r=2, dropout=0.5),
    inlay.GraLoRA(r=2, dropout=0.5),
    inlay.MiSS(r=2, dropout=0.5),
    inlay.MiSS(r=2, variant="bat", dropout=0.5),
]


@pytest.mark.parametrize("method", DROPPING, ids=lambda method: getattr(method, "variant", method.kind))
def test_dropout_is_on_what_the_change_reads(method: inlay.Method) -> None:
    base = nn.Linear(6, 4)
    weight, bias, x = base.weight.detach().clone(), base.bias.detach().clone(), torch.randn(5, 6)
    model = inlay.attach(nn.Sequential(base), method.replace(targets="0")).train()
    randomise(model)
    (piece,) = base.inlays.default.children()
    delta = piece.weight(weight) - weight
    torch.manual_seed(3)
    found = model(x)
    torch.manual_seed(3)
    expected = F.linear(x, weight, bias) + F.linear(F.dropout(x, 0.5), delta)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model.eval()(x), F.linear(x, weight + delta, bias))


@pytest.mark.parametrize(
    ("cls", "fields", "match"),
    [
        (inlay.GraLoRA, {"r": 3}, "k has to divide r"),
        (inlay.GraLoRA, {"hybrid_r": -1}, "at least 0"),
        (inlay.LoKr, {"decompose_factor": 0}, "at least 1 is needed, or -1"),
        (inlay.LoKr, {"decompose_factor": -2}, "at least -1"),
        (inlay.MiSS, {"variant": "bone"}, "choose one of plain, bat, mini"),
        (inlay.HiRA, {"dropout": 1.0}, r"probability in \[0, 1\)"),
    ],
)
def test_fields_that_cannot_be(cls: Any, fields: dict[str, Any], match: str) -> None:
    with pytest.raises(inlay.InlayError, match=match):
        cls(**fields)


QUANTISED = nn.Linear(6, 4)
QUANTISED.weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("place", "method", "match"),
    [
        (nn.Linear(6, 5), inlay.GraLoRA(r=2), "k=2 does not divide both of 5 by 6"),
        (nn.Linear(6, 5), inlay.MiSS(r=7), "its 6 inputs are fewer than r=7"),
        (nn.Linear(6, 5), inlay.MiSS(r=2, variant="bat"), "r=2 does not divide 5 by 6"),
        (nn.Linear(6, 5), inlay.MiSS(r=2, variant="mini", mini_r=2), "mini_r=2 does not divide 5"),
        (QUANTISED, inlay.HiRA(r=2), "needs W, and W is quantised"),
        (QUANTISED, inlay.MiSS(r=2, variant="bat"), "needs W, and W is quantised"),
        (QUANTISED, inlay.DeLoRA(r=2), "needs W's norms, and W is quantised"),
    ],
)
def test_places_that_do_not_fit(place: nn.Module, method: inlay.Method, match: str) -> None:
    with pytest.raises(inlay.InlayError, match=f"cannot sit at 0: .*{match}"):
        inlay.attach(nn.Sequential(place), method.replace(targets="0"))


@pytest.mark.parametrize("entry", [True, False])
def test_a_plain_miss_is_peft_s_default(entry: bool, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(model("bert")(), peft.MissConfig(r=4, init_weights=entry, target_modules=["query"]))
    theirs.save_pretrained(tmp_path)
    ours = inlay.load(model("bert")(), tmp_path)
    expected = run(theirs.eval(), ids(), backward=False)
    torch.testing.assert_close(run(ours, ids(), backward=False), expected, **CLOSE)
    inlay.save(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["init_weights"] is True


REFUSED: dict[str, Any] = {
    "delora": (peft.DeloraConfig(r=2, bias="delora_only", target_modules=["query"]), "bias"),
    "miss": (peft.MissConfig(r=2, bias="all", target_modules=["query"]), "bias"),
    "lokr": (peft.LoKrConfig(r=2, module_dropout=0.1, target_modules=["query"]), "module_dropout"),
    "gralora": (peft.GraloraConfig(r=2, bias="gralora_only", target_modules=["query"]), "bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_here_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config, entry = REFUSED[name]
    peft.get_peft_model(model("bert")(), config).save_pretrained(tmp_path)
    with pytest.raises(inlay.InlayError, match=entry):
        inlay.load(model("bert")(), tmp_path)
