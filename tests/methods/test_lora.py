"""LoRA and DoRA by themselves: where they start, how much they hold, and that they run wherever the base does."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from engine import tiny
from oracles.against_peft import randomise
from torch import nn

import inlay
from inlay import DoRA, LoRA
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError, TargetError, UnsupportedError

IDS = torch.arange(2, 22).reshape(2, 10)


class Hosts(nn.Module):
    """One of each: embedding, convolution, linear (one output of which is dead), attention, bare 3-D parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.linear = nn.Linear(8, 12)
        self.narrow = nn.Linear(12, 8, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = nn.Parameter(torch.randn(3, 6, 8))
        with torch.no_grad():
            self.linear.weight[3] = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
        x = x + self.narrow(torch.tanh(self.linear(x)))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return torch.einsum("bli,eoi->belo", x, self.experts)


EVERYWHERE = "table,conv,linear,narrow,attention,experts"
MODULES = "table,conv,linear,narrow"


@pytest.fixture
def hosts() -> nn.Module:
    return Hosts().eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(10).reshape(2, 5)


# -- where it starts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method",
    [
        LoRA(targets=EVERYWHERE),
        LoRA(targets=EVERYWHERE, init="gaussian", rank_stabilised=True),
        LoRA(targets=MODULES + ",attention", lora_bias=True, exclude="table,attention"),
        LoRA(targets=MODULES, bias="all"),
        LoRA(r=4, targets="linear,narrow", init="olora"),
        LoRA(r=4, targets="linear,narrow", init="pissa"),
        DoRA(targets=MODULES),
        DoRA(targets=MODULES, init="gaussian", bias="lora_only"),
        DoRA(r=4, targets="linear,narrow", init="pissa"),
    ],
    ids=str,
)
@torch.no_grad()
def test_it_starts_as_the_base_bit_for_bit(
    hosts: nn.Module, ids: torch.Tensor, method: LoRA, dtype: torch.dtype
) -> None:
    hosts.to(dtype).requires_grad_(False)  # torch takes other kernels for weights that require gradients
    trained, before = hosts.train()(ids), hosts.eval()(ids)
    inlay.attach(hosts, method)
    assert torch.equal(hosts(ids), before)
    assert torch.equal(hosts.train()(ids), trained)


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_it_starts_as_the_base_where_weights_are_stored_transposed(method: Any) -> None:
    net = tiny.build("gpt2", "causal")
    before = net(IDS).logits
    inlay.attach(net, method(r=4, targets="c_attn,c_proj,c_fc"))
    assert torch.equal(net(IDS).logits, before)


def test_orthogonal_init_starts_as_the_base_to_rounding(hosts: nn.Module, ids: torch.Tensor) -> None:
    before = hosts(ids)
    inlay.attach(hosts, LoRA(r=4, alpha=4, targets="linear,narrow", init="orthogonal"))
    # B A is a product of orthogonal rows: zero up to the rounding of sums of four products of order 1.
    torch.testing.assert_close(hosts(ids), before, rtol=1e-5, atol=1e-5)
    for _, piece in adapters_of(hosts).get("default").pieces():
        assert piece.lora_A.abs().min() > 0
        assert piece.lora_B.abs().min() > 0


def test_pissa_and_olora_start_from_factors_of_w(hosts: nn.Module) -> None:
    weight = hosts.linear.weight.detach().clone()
    inlay.attach(hosts, LoRA(r=3, alpha=6, targets="linear", init="pissa"))
    ((_, piece),) = adapters_of(hosts).get("default").pieces()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(2 * piece.lora_B @ piece.lora_A, u[:, :3] * s[:3] @ v[:3])  # s = alpha / r = 2
    inlay.detach(hosts)
    inlay.attach(hosts, LoRA(r=8, targets="linear", init="olora"))
    ((_, piece),) = adapters_of(hosts).get("default").pieces()
    torch.testing.assert_close(piece.lora_B @ piece.lora_A, weight)  # full rank: Q R = W
    torch.testing.assert_close(piece.lora_B.T @ piece.lora_B, torch.eye(8), rtol=1e-5, atol=1e-5)
    assert torch.equal(hosts.linear._parameters["weight"], weight)


