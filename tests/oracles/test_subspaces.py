"""Methods that change W within subspaces of its own, against HF peft: outputs, gradients, and files both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from oracles.against_peft import Case
from oracles.other_methods import both_ways, ids, model, pairs_of_ids
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

import inlay
from inlay.engine.adapters import adapters_of, find_adapters
from inlay.errors import ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),  # FRoD's, in peft
]

ATTENTION = ["query", "key", "value", "attention.output.dense"]
CASES: dict[str, tuple[inlay.Method, peft.PeftConfig]] = {
    "deft": (inlay.DEFT(r=3, targets="attention"), peft.DeftConfig(r=3, target_modules=ATTENTION)),
    "deft, qr": (
        inlay.DEFT(r=3, alpha=5, decomposition_method="qr", targets="query"),
        peft.DeftConfig(r=3, alpha=5, decomposition_method="qr", target_modules=["query"]),
    ),
    "deft, para": (inlay.DEFT(para=True, targets="query"), peft.DeftConfig(para=True, target_modules=["query"])),
    "frod": (
        inlay.FRoD(sparse_rate=0.1, targets="attention"), peft.FrodConfig(sparse_rate=0.1, target_modules=ATTENTION)
    ),
    "adamss": (
        inlay.AdaMSS(r=8, num_subspaces=3, subspace_rank=2, targets="attention"),
        peft.AdamssConfig(r=8, num_subspaces=3, subspace_rank=2, target_modules=ATTENTION),
    ),
    "adamss, fewer ranks": (
        inlay.AdaMSS(num_subspaces=4, subspace_rank=5, use_dynamic_rank=True, random_seed=3, targets="query"),
        peft.AdamssConfig(
            num_subspaces=4, subspace_rank=5, use_dynamic_rank=True, random_seed=3, target_modules=["query"]
        ),
    ),
    "osf": (inlay.OSF(targets="attention"), peft.OSFConfig(target_modules=ATTENTION)),
    "osf, more and fewer inputs than outputs": (
        inlay.OSF(effective_rank=9, targets="up,down"),
        peft.OSFConfig(effective_rank=9, target_modules=["intermediate.dense", "0.output.dense", "1.output.dense"]),
    ),
    "osf, shares": (
        inlay.OSF(effective_rank=0.25, targets="query,key", overrides={"key": {"effective_rank": 20}}),
        peft.OSFConfig(effective_rank=0.25, target_modules=["query", "key"], rank_pattern={"key": 20}),
    ),
    "frod, from the seed": (
        inlay.FRoD(seed=3, save_projection=False, targets="attention"),
        peft.FrodConfig(projection_prng_key=3, save_projection=False, target_modules=ATTENTION),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    method, config = CASES[name]
    both_ways(Case(model("bert"), ids, {}, method), config, tmp_path)


def test_deft_on_conv1d_and_beyond_the_outputs(tmp_path: Path) -> None:
    config = peft.DeftConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    both_ways(Case(model("gpt2"), ids, {}, inlay.DEFT(r=4, targets="c_attn")), config, tmp_path)
    layer = torch.nn.Sequential(torch.nn.Linear(6, 3))
    inlay.attach(layer, inlay.DEFT(targets="0"))
    assert [tuple(p.shape) for p in layer.parameters() if p.requires_grad] == [(3, 3), (3, 6)]  # 3 outputs, not r = 8


def test_frod_on_conv1d_and_in_both_stacks(tmp_path: Path) -> None:
    config = peft.FrodConfig(target_modules=["c_attn"], fan_in_fan_out=True, sparse_rate=0.1)
    both_ways(Case(model("gpt2"), ids, {}, inlay.FRoD(targets="c_attn", sparse_rate=0.1)), config, tmp_path / "gpt2")
    config = peft.FrodConfig(target_modules=["q"], save_projection=False, sparse_rate=0.1)
    both_ways(
        Case(model("t5"), pairs_of_ids, {}, inlay.FRoD(targets="q", sparse_rate=0.1)), config, tmp_path / "t5"
    )


def test_frod_starts_as_the_base_in_half_precision_where_peft_does_not() -> None:
    """U diag(l₀) Vᵀ is W up to the rounding of three factors: W itself has to stay in the sum."""

    def layers() -> torch.nn.Module:
        torch.manual_seed(0)
        steep = torch.logspace(0, -3, 32)  # singular values over three decades, as trained weights have them
        nets = [torch.nn.Linear(32, 32) for _ in range(2)]
        for net in nets:
            u, _, v = torch.linalg.svd(torch.randn(32, 32))
            net.weight.data = (u * steep) @ v
        return torch.nn.ModuleDict({"0": nets[0], "1": nets[1]}).bfloat16()

    x = torch.randn(8, 32, dtype=torch.bfloat16)
    base, ours = layers(), inlay.attach(layers(), inlay.FRoD(targets="0,1"))
    theirs = peft.get_peft_model(layers(), peft.FrodConfig(target_modules=["0", "1"]), autocast_adapter_dtype=False)
    with torch.no_grad():
        expected = base["0"](x)
        assert torch.equal(ours["0"](x), expected)
        error = (theirs.base_model.model["0"](x) - expected).float().norm() / expected.float().norm()
    assert error > 2**-9  # more than the rounding of one entry


def test_frod_makes_u_anew_for_the_basis_of_the_file(tmp_path: Path) -> None:
    """Another machine's decomposition may give V's columns other signs; peft keeps U of its own V all the same."""
    theirs = peft.get_peft_model(model("bert")(), peft.FrodConfig(target_modules=["query"])).eval()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.frod_V.self_query"
    tensors[key] = tensors[key].flip(1)
    save_file(tensors, file, {"format": "pt"})
    ours = inlay.load(model("bert")(), tmp_path)
    with torch.no_grad():
        base = model("bert")()(**ids()).last_hidden_state
        there = peft.PeftModel.from_pretrained(model("bert")(), tmp_path).eval()(**ids()).last_hidden_state
        found = []
        for _, piece in adapters_of(ours).get("default").pieces():
            piece.frod_lambda_l.copy_(piece.l_0)  # of the same columns, in their new order
            found.append(piece.faithful)
        torch.testing.assert_close(ours(**ids()).last_hidden_state, base, rtol=1e-4, atol=1e-5)
    assert all(found)
    assert (there - base).abs().max() > 1e-4


def test_adamss_reads_its_own_file_wherever_the_clusters_came_from(tmp_path: Path) -> None:
    """HF peft clusters anew at each load; a file of Inlay's says which rows belong together."""
    ours = inlay.attach(model("bert")(), inlay.AdaMSS(r=8, targets="query"))
    rows = []
    with torch.no_grad():
        for _, piece in adapters_of(ours).get("default").pieces():
            piece.resize(piece.clusters.flip(0), [len(a) for a in piece.adamss_A])  # as another version might
            rows.append(piece.clusters.clone())
            for parameter in piece.parameters():
                parameter.normal_()
    inlay.save(ours, tmp_path)
    loaded = inlay.load(model("bert")(), tmp_path)
    assert [p.clusters.tolist() for _, p in adapters_of(loaded).get("default").pieces()] == [r.tolist() for r in rows]
    assert torch.equal(loaded(**ids()).last_hidden_state, ours(**ids()).last_hidden_state)


