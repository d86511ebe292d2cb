"""Loaded, active, trainable: three states, each changed by its own verb and nothing else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import inlay
from inlay.errors import AdapterError, ConfigError, TargetError


class Net(nn.Module):
    """Two linears, a norm and an embedding, in an order no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.second = nn.Linear(12, 4, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(torch.relu(self.first(self.embed(ids)))))


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 11, (3, 5))


def randomise(model: nn.Module, name: str = "default") -> None:
    from inlay.engine.adapters import adapters_of

    with torch.no_grad():
        for parameter in adapters_of(model).get(name).parameters():
            parameter.normal_(std=0.3)


def lora(**fields: object) -> inlay.LoRA:
    return inlay.LoRA(**{"r": 2, "targets": "first,second", **fields})


def test_attach_changes_neither_output_nor_bits_and_detach_restores_everything(net: Net, ids: torch.Tensor) -> None:
    before = net(ids)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    classes = {path: type(module) for path, module in net.named_modules()}
    net.norm.weight.requires_grad_(False)
    required = {name: p.requires_grad for name, p in net.named_parameters()}
    inlay.attach(net, lora())
    assert torch.equal(net(ids), before)
    assert isinstance(net.first, nn.Linear)
    assert type(net.first).__name__ == "Linear"
    assert set(state) <= set(net.state_dict())
    randomise(net)
    assert not torch.equal(net(ids), before)
    inlay.detach(net)
    assert torch.equal(net(ids), before)
    assert {path: type(module) for path, module in net.named_modules()} == classes
    assert {name: p.requires_grad for name, p in net.named_parameters()} == required
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())


def test_only_the_adapter_gets_gradients(net: Net, ids: torch.Tensor) -> None:
    inlay.attach(net, lora())
    net(ids).sum().backward()
    with_gradient = {name for name, p in net.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in net.named_parameters() if "inlays" in name}
    assert inlay.summary(net).trainable_parameters == 2 * (8 + 12) + 2 * (12 + 4)


def test_switching_activates_exactly_what_is_named(net: Net, ids: torch.Tensor) -> None:
    inlay.attach(net, lora())
    inlay.attach(net, lora(r=3), name="law")
    randomise(net)
    randomise(net, "law")
    both = net(ids)
    with inlay.using(net, "law"):
        law = net(ids)
        with inlay.disabled(net):
            base = net(ids)
    assert torch.equal(net(ids), both)
    inlay.activate(net, "law")
    assert torch.equal(net(ids), law)
    inlay.detach(net, "default")
    assert torch.equal(net(ids), law)
    inlay.detach(net)
    assert torch.equal(net(ids), base)


def test_disabled_and_switching_leave_what_is_trainable_alone(net: Net) -> None:
    inlay.attach(net, lora())
    inlay.attach(net, lora(), name="law")
    inlay.trainable(net, "law")

    def state() -> dict[str, bool]:
        return {name: p.requires_grad for name, p in net.named_parameters()}

    before = state()
    assert any(before.values())
    assert not any(required for name, required in before.items() if "default" in name)
    with inlay.disabled(net):
        assert state() == before
    inlay.activate(net, "default")
    assert state() == before


