"""Bottleneck adapters: each placement's formula by hand, the papers' counts, and a pair that leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from engine.tiny import Plain, build, build_transformer_encoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import inlay
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError, TargetError, UnsupportedError
from inlay.pieces.bottlenecks.bottleneck import Bottleneck

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # fp32, the same sums through two layers

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
Adapter = inlay.Adapter


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in adapters_of(model).get("default").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


def bottlenecks(model: nn.Module) -> list[Bottleneck]:
    return [module for module in model.modules() if isinstance(module, Bottleneck)]


def by_hand(network: Bottleneck, x: Tensor, f: Callable[[Tensor], Tensor] = F.relu, s: float = 1.0) -> Tensor:
    down, up = network.down, network.up
    return s * (f(x @ down.weight.T + down.bias) @ up.weight.T + up.bias)


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(2, 5, 32)


def test_pfeiffer_runs_the_norm_twice(hidden: Tensor) -> None:
    model = inlay.attach(build("bert"), Adapter(reduction_factor=8, layers=0))
    randomise(model)
    (network,) = bottlenecks(model)
    layer = model.encoder.layer[0]
    attended = layer.attention(hidden)[0]
    sub_layer = layer.output.dense(layer.intermediate(attended))
    norm = layer.output.LayerNorm
    normal = lambda t: F.layer_norm(t, (32,), norm.weight, norm.bias, norm.eps)  # noqa: E731
    up = by_hand(network, normal(sub_layer + attended))
    torch.testing.assert_close(layer(hidden), normal(up + sub_layer + attended), **CLOSE)


def test_pfeiffer_without_a_norm_after_the_addition_follows_the_network(hidden: Tensor) -> None:
    model = build("llama")
    mlp = model.layers[1].mlp
    base = mlp(hidden)
    inlay.attach(model, Adapter(reduction_factor=8, layers=-1))
    randomise(model)
    torch.testing.assert_close(mlp(hidden), base + by_hand(*bottlenecks(model), base), **CLOSE)


def test_houlsby_stands_before_both_residual_additions(hidden: Tensor) -> None:
    model = build("bert")
    layer = model.encoder.layer[0]
    inlay.attach(model, Adapter(placement="houlsby", bottleneck=4, activation="gelu", layers=0, train_norms=False))
    randomise(model)
    first = next(m for m in layer.attention.output.dense.modules() if isinstance(m, Bottleneck))
    second = next(m for m in layer.output.dense.modules() if isinstance(m, Bottleneck))
    with inlay.disabled(model):
        context = layer.attention.self(hidden)[0]
        h = layer.attention.output.dense(context)
        attended = layer.attention.output.LayerNorm(hidden + h + by_hand(first, h, F.gelu))
        h = layer.output.dense(layer.intermediate(attended))
        expected = layer.output.LayerNorm(attended + h + by_hand(second, h, F.gelu))
    torch.testing.assert_close(layer(hidden), expected, **CLOSE)


@pytest.mark.parametrize("name", ["bert", "llama", "albert", "opt", "mixtral"])
def test_parallel_adds_what_the_network_is_given(name: str) -> None:
    # In BERT, ALBERT and OPT the network is two linears of a larger module; in the others it is a module.
    model = build(name)
    seen: dict[str, Tensor] = {}
    method = Adapter(placement="parallel", bottleneck=4, scale=4.0, layers=0)
    sites = method.sites(inlay.SiteIndex(model))
    last = sites[0].module
    ups = [site.module for site in inlay.SiteIndex(model).sites if "up" in site.roles]
    first = ups[0] if sites[0].kind == "linear" else last
    first.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    last.register_forward_hook(lambda _, args, output: seen.update(h=output))
    ids = torch.arange(3, 13)[None]
    model(ids)
    before = seen["h"]
    inlay.attach(model, method)
    randomise(model)
    model(ids)
    if name != "albert":  # whose one layer is called again, and then on other inputs
        torch.testing.assert_close(seen["h"], before + by_hand(*bottlenecks(model), seen["x"], s=4.0), **CLOSE)
    assert not torch.equal(seen["h"], before)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "mixtral", "deepseek-v3", "vit", "albert", "gemma2", "whisper"])
def test_starts_as_the_base_to_the_bit(name: str, placement: str) -> None:
    model = build(name)
    inputs: dict[str, Tensor] = {"input_ids": torch.arange(3, 15).reshape(2, 6)}
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    if name == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    if name == "whisper":
        inputs = {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": torch.arange(3, 9).reshape(2, 3)}
    with torch.no_grad():  # with gradients, T5's attention takes another kernel once its bias is frozen
        base = model(**inputs)[0]
        inlay.attach(model, Adapter(placement=placement))
        assert torch.equal(model(**inputs)[0], base)
        randomise(model)
        assert not torch.equal(model(**inputs)[0], base)


def test_the_other_starts_are_near_the_base() -> None:
    model, ids = build("bert"), torch.arange(3, 13)[None]
    base = model(ids)[0]
    for init, deviation in (("bert", 0.02), ("houlsby", 0.01)):
        inlay.attach(model, Adapter(init=init, bottleneck=32))
        (network, _) = bottlenecks(model)
        assert abs(network.up.weight.std() - deviation) < 0.2 * deviation  # 1,024 draws
        assert init != "houlsby" or network.up.weight.abs().max() <= 0.02
        assert 0 < (model(ids)[0] - base).abs().max() < 0.1  # 32 · 0.02² · a norm of 1, a few times over
        inlay.detach(model)


@pytest.fixture(scope="module")
def bert_base() -> nn.Module:
    with torch.device("meta"):
        return transformers.BertModel(transformers.BertConfig())


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (Adapter(reduction_factor=16), 894_528),
        (Adapter(placement="houlsby", bottleneck=64, train_norms=False), 2_379_264),
        (Adapter(placement="houlsby", bottleneck=64), 2_379_264 + 38_400),
        (Adapter(placement="parallel", reduction_factor=16), 894_528),
    ],
)
def test_counts_of_the_papers(bert_base: nn.Module, method: Adapter, count: int) -> None:
    inlay.attach(bert_base, method)
    assert inlay.summary(bert_base).trainable_parameters == count
    inlay.detach(bert_base)


def test_norms_are_trained_where_asked() -> None:
    model = inlay.attach(build("bert", "masked"), Adapter(placement="houlsby"))
    trained = {path.rpartition(".inlays.")[0] for path, p in model.named_parameters() if p.requires_grad}
    norms = {path for path in trained if "LayerNorm" in path}
    assert len(norms) == 5
    assert not any(path.startswith("cls.") for path in norms)  # the head's own norm is the head's business
    inlay.detach(model)
    inlay.attach(model, Adapter(train_norms=True, layers=1))
    trained = {path.rpartition(".inlays.")[0] for path, p in model.named_parameters() if p.requires_grad}
    assert {path for path in trained if "LayerNorm" in path} == {
        "bert.encoder.layer.1.attention.output.LayerNorm",
        "bert.encoder.layer.1.output.LayerNorm",
    }


def gradients(model: nn.Module, call: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    call().square().mean().backward()
    return [p.grad.clone() for p in adapters_of(model).get("default").parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_pair_has_the_same_gradients_and_leaves_nothing_behind(reentrant: bool) -> None:
    model = inlay.attach(build("bert"), Adapter(placement="parallel", bottleneck=4)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    randomise(model)
    ids = torch.arange(3, 13)[None]
    expected = gradients(model, lambda: model(ids)[0])
    layers = model.encoder.layer
    for layer in layers:
        inner = layer.forward
        layer.forward = lambda h, *args, inner=inner, **kwargs: checkpoint(
            inner, h, *args, use_reentrant=reentrant, **kwargs
        )
    x = model.embeddings(ids).detach().requires_grad_()
    found = gradients(model, lambda: layers[1](layers[0](x)))
    assert len(found) == len(expected) == 8
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert all(network.hidden is None for network in bottlenecks(model))


def test_a_call_that_ends_between_the_places_leaves_nothing_behind() -> None:
    model = inlay.attach(build("bert"), Adapter(placement="parallel", bottleneck=4))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.encoder.layer[1].output.dense.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(torch.arange(3, 13)[None])
    handle.remove()
    assert all(network.hidden is None for network in bottlenecks(model))
    model(torch.arange(3, 13)[None])


def test_dropout_acts_in_training_alone(hidden: Tensor) -> None:
    model = inlay.attach(build("llama"), Adapter(bottleneck=16, dropout=0.5))
    randomise(model)
    mlp = model.layers[0].mlp
    assert torch.equal(mlp(hidden), mlp(hidden))
    model.train()
    assert not torch.equal(mlp(hidden), mlp(hidden))


def test_targets_and_overrides() -> None:
    method = Adapter(targets="key,value", bottleneck=2, overrides={"value": {"bottleneck": 3}})
    model = inlay.attach(build("bert"), method)
    assert [network.down.out_features for network in bottlenecks(model)] == [2, 3, 2, 3]


def test_torchs_own_encoder() -> None:
    for norm_first in (False, True):
        model = build_transformer_encoder(norm_first).requires_grad_(False)  # frozen, torch takes other kernels
        x = torch.randn(2, 5, 12, requires_grad=True)
        base = model(x)
        for placement in PLACEMENTS:
            inlay.attach(model, Adapter(placement=placement, bottleneck=2))
            assert torch.equal(model(x), base)
            randomise(model)
            assert not torch.equal(model(x), base)
            inlay.detach(model)


def test_what_is_refused() -> None:
    for wrong in (
        {"placement": "serial"}, {"bottleneck": 0}, {"bottleneck": 1.5}, {"reduction_factor": 0}, {"init": "zero"},
        {"dropout": 1.0},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"Adapter\({next(iter(wrong))}="):
            Adapter(**wrong)
    with pytest.raises(ConfigError, match="did you mean 'gelu'"):
        Adapter(activation="geluu")
    with pytest.raises(TargetError, match=r"no feed-forward network was recognised in Plain.*targets"):
        inlay.attach(Plain(), Adapter())


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.BatchNorm2d(4)])
def test_norms_with_channels_on_the_second_axis_are_refused(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm)
    with pytest.raises(UnsupportedError, match="second axis"):
        inlay.attach(model, inlay.Adapter(targets="name:1", bottleneck=2))