def test_adamss_keeps_as_many_clusters_as_asked_where_peft_keeps_one_fewer() -> None:
    """The best `asa_target_subspaces` scores are above a threshold that peft sets at the last of them, and excludes."""
    fields = {"r": 8, "num_subspaces": 4, "use_asa": True, "asa_target_subspaces": 3}
    fields |= {"init_warmup": 1, "final_warmup": 6, "mask_interval": 2}
    ours = inlay.attach(model("bert")(), inlay.AdaMSS(**fields, targets="query"))
    theirs = peft.get_peft_model(model("bert")(), peft.AdamssConfig(**fields, target_modules=["query"]))
    (controller,) = inlay.controllers(ours)
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (ours, theirs)]
    optimizers = [torch.optim.AdamW(group, lr=1e-2) for group in trained]
    for step in range(1, 8):
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            net(**ids()).last_hidden_state.square().sum().backward()
            if net is ours:
                controller.before_step(optimizer)
            optimizer.step()
            if net is ours:
                controller.after_step(optimizer)
            else:
                theirs.base_model.update_and_allocate(step)
    clusters = controller.clusters()
    assert len(clusters) - len(controller.closed) == 3
    assert sum(p.requires_grad for name, p in theirs.named_parameters() if "adamss_B" in name) == 2
    before = {key: [p.detach().clone() for p in pair] for key, pair in clusters.items()}
    ours(**ids()).last_hidden_state.square().sum().backward()
    controller.before_step(optimizers[0])
    optimizers[0].step()
    moved = {k for k, pair in clusters.items() if not all(map(torch.equal, pair, before[k]))}
    assert moved == set(clusters) - controller.closed


