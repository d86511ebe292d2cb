"""`fuse` in whole models: which parts it takes, that these compute what they did, and what they keep."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine import tiny
from oracles.plain_formulas import attached, kept, size
from pieces.fusing_hosts import (
    IDS,
    MANY,
    GatedNetwork,
    X,
    alike,
    checkpoint_blocks,
    count,
    decoder,
    logits,
    outcome,
    pair,
)
from torch import Tensor, nn

import inlay
from inlay.engine.host import inlays_of
from inlay.errors import AdapterError, TargetError
from inlay.pieces.fusing import is_gated

WAYS = {"mlp": {}, "siblings": {"mlp": False, "siblings": True}, "both": {"siblings": True}}
EACH_WAY = pytest.mark.parametrize("way", WAYS)


def learned(plain: Any, way: str, **more: Any) -> tuple[Any, Any]:
    """The model, and a fused copy after its first call."""
    plain, fused = pair(plain, **WAYS[way], **more)
    logits(fused)
    return plain, fused


# -- what it computes --------------------------------------------------------------------------------------------------


@EACH_WAY
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"])
def test_the_model_computes_what_it_did(name: str, way: str) -> None:
    plain, fused = pair(decoder(name), **WAYS[way])
    truth = outcome(plain)
    for _ in range(3):  # the first call learns
        alike(outcome(fused), truth, MANY if "siblings" in WAYS[way] else 0)
    y = logits(fused)
    assert count(y, "GatedLowRank") == (0 if way == "siblings" else 2)  # two layers
    assert count(y, "Siblings") == (0 if way == "mlp" else 4)  # q,k,v and gate,up
    assert count(y, "LowRankLinear") == {"mlp": 12, "siblings": 4, "both": 2}[way]  # of seven a layer
    assert count(logits(plain), "LowRankLinear") == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"dropout": 0.3}, {"bias": "all"}, {"freeze_a": True}], ids=str)
def test_a_gated_network_gives_the_same_bits(dtype: torch.dtype, fields: dict[str, Any]) -> None:
    plain, fused = pair(decoder("qwen2", dtype, **fields))
    alike(outcome(fused), outcome(plain), 0)
    assert count(logits(fused), "GatedLowRank") == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_siblings_in_other_dtypes_differ_by_roundings(dtype: torch.dtype) -> None:
    """Both lie as near to what the same weights give in float64."""
    plain, fused = learned(decoder("qwen2", dtype), "both")
    truth = outcome(copy.deepcopy(plain).double())
    near, nearer = (
        sum(float((found[name].double() - expected).square().sum()) for name, expected in truth.items())
        for found in (outcome(fused), outcome(plain))
    )
    assert near < 1.5**2 * nearer
    assert near < 32**2 * torch.finfo(dtype).eps ** 2 * sum(float(t.square().sum()) for t in truth.values())


@EACH_WAY
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "v_proj", "down_proj", "gate_proj"])
def test_parts_that_are_frozen(frozen: str, way: str) -> None:
    model = decoder()
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    plain, fused = learned(model, way)
    alike(outcome(fused), outcome(plain))
    assert count(logits(fused), "GatedLowRank") == (0 if way == "siblings" else 2)


@EACH_WAY
@pytest.mark.parametrize("targets", ["q_proj,v_proj", "gate_proj,down_proj", "o_proj,down_proj", "k_proj,up_proj"])
def test_some_of_the_linears(targets: str, way: str) -> None:
    """Few are siblings, or none is; then nothing is shared, and where nothing is there to fuse that is said."""
    together = {"q_proj,v_proj": 2, "gate_proj,down_proj": 0}
    model = decoder(targets=targets)
    if way == "siblings" and targets not in together:
        with pytest.raises(TargetError, match="no linears with LoRA side by side"):
            inlay.fuse(model, **WAYS[way])
        return
    plain, fused = learned(model, way)
    alike(outcome(fused), outcome(plain))
    y = logits(fused)
    assert count(y, "GatedLowRank") == (2 if "down" in targets and way != "siblings" else 0)
    assert count(y, "Siblings") == (0 if way == "mlp" else together.get(targets, 0))


@EACH_WAY
def test_generation_with_a_cache_is_the_same_token_by_token(way: str) -> None:
    plain, fused = learned(decoder().eval(), way)
    wanted = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    found, truth = (model.generate(IDS, return_dict_in_generate=True, **wanted) for model in (fused, plain))
    assert torch.equal(found.sequences, truth.sequences)
    for one, other in zip(found.logits, truth.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@EACH_WAY
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", ["checkpointed", "not checkpointed"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradient_checkpointing(way: str, reentrant: bool, first: str, p: float) -> None:
    """Whether who shares was learned before or not; no call may go another way when it is computed again."""
    shared = {"shared_dropout": True} if way != "mlp" else {}
    plain, fused = pair(decoder(dropout=p), **WAYS[way], **shared)
    if first == "not checkpointed":
        logits(fused)
    elif way != "mlp":
        plain = copy.deepcopy(fused)  # never learns: one mask for each
        inlay.fuse(plain)
    truth = outcome(copy.deepcopy(plain)) if way == "mlp" or first == "checkpointed" or not p else outcome(fused)
    checkpoint_blocks(fused, reentrant)
    fused.enable_input_require_grads()
    for _ in range(3):
        alike(outcome(fused), truth)
    with torch.no_grad():
        fused.eval()(input_ids=IDS)  # nor between a forward and its backward
    alike(outcome(fused.train()), truth)


@EACH_WAY
def test_autocast_around_all(way: str) -> None:
    plain, fused = learned(decoder(dtype=torch.float32), way)

    def run(model: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return logits(model)

    truth = outcome(plain, run)
    rounding = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps  # gradients of float32 masters
    alike(outcome(fused, run), truth, 0 if way == "mlp" else 16 * rounding)
    assert count(run(fused), "Siblings") == (0 if way == "mlp" else 4)
    if count(run(plain), "LowRankLinear") == 14:  # the last linear is one function by itself
        assert count(run(fused), "GatedLowRank") == (0 if way == "siblings" else 2)


# -- what it keeps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_gated_network_keeps_two_products_fewer(dtype: torch.dtype, dropout: float) -> None:
    plain, fused = pair(decoder(dtype=dtype, dropout=dropout))
    found = []
    for model in (plain, fused):
        with kept(*model.parameters()) as tensors:
            logits(model)
        found.append(size(tensors))
    tokens, width, layers = IDS.numel(), plain.config.intermediate_size, 2
    assert found[0] - found[1] == 2 * layers * tokens * width * torch.finfo(dtype).bits // 8


# -- which parts it takes ----------------------------------------------------------------------------------------------


class Dropping(GatedNetwork):
    def forward(self, x: Tensor) -> Tensor:
        product = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(F.dropout(product, 0.5, self.training))


class DroppingByChild(GatedNetwork):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.drop(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Scaled(GatedNetwork):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


class Swapped(GatedNetwork):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Residual(GatedNetwork):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Rounded(GatedNetwork):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj((self.act_fn(self.gate_proj(x).float()) * self.up_proj(x)).to(x.dtype))


class Two(GatedNetwork):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + y)


class Raising(GatedNetwork):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("something it expected")


class LeavingMark(GatedNetwork):
    def __init__(self) -> None:
        super().__init__(act_fn=nn.SiLU(inplace=True))


class Random(GatedNetwork):
    def __init__(self) -> None:
        super().__init__(act_fn=nn.RReLU().eval())


class Learning(GatedNetwork):
    def __init__(self) -> None:
        super().__init__(act_fn=nn.PReLU(dtype=torch.float64))


LOOK_ALIKES = [Dropping, DroppingByChild, Scaled, Swapped, Residual, Rounded, Two, Raising, LeavingMark, Random]


@pytest.mark.parametrize("cls", LOOK_ALIKES)
@pytest.mark.parametrize("training", [True, False])
def test_a_module_of_the_same_names_and_another_formula_is_not_taken(cls: type[nn.Module], training: bool) -> None:
    assert is_gated(GatedNetwork())
    assert not is_gated(cls().train(training))
    base = nn.Sequential(nn.Identity(), cls()).train(training)
    model = attached("lora", base, targets="gate_proj,up_proj,down_proj")
    with pytest.raises(TargetError, match="Sequential has no gated feed-forward network"):
        inlay.fuse(model)


def test_a_forward_that_was_set_on_the_module_is_not_taken() -> None:
    """As accelerate's device hooks do."""
    module = GatedNetwork()
    module.forward = lambda x: 2 * GatedNetwork.forward(module, x)  # type: ignore[method-assign]
    assert not is_gated(module)


