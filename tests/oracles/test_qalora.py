"""QA-LoRA against HF peft's forward on a stub of the GPTQ linears that it is for, against its paper, and its point."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from oracles.against_peft import gradients, gradients_of_peft, run, same_tensors
from peft.tuners.lora import gptq
from torch import Tensor, nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.errors import CheckpointError, ConfigError
from inlay.kernels.zero_points import folded, grouped


class QuantLinear(nn.Module):
    """What peft takes for a GPTQ linear: one that is no `nn.Linear`; here with a plain weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().clone())
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qweight, self.bias)  # type: ignore[arg-type]


class Pair(nn.Module):
    """Two linears of other sizes, called with one keyword, as the oracle's `run` does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.tanh(self.norm(self.first(x))))
        return result


def inputs() -> dict[str, Any]:
    return {"x": torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1))}


def as_gptq(model: nn.Module) -> nn.Module:
    """The model with both of its linears as peft's GPTQ ones."""
    for name in ("first", "second"):
        setattr(model, name, QuantLinear(getattr(model, name)))
    return model


@pytest.fixture
def known_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft takes the stub for a linear of gptqmodel's, which needs a GPU."""

    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
        known = type(target) is QuantLinear
        return gptq.GPTQLoraLinear(target, adapter_name, config=config, **kwargs) if known else None

    monkeypatch.setattr("peft.tuners.lora.model.dispatch_gptq", dispatch)