def test_adamss_resumed_is_the_same_run() -> None:
    def run(interrupted: bool) -> list[torch.Tensor]:
        method = inlay.AdaMSS(
            r=8, num_subspaces=4, use_asa=True, asa_target_subspaces=2, init_warmup=1, final_warmup=6, mask_interval=2,
            targets="query",
        )  # fmt: skip
        net = inlay.attach(model("bert")(), method)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        for step in range(8):
            (controller,) = inlay.controllers(net)
            if interrupted and step == 3:
                state = controller.state_dict()
                (controller,) = adapters_of(net).get("default").controllers = [
                    method.controller(dict(controller.pieces))
                ]
                controller.load_state_dict(state)
            optimizer.zero_grad()
            net(**ids()).last_hidden_state.square().sum().backward()
            controller.before_step(optimizer)
            optimizer.step()
            controller.after_step(optimizer)
        return [p.detach() for p in net.parameters() if p.requires_grad]

    for one, other in zip(run(False), run(True), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_osf_on_conv1d_where_peft_trains_nothing_without_a_word(tmp_path: Path) -> None:
    """Against the explicit weight, decomposed with numpy, and its gradient from autograd, projected by hand."""
    theirs = peft.get_peft_model(model("gpt2")(), peft.OSFConfig(target_modules=["c_attn"]))
    assert not any(p.requires_grad for p in theirs.parameters())
    torch.manual_seed(0)
    layer = torch.nn.ModuleDict({"c": Conv1D(10, 6)})
    base: torch.Tensor = layer["c"].weight.detach().T.clone()
    inlay.attach(layer, inlay.OSF(effective_rank=2, targets="c"))
    ((_, piece),) = adapters_of(layer).get("default").pieces()
    u, s, v = (torch.from_numpy(part) for part in np.linalg.svd(base.numpy(), full_matrices=False))
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer["c"](x), x @ base.T + layer["c"].bias)
    with torch.no_grad():
        for parameter in piece.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    low = [p.detach().clone().requires_grad_() for p in piece.now()]
    weight = u[:, :2] @ torch.diag(s[:2]) @ v[:2] + low[0] @ torch.diag(low[1]) @ low[2]
    expected = x @ weight.T + layer["c"].bias
    torch.testing.assert_close(layer["c"](x), expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    layer["c"](x).square().sum().backward()
    du, ds, dv = (p.grad for p in low)
    wanted = (du - u[:, :2] @ (u[:, :2].T @ du), ds, dv - dv @ v[:2].T @ v[:2])
    for own, gradient in zip(piece.now(), wanted, strict=True):
        torch.testing.assert_close(own.grad, gradient, rtol=1e-3, atol=1e-4)
    inlay.save(layer, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "INLAY"


def test_osf_composes_two_adapters_where_peft_computes_the_first_alone() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.OSFConfig(target_modules=["0"]))
    theirs.add_adapter("law", peft.OSFConfig(target_modules=["0"]))
    theirs.base_model.set_adapter(["default", "law"])
    inlay.attach(net, inlay.OSF(targets="0"))
    inlay.attach(net, inlay.OSF(targets="0"), name="law")
    x = torch.randn(4, 8)
    with torch.no_grad():
        before, other = net(x), theirs(x)
        for _, piece in adapters_of(net).get("law").pieces():
            piece.osf_svd_params["S_low"].mul_(2)
        theirs.base_model.model[0].osf_svd_params["law"]["S_low"].mul_(2)
        assert not torch.allclose(net(x), before)
        assert torch.equal(theirs(x), other)
        expected = net(x)
        torch.testing.assert_close(inlay.merge(net)(x), expected)


@pytest.mark.parametrize("rank", [0, 1.0, 1.5, True, "x", 32])
def test_osf_ranks_that_freeze_nothing_or_all_are_refused(rank: Any) -> None:
    net = model("bert")()
    with pytest.raises(ConfigError, match=f"effective_rank={rank!r}"):
        inlay.attach(net, inlay.OSF(effective_rank=rank, targets="query"))
    assert find_adapters(net) is None


REFUSED: dict[str, dict[str, Any]] = {"Deft": {"bias": "deft_only"}, "Frod": {"bias": "frod_only"}}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_here_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (entry,) = REFUSED[name]
    config = getattr(peft, f"{name}Config")(target_modules=["query"], **REFUSED[name])
    peft.get_peft_model(model("bert")(), config).save_pretrained(tmp_path)
    with pytest.raises(inlay.InlayError, match=entry):
        inlay.load(model("bert")(), tmp_path)