def test_an_activation_that_learns_gets_its_gradient() -> None:
    model = inlay.fuse(attached("lora", nn.Sequential(Learning()), targets="down_proj"))
    activation = model[0].act_fn
    activation.weight.requires_grad_()
    y = model(X)
    assert count(y, "GatedLowRank") == 0
    assert torch.autograd.grad(y.sum(), activation.weight)[0].abs() > 0


def test_looking_for_gated_networks_calls_no_hook_and_draws_nothing() -> None:
    model = decoder(dropout=0.5)
    calls: list[str] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    state = torch.random.get_rng_state()
    inlay.fuse(model, siblings=True)
    assert calls == []
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", ["t5", "t5-gated", "bert", "gpt2"])
def test_models_without_such_networks(name: str) -> None:
    model = attached("lora", tiny.build(name), targets="all-linear")
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(TargetError, match="has no gated feed-forward network"):
        inlay.fuse(model)
    with pytest.raises(TargetError, match="no part that was asked for"):
        inlay.fuse(model, mlp=False)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("name", ["t5", "t5-gated", "albert", "bert", "bart"])
def test_siblings_of_other_architectures(name: str) -> None:
    """T5 and BART read another x in cross-attention for q than for k and v; ALBERT's layers are one layer."""
    model = attached("lora", tiny.build(name).double(), targets="all-linear")

    def run(model: Any) -> Tensor:
        more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
        return model(input_ids=IDS, **more).last_hidden_state

    plain, fused = pair(model, mlp=False, siblings=True)
    truth = outcome(plain, run)
    for _ in range(3):
        alike(outcome(fused, run), truth)
    assert count(run(fused), "Siblings") == {"t5": 6, "t5-gated": 10, "albert": 2, "bert": 2, "bart": 6}[name]