CONFIGS: dict[str, dict[str, Any]] = {
    "usual": {"r": 3, "lora_alpha": 5},
    "patterns": {"r": 2, "use_rslora": True, "rank_pattern": {"first": 4}, "alpha_pattern": {"second": 3}},
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # peft's, of the stub
@pytest.mark.usefixtures("known_to_peft")
@pytest.mark.parametrize("name", CONFIGS)
def test_both_ways(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    fields: dict[str, Any] = {"target_modules": ["first", "second"], "use_qalora": True, "qalora_group_size": 4}
    theirs = peft.get_peft_model(as_gptq(Pair()), peft.LoraConfig(**fields, **CONFIGS[name])).eval()
    assert theirs.base_model.model.first.lora_A["default"].weight.shape[1] == 3
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    expected, their_gradients = run(theirs, inputs()), gradients_of_peft(theirs)
    ours = inlay.load(Pair(), tmp_path / "theirs", trainable=True)
    torch.testing.assert_close(run(ours, inputs()), expected, rtol=1e-5, atol=1e-5)
    found = gradients(ours)
    assert found.keys() == their_gradients.keys()
    for key, gradient in their_gradients.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-5)
    inlay.save(ours, tmp_path / "ours")
    same_tensors(tmp_path / "theirs", tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_qalora"], config["qalora_group_size"]) == ("LORA", True, 4)
    back = peft.PeftModel.from_pretrained(as_gptq(Pair()), tmp_path / "ours")
    torch.testing.assert_close(run(back, inputs(), backward=False), expected, rtol=1e-5, atol=1e-5)
    inlay.merge(ours)
    torch.testing.assert_close(run(ours, inputs(), backward=False), expected, rtol=1e-5, atol=1e-5)


def attached(**fields: Any) -> tuple[nn.Module, Any]:
    """`first` adapted, with factors that matter; and its piece."""
    torch.manual_seed(2)
    model = inlay.attach(Pair(), inlay.QALoRA(r=3, alpha=6, targets="first", init="random", **fields))
    ((_, piece),) = adapters_of(model).get("default").pieces()
    return model, piece


# -- the paper ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pooling", "factor"), [("sum", 4), ("mean", 1), ("groups", 3)])
def test_the_formula_by_brute_force(pooling: Any, factor: int) -> None:
    model, piece = attached(group_size=4, pooling=pooling)
    x = inputs()["x"]
    pooled = torch.stack([x[..., 4 * j : 4 * j + 4].mean(-1) for j in range(3)], -1) * factor
    with torch.no_grad():
        expected = Pair().first(x) + 6 / 3 * (pooled @ piece.lora_A.T @ piece.lora_B.T)
        torch.testing.assert_close(model.first(x), expected, rtol=1e-5, atol=1e-5)


def test_with_groups_of_one_it_is_lora() -> None:
    model, piece = attached(group_size=1)
    a, b, scale = piece.factors()
    x = inputs()["x"]
    with torch.no_grad():
        torch.testing.assert_close(model.first(x), Pair().first(x) + scale * (x @ a.T @ b.T), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("own", [4, 2], ids=["the weight's groups", "finer than the adapter's"])
def test_it_folds_into_the_zero_points_and_lora_does_not(bits: int, own: int) -> None:
    """The paper's point: the merged weight has the same codes, and the outputs are those before merging."""
    model, piece = attached(group_size=4)
    before = grouped(Pair().first.weight, bits, own)
    x = inputs()["x"].double()
    with torch.no_grad():
        model.first.weight.copy_(before.values())
        unmerged = model.double().first(x)
        after = folded(before, piece.by_group())
        assert torch.equal(after.codes, before.codes)
        bias = model.first.bias
        torch.testing.assert_close(F.linear(x, after.values().double(), bias), unmerged, rtol=1e-5, atol=1e-5)
        # LoRA's change is another number for each entry: at so many bits the merged weight is another one.
        other = before.values() + torch.randn(8, 3) @ torch.randn(3, 12) / 3
        again = grouped(other, bits, 4)
        assert not torch.equal(again.codes, grouped(Pair().first.weight, bits, 4).codes)
        assert (again.values() - other).abs().max() > 1e-3


@pytest.mark.parametrize("load", ["4bit", "8bit"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")  # bitsandbytes casts to half precision for its kernel
def test_on_weights_that_bitsandbytes_has_quantised(load: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 16)
    if load == "4bit":
        host = bitsandbytes.nn.Linear4bit(64, 16, compute_dtype=torch.float32, quant_type="nf4")
        host.weight = bitsandbytes.nn.Params4bit(plain.weight.detach(), requires_grad=False, quant_type="nf4")
    else:
        host = bitsandbytes.nn.Linear8bitLt(64, 16, has_fp16_weights=False, threshold=6.0)
        host.weight = bitsandbytes.nn.Int8Params(plain.weight.detach(), requires_grad=False, has_fp16_weights=False)
    model, x = nn.Sequential(host.to("cpu")), torch.randn(5, 64)
    base = model(x).detach()
    codes = model[0].weight.data.clone()
    inlay.attach(model, inlay.QALoRA(r=2, group_size=16, targets="0"))
    assert torch.equal(model(x), base)
    ((_, piece),) = adapters_of(model).get("default").pieces()
    with torch.no_grad():
        piece.lora_B.normal_()
    found = model(x)
    expected = base + 8 * (x.unflatten(-1, (4, 16)).sum(-1) @ piece.lora_A.T @ piece.lora_B.T)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in piece.parameters())
    assert torch.equal(model[0].weight.data, codes)


# -- what it keeps, and what it says -----------------------------------------------------------------------------------


def test_it_keeps_the_means_and_no_x() -> None:
    kept: dict[str, int] = {}
    for method in (inlay.LoRA(r=2, targets="0"), inlay.QALoRA(r=2, group_size=16, targets="0")):
        linear = inlay.attach(nn.Sequential(nn.Linear(64, 8)), method).train()
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel() if tensor.shape[0] == 100 else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            linear(torch.randn(100, 64))
        kept[method.kind] = sum(sizes)
    assert kept == {"lora": 100 * (64 + 2), "qalora": 100 * (64 // 16 + 2)}


def test_dropout_and_a_bias_on_b() -> None:
    model, piece = attached(group_size=4, dropout=0.5, lora_bias=True)
    with torch.no_grad():
        piece.lora_bias.normal_()
    x, base = inputs()["x"], Pair().first
    found = [m.first(x) for m in (model.eval(), inlay.merge(copy.deepcopy(model)))]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    torch.manual_seed(5)
    trained = model.train().first(x)
    torch.manual_seed(5)
    sums = F.dropout(x, 0.5).unflatten(-1, (3, 4)).sum(-1)
    expected = base(x) + 2 * (sums @ piece.lora_A.T @ piece.lora_B.T + piece.lora_bias)
    torch.testing.assert_close(trained, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_with_other_groups_is_not_swapped_in(tmp_path: Path) -> None:
    model, _ = attached(group_size=4)
    other, _ = attached(group_size=4, pooling="mean")
    inlay.save(other, tmp_path)
    with pytest.raises(CheckpointError, match="groups of 4 times 1, and groups of 4 times 4 here"):
        inlay.hot_swap(model, tmp_path)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: inlay.QALoRA(group_size=0), "QALoRA.group_size=0.*at least 1"),
        (lambda: inlay.QALoRA(pooling="max"), "QALoRA.pooling='max'.*sum, mean, groups"),
        (lambda: inlay.QALoRA(init="pissa"), "QALoRA.init='pissa'.*leave it out"),
        (lambda: attached(group_size=5), "QALoRA.group_size=5. does not divide the 12 inputs of first"),
    ],
)
def test_what_it_cannot_do(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_a_batch_without_a_row() -> None:
    """As an expert of a mixture has it that no token was sent to."""
    model, _ = attached(group_size=4)
    assert model.first(torch.zeros(0, 12)).shape == (0, 8)
    assert model.first(torch.zeros(2, 0, 12)).shape == (2, 0, 8)