def test_an_eval_model_stays_in_eval_and_a_training_one_in_training(net: Net) -> None:
    inlay.attach(net, lora(dropout=0.5))
    assert not any(module.training for module in net.modules())
    inlay.detach(net)
    net.train()
    inlay.attach(net, lora(dropout=0.5))
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("order", [("default", "law"), ("law", "default")])
def test_merged_equals_unmerged_and_unmerge_restores_the_bits(
    net: Net, ids: torch.Tensor, order: tuple[str, str]
) -> None:
    inlay.attach(net, [lora(targets="first,second,embed")])
    inlay.attach(net, inlay.DoRA(r=2, targets="first,second,embed"), name="law")
    randomise(net)
    randomise(net, "law")
    inlay.activate(net, *order)
    expected = net(ids)
    bits = {name: p.clone() for name, p in net.named_parameters()}
    inlay.merge(net)
    torch.testing.assert_close(net(ids), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(dict(net.named_parameters())["first.weight"], bits["first.weight"])
    inlay.unmerge(net)
    assert all(torch.equal(p, bits[name]) for name, p in net.named_parameters())
    assert torch.equal(net(ids), expected)


def test_tied_weights_merge_apart_when_only_one_owner_is_adapted(ids: torch.Tensor) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.out = nn.Linear(8, 11, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.embed(ids))

    net = Tied()
    inlay.attach(net, inlay.LoRA(r=2, targets="name:embed"))
    randomise(net)
    expected = net(ids)
    inlay.merge(net)
    torch.testing.assert_close(net(ids), expected)
    inlay.unmerge(net)
    assert net.out.weight is net.embed.weight
    inlay.merge(net, keep_base=False)
    torch.testing.assert_close(net(ids), expected)
    assert net.out.weight is not net.embed.weight


@pytest.mark.parametrize("keep_base", [True, False])
def test_tied_weights_that_merge_alike_stay_tied(keep_base: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    inlay.attach(net, inlay.LoRA(r=2, targets="all-linear", init="random"))
    one, other = (net.get_submodule(f"{n}.inlays.default.lora") for n in (0, 1))
    other.load_state_dict(one.state_dict())
    before, x = net[0].weight.clone(), torch.randn(3, 4)
    expected = net(x)
    inlay.merge(net, keep_base=keep_base)
    assert net[0].weight is net[1].weight
    assert not torch.equal(net[0].weight, before)
    torch.testing.assert_close(net(x), expected)


def test_deepcopy_and_pickle_keep_adapters_working_and_apart(net: Net, ids: torch.Tensor) -> None:
    inlay.attach(net, lora())
    randomise(net)
    expected = net(ids)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(ids), expected)
        inlay.activate(other)
        assert not torch.equal(other(ids), expected)
        assert torch.equal(net(ids), expected)
        inlay.detach(other)
        assert type(other.first) is nn.Linear


def test_a_forward_set_on_the_instance_is_kept_as_the_innermost_call(net: Net, ids: torch.Tensor) -> None:
    plain = net.first.forward
    net.first.forward = lambda x: plain(x) * 2  # as accelerate's device hooks do
    before = net(ids)
    inlay.attach(net, lora())
    assert torch.equal(net(ids), before)
    randomise(net)
    assert not torch.equal(net(ids), before)
    inlay.detach(net)
    assert torch.equal(net(ids), before)


def test_fused_transformer_layer_runs_the_pieces_and_is_fused_again_when_disabled() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        base = model(x)
        inlay.attach(model, inlay.LoRA(r=2, targets="all-linear"))
        randomise(model)
        fused = model(x)
        with inlay.disabled(model):
            assert torch.equal(model(x), base)
    unfused = model(x)  # with gradients, torch takes the plain path
    assert (fused - base).abs().max() > 1e-3
    torch.testing.assert_close(fused, unfused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["a.b", "a/b", "../up", "", "train", "state", "a b"])
def test_names_that_cannot_be_folders_or_children_are_refused(net: Net, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name an adapter"):
        inlay.attach(net, lora(), name=name)


def test_wrong_use_names_what_is_loaded_and_changes_nothing(net: Net) -> None:
    with pytest.raises(AdapterError, match="nothing is attached"):
        inlay.summary(net)
    with pytest.raises(TargetError, match="frist"):
        inlay.attach(net, lora(targets="frist"))
    with pytest.raises(TargetError, match="nowhere"):
        inlay.attach(net, lora(targets="first,nowhere"))
    assert type(net.first) is nn.Linear
    inlay.attach(net, lora())
    with pytest.raises(AdapterError, match="loaded already"):
        inlay.attach(net, lora())
    with pytest.raises(AdapterError, match=r"did you mean 'default'"):
        inlay.activate(net, "defualt")
    inlay.merge(net)
    with pytest.raises(AdapterError, match="unmerge"):
        inlay.attach(net, lora(), name="second_one")


@pytest.mark.parametrize("fields", [{"r": 0}, {"r": -1}, {"r": 1.5}, {"dropout": 1.0}, {"init": "svd"}])
def test_impossible_fields_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        lora(**fields)


def test_two_methods_that_copy_one_parameter_are_refused(net: Net) -> None:
    with pytest.raises(ConfigError, match=r"BitFit and LayerNormTuning .* norm.bias"):
        inlay.attach(net, [inlay.BitFit(), inlay.LayerNormTuning(targets="norm")])
    assert type(net.norm) is nn.LayerNorm


def test_a_misspelt_name_or_field_names_the_nearest(net: Net) -> None:
    with pytest.raises(AttributeError, match=r"did you mean .*'LoRA'"):
        _ = inlay.Lora
    with pytest.raises(ConfigError, match=r"LoRA has no field 'lora_alpha'; did you mean 'alpha'"):
        inlay.LoRA(lora_alpha=16)