# -- how much it holds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (LoRA(r=3, targets="linear"), 3 * (8 + 12)),
        (LoRA(r=3, targets="table"), 3 * (11 + 8)),
        (LoRA(r=4, targets="conv"), 4 * (4 * 3) + 8 * 2),
        (LoRA(r=3, targets="attention"), 3 * (8 + 24) + 3 * (8 + 8)),
        (LoRA(r=3, targets="experts"), 3 * 3 * (8 + 6)),
        (LoRA(r=3, targets="linear", lora_bias=True), 3 * (8 + 12) + 12),
        (LoRA(r=3, targets="linear,narrow", bias="lora_only"), 3 * (8 + 12) + 3 * (12 + 8) + 12),
        (LoRA(r=3, targets="narrow", bias="all"), 3 * (12 + 8) + 8 + 12 + 8),
        (LoRA(r=3, targets="linear", init="pissa"), 3 * (8 + 12)),
        (DoRA(r=3, targets="linear"), 3 * (8 + 12) + 12),
        (DoRA(r=3, targets="table"), 3 * (11 + 8) + 8),
    ],
    ids=str,
)
def test_parameters_are_as_many_as_the_formula_says(hosts: nn.Module, method: LoRA, count: int) -> None:
    assert inlay.summary(inlay.attach(hosts, method)).trainable_parameters == count


def test_scale_is_alpha_over_r_or_over_its_root(hosts: nn.Module) -> None:
    assert LoRA(r=4, alpha=6).scale == 1.5
    assert LoRA(r=4, alpha=6, rank_stabilised=True).scale == 3
    inlay.attach(hosts, LoRA(r=4, alpha=6, targets="linear"))
    randomise(hosts)
    ((_, piece),) = adapters_of(hosts).get("default").pieces()
    torch.testing.assert_close(piece.delta(), 1.5 * piece.lora_B @ piece.lora_A)


def test_overrides_apply_field_by_field_and_must_match(hosts: nn.Module) -> None:
    overrides = {"linear": {"r": 5}, "re:(linear|narrow)": {"r": 2, "alpha": 9}}
    inlay.attach(hosts, LoRA(r=3, targets="linear,narrow,conv", exclude="conv", overrides=overrides))
    pieces = adapters_of(hosts).get("default").pieces()
    found = {site.name: (piece.lora_A.shape[0], piece.scale) for site, piece in pieces}
    assert found == {"linear": (5, 9 / 5), "narrow": (2, 9 / 2)}
    inlay.detach(hosts)
    with pytest.raises(TargetError, match=r"override 'linaer' matches none.*'linear'"):
        inlay.attach(hosts, LoRA(targets="linear", overrides={"linaer": {"r": 4}}))
    assert type(hosts.linear) is nn.Linear


# -- what it computes --------------------------------------------------------------------------------------------------


def test_dropout_zeroes_entries_of_x_in_training_only() -> None:
    net = nn.Sequential(nn.Linear(1000, 1000, bias=False)).eval()
    inlay.attach(net, LoRA(r=1000, alpha=1000, dropout=0.3, targets="re:0"))
    ((_, piece),) = adapters_of(net).get("default").pieces()
    with torch.no_grad():
        net[0]._parameters["weight"].zero_()
        piece.lora_A.copy_(torch.eye(1000))
        piece.lora_B.copy_(torch.eye(1000))
    x = torch.ones(20, 1000)
    assert torch.equal(net(x), x)
    y = net.train()(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.7))
    # 20,000 draws: the share kept has a standard error of 0.0033, and three of them are allowed.
    assert abs(kept.float().mean().item() - 0.7) < 0.01
    assert not torch.equal(net(x), y)