# -- what comes before and after ---------------------------------------------------------------------------------------


def test_nothing_attached() -> None:
    with pytest.raises(AdapterError, match="nothing is attached"):
        inlay.fuse(tiny.build("llama"))


@EACH_WAY
def test_it_can_be_asked_for_twice_and_refused_once_it_is_there(way: str) -> None:
    plain, fused = learned(decoder(), way)
    again = inlay.fuse(fused, **WAYS[way])
    assert again is fused
    logits(again)
    alike(outcome(again), outcome(plain))
    number = count(logits(again), "GatedLowRank"), count(logits(again), "Siblings")
    assert number == {"mlp": (2, 0), "siblings": (0, 4), "both": (2, 4)}[way]
    with pytest.raises(TargetError):
        inlay.fuse(fused, mlp=False)
    assert number == (count(logits(again), "GatedLowRank"), count(logits(again), "Siblings"))


@EACH_WAY
def test_detach_leaves_no_trace(way: str) -> None:
    base = tiny.build("llama", "causal")
    before = [(name, type(module), list(module._modules)) for name, module in base.named_modules()]
    keys, truth = list(base.state_dict()), logits(base)
    model = attached("lora", base, targets="all-linear")
    keys_attached = list(model.state_dict())
    logits(inlay.fuse(model, **WAYS[way]))
    assert list(model.state_dict()) == keys_attached
    inlay.detach(model)
    assert [(name, type(module), list(module._modules)) for name, module in base.named_modules()] == before
    assert list(base.state_dict()) == keys
    assert torch.equal(logits(base.eval()), truth)


@EACH_WAY
def test_copies_and_pickles_are_fused_too(way: str, tmp_path: Path) -> None:
    plain, fused = learned(decoder(), way)
    torch.save(fused, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    truth = outcome(plain)
    for model in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), loaded):
        logits(model)
        alike(outcome(model), truth)
        assert count(logits(model), "GatedLowRank") == (0 if way == "siblings" else 2)
        assert count(logits(model), "Siblings") == (0 if way == "mlp" else 4)
        own = {id(module) for module in model.modules()}
        for module in model.modules():
            assert (inlays := inlays_of(module)) is None or id(inlays.host) in own


@EACH_WAY
def test_files_are_those_of_the_model_as_it_was(way: str, tmp_path: Path) -> None:
    plain, fused = learned(decoder(dtype=torch.float32), way)
    for model, name in ((plain, "plain"), (fused, "fused")):
        inlay.save(model, tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "fused").iterdir())
    tensors = "adapter_model.safetensors"
    assert (tmp_path / "plain" / tensors).read_bytes() == (tmp_path / "fused" / tensors).read_bytes()
    inlay.load(fused, tmp_path / "plain", name="second")
    inlay.activate(fused, "second")
    inlay.trainable(fused, "second")
    renamed = {name.replace(".default.", ".second."): value for name, value in outcome(plain).items()}
    alike(outcome(fused), renamed, 0 if way == "mlp" else MANY)