def test_dora_is_its_formula_with_the_norm_held_fixed() -> None:
    net = nn.Sequential(nn.Linear(5, 4))
    inlay.attach(net, DoRA(r=2, alpha=4, targets="re:0"))
    randomise(net)
    ((_, piece),) = adapters_of(net).get("default").pieces()
    weight, bias = net[0]._parameters["weight"].detach(), net[0].bias.detach()
    a, b, m = (p.detach().clone().requires_grad_() for p in (piece.lora_A, piece.lora_B, piece.magnitude))
    direction = weight + 2 * b @ a
    norm = direction.norm(dim=1, keepdim=True)
    x = torch.randn(3, 5)
    expected = x @ (m[:, None] * direction / norm.detach()).T + bias
    torch.testing.assert_close(net(x), expected)
    net(x).square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in ((piece.lora_A, a), (piece.lora_B, b), (piece.magnitude, m)):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("order", [("default", "law"), ("law", "default")])
@pytest.mark.parametrize("build", [Hosts, lambda: tiny.build("gpt2")], ids=["hosts", "gpt2"])
def test_dora_and_lora_compose_as_their_merged_weights_do(
    build: Any, order: tuple[str, str], ids: torch.Tensor
) -> None:
    net = build().eval()
    targets = MODULES if isinstance(net, Hosts) else "c_attn,c_fc"
    inlay.attach(net, LoRA(r=2, targets=targets))
    inlay.attach(net, DoRA(r=4, targets=targets), name="law")
    randomise(net)
    randomise(net, "law")
    inlay.activate(net, *order)
    expected = _output(net, ids)
    inlay.merge(net)
    torch.testing.assert_close(_output(net, ids), expected, rtol=1e-5, atol=1e-5)


# -- where it runs -----------------------------------------------------------------------------------------------------


def _output(net: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    output = net(ids)
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize(
    "method", [LoRA(targets=EVERYWHERE), DoRA(targets=MODULES), LoRA(r=3, targets="experts")], ids=str
)
def test_it_compiles_in_one_graph_with_its_gradients(hosts: nn.Module, ids: torch.Tensor, method: LoRA) -> None:
    inlay.attach(hosts, method)
    randomise(hosts)
    hosts(ids).sum().backward()
    expected = {name: p.grad.clone() for name, p in hosts.named_parameters() if p.grad is not None}
    hosts.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(hosts, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), hosts(ids))
    compiled(ids).sum().backward()
    for name, p in hosts.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name])


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", LoRA(r=2, targets="q_proj,v_proj")), ("llama", DoRA(r=2, targets="q_proj,v_proj")),
     ("mixtral", LoRA(r=2, targets="q_proj,gate_up_proj,down_proj"))],
    ids=["lora", "dora", "experts"],
)  # fmt: skip
def test_whole_models_compile_in_one_graph(name: str, method: LoRA) -> None:
    net = tiny.build(name, "causal")
    inlay.attach(net, method)
    randomise(net)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, net(IDS, use_cache=False).logits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", [LoRA(targets="all-linear"), DoRA(targets="query,value")], ids=str)
def test_gradient_checkpointing_changes_no_gradient(method: LoRA, reentrant: bool) -> None:
    net = tiny.build("llama", "causal")
    inlay.attach(net, method)
    randomise(net)

    def gradients() -> dict[str, torch.Tensor]:
        net.zero_grad()
        net(IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad}

    net.train()
    expected = gradients()
    enable = getattr(net, "activation_checkpointing_enable", net.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    if reentrant:  # it differentiates only through inputs that require gradients, as for any frozen base
        net.enable_input_require_grads()
    found = gradients()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", [LoRA(targets=EVERYWHERE), DoRA(targets=MODULES)], ids=str)
def test_autocast_runs_in_bfloat16_and_keeps_the_adapter_in_float32(
    hosts: nn.Module, ids: torch.Tensor, method: LoRA
) -> None:
    inlay.attach(hosts, method)
    randomise(hosts)
    expected = hosts(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = hosts(ids)
    assert output.dtype == torch.bfloat16
    # Four layers, each rounding to 8 bits: outputs of order 10 are off by a few times 2**-8 of that.
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.5)
    output.float().sum().backward()
    for parameter in adapters_of(hosts).get("default").parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype == torch.float32


def test_copies_do_not_share_factors(hosts: nn.Module, ids: torch.Tensor) -> None:
    inlay.attach(hosts, LoRA(targets="linear", init="pissa"))
    other = copy.deepcopy(hosts)
    randomise(other)
    assert not torch.equal(other(ids), hosts(ids))


# -- what it refuses ---------------------------------------------------------------------------------------------------


class Codes(nn.Linear):
    """A linear whose weight is stored as integers, as quantised ones are."""

    def __init__(self, wide: int, out: int) -> None:
        super().__init__(wide, out)
        self.weight = nn.Parameter((self.weight.detach() * 100).to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) / 100).T + self.bias


def test_a_quantised_weight_takes_lora_but_no_dora_factors_or_merging() -> None:
    net = nn.Sequential(Codes(8, 4))
    x = torch.randn(3, 8)
    before = net(x)
    inlay.attach(net, LoRA(r=2, targets="re:0"))
    assert torch.equal(net(x), before)
    randomise(net)
    assert not torch.equal(net(x), before)
    with pytest.raises(UnsupportedError, match=r"cannot merge into 0, whose weight is quantised to torch.int8"):
        inlay.merge(net)
    inlay.detach(net)
    with pytest.raises(UnsupportedError, match="quantised"):
        inlay.attach(net, DoRA(r=2, targets="re:0"))
    with pytest.raises(UnsupportedError, match="quantised"):
        inlay.attach(net, LoRA(r=2, targets="re:0", init="pissa"))


def test_a_parametrised_weight_takes_lora_but_no_dora_or_merging() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)))
    x = torch.randn(2, 4, 6)
    before = net(x)
    inlay.attach(net, LoRA(r=2, targets="re:0"))
    assert torch.equal(net(x), before)
    with pytest.raises(UnsupportedError, match="parametrised"):
        inlay.merge(net)
    inlay.detach(net)
    with pytest.raises(UnsupportedError, match="parametrised"):
        inlay.attach(net, DoRA(r=2, targets="re:0"))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(targets="table", lora_bias=True), "lora_bias.*table"),
        (LoRA(targets="attention", lora_bias=True), "lora_bias.*attention"),
        (LoRA(r=3, targets="experts", dropout=0.1), "no input to drop"),
        (LoRA(targets="conv", init="pissa"), "is for linears"),
        (DoRA(r=3, targets="experts"), "bare parameter"),
    ],
    ids=str,
)
def test_fields_without_effect_at_a_place_are_refused_there(hosts: nn.Module, method: LoRA, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        inlay.attach(hosts, method)
    assert not any("inlays" in name for name, _ in hosts.named_modules())


def test_an_embedding_with_a_look_up_of_its_own_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="OPTLearnedPositionalEmbedding looks its rows up"):
        inlay.attach(tiny.build("opt"), LoRA(targets="embed_positions"))


@pytest.mark.parametrize(
    "fields",
    [{"r": 0}, {"r": -2}, {"r": 2.0}, {"r": True}, {"alpha": 0}, {"alpha": -1}, {"alpha": math.nan}, {"alpha": "16"},
     {"dropout": 1.0}, {"dropout": -0.1}, {"dropout": "0.1"}, {"init": "svd"}, {"bias": "some"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_impossible_fields_are_refused_by_name(method: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{method.__name__}.{next(iter(fields))}"):
        method(**fields)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(r=3, targets="conv"), "r=3 does not divide by the 2 groups"),
        (LoRA(r=3, targets="linear", init="orthogonal"), "even rank"),
        (LoRA(r=4, targets="linear,narrow", init="olora", overrides={"linear": {"r": 9}}), "has only 8"),
        (LoRA(r=9, targets="linear"), r"smaller side of its weight, which is 8 at linear.* choose r from 1 to 8"),
    ],
    ids=str,
)
def test_ranks_that_do_not_fit_a_place_are_refused(hosts: nn.Module, method: LoRA, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        inlay.attach(hosts, method)
