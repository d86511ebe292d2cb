"""MEFT in real architectures: gradients, limits, caches, several adapters, what is kept, and what is refused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine.tiny import Plain, build
from oracles import plain_formulas
from oracles.meft_by_hand import by_hand
from torch import Tensor, nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.errors import AdapterError, ConfigError, TargetError, UnsupportedError
from inlay.kernels.reversible import error_bound
from inlay.methods.meft import MEFT, PUBLISHED
from inlay.pieces.reversible.reconstruction import kept, reconstruction_error, running

HOSTS = {"bert": "trunk", "roberta": "trunk", "opt": "causal", "llama": "causal", "vit": "trunk", "bart": "conditional"}
DEPTH = 5
DEEP = {"num_hidden_layers": DEPTH}
VARIANTS = pytest.mark.parametrize("variant", [1, 2, 3])


def inputs(name: str) -> dict[str, Any]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    ids, mask = torch.arange(4, 18).reshape(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    found: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    return {**found, "decoder_input_ids": ids[:, :4]} if name == "bart" else found


def attached(model: nn.Module, name: str = "default", **fields: Any) -> nn.Module:
    """With a MEFT adapter moved away from its start, in training mode."""
    torch.manual_seed(0)
    inlay.attach(model, MEFT(bottleneck=3, activation="gelu", **fields), name=name, modules_to_save=[])
    with torch.no_grad():
        for parameter in adapters_of(model).get(name).parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def deep(name: str, **changes: Any) -> nn.Module:
    changes = {**({"encoder_layers": 3, "decoder_layers": 3} if name == "bart" else DEEP), **changes}
    return build(name, HOSTS[name], **changes)


def output(model: nn.Module, name: str, **more: Any) -> Tensor:
    made = model(**inputs(name), **more)
    found: Tensor = made.logits if "logits" in made else made.last_hidden_state
    return found


def loss_of(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1.3, y.numel(), dtype=y.dtype).view(y.shape)).sum()


def gradients(model: nn.Module, name: str, **more: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)  # of dropout
    model.zero_grad()
    loss_of(output(model, name, **more)).backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max()
        assert error <= tolerance * gradient.abs().max(), (name, float(error / gradient.abs().max()))


@VARIANTS
def test_the_output_is_the_papers_formula(variant: int) -> None:
    found, expected = by_hand("meft", variant)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # fp32 sums, in another order


@VARIANTS
@pytest.mark.parametrize("name", HOSTS)
def test_gradients_are_those_of_the_same_pass_with_nothing_inverted(name: str, variant: int) -> None:
    model = attached(deep(name).double(), variant=variant, lambda_=0.5, beta=0.5, keep_every=DEPTH)
    found = gradients(model, name)
    with kept(model):
        expected = gradients(model, name)
    # four inversions magnify fp64's 1e-16 some ten times each (the dropout, in BERT's kin 0.1, is the same)
    close(found, expected, 1e-9)


@VARIANTS
def test_gradients_at_the_published_constants_are_right_to_the_tolerance(variant: int) -> None:
    model = attached(deep("bert"), variant=variant)
    (stack,) = running(model)
    assert 1 < stack.stack.every < DEPTH
    found = gradients(model, "bert")
    with kept(model):
        expected = gradients(model, "bert")
    close(found, expected, 1e-3)
    errors = reconstruction_error(model, **inputs("bert"))
    assert errors.worst <= errors.bound <= 1e-3
    assert errors.worst < reconstruction_error(model, **inputs("bert"), every=DEPTH).worst


@VARIANTS
def test_the_authors_invert_the_whole_stack(variant: int) -> None:
    model = attached(deep("bert"), variant=variant, compat="authors")
    (found,) = running(model)
    assert (found.stack.scales, found.stack.every) == (PUBLISHED[variant], DEPTH)
    errors = reconstruction_error(model, **inputs("bert")).errors
    assert errors[0] == 0
    assert list(errors[1:]) == sorted(errors[1:], reverse=True)


def silent(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in adapters_of(model).get("default").parameters():
            parameter.zero_()
    return model.eval()


@VARIANTS
@pytest.mark.parametrize("name", ["bert", "vit", "opt"])
def test_without_adapters_the_limit_is_a_mean_of_two_of_the_bases_states(name: str, variant: int) -> None:
    base = deep(name).double()
    seen: list[Tensor] = []
    block = running(attached(deep(name), variant=variant))[0].paths[0].rpartition(".")[0]
    for number in range(DEPTH):
        base.get_submodule(f"{block}.{number}").register_forward_hook(lambda m, a, y: seen.append(y))
    between = {"bert": "attention", "vit": "layernorm_after", "opt": "final_layer_norm"}[name]
    last = base.get_submodule(f"{block}.{DEPTH - 1}.{between}")
    if name == "bert":
        last.register_forward_hook(lambda m, a, y: seen.append(y[0]))
    else:  # what goes into the second norm is what the attention half left
        last.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        output(base, name)
        *_, lower, half, top = seen
        expected = ((half.view_as(top) if variant == 3 else lower) + top) / 2
        fields = {1: {"lambda_": 1e-9}, 2: {"beta": 1e-9}, 3: {"lambda_": 1e-9, "beta": 1e-9}}[variant]
        model = silent(attached(deep(name).double(), variant=variant, **fields))
        found: list[Tensor] = []
        model.get_submodule(f"{block}.{DEPTH - 1}").register_forward_hook(lambda m, a, y: found.append(y))
        output(model, name)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-7)


@VARIANTS
def test_gradients_add_up_over_batches(variant: int) -> None:
    model = attached(deep("bert"), variant=variant)
    once = gradients(model, "bert")
    loss_of(output(model.eval(), "bert")).backward()
    first = gradients(model, "bert")
    loss_of(output(model, "bert")).backward()
    twice = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    close(twice, {name: 2 * gradient for name, gradient in first.items()}, 1e-5)
    assert not torch.equal(next(iter(once.values())), next(iter(first.values())))  # with dropout, and without


@VARIANTS
def test_states_between_blocks_have_their_gradients(variant: int) -> None:
    model = attached(deep("bert"), variant=variant)

    def run() -> dict[str, Tensor]:
        torch.manual_seed(5)
        model.zero_grad()
        states = model(**inputs("bert"), output_hidden_states=True).hidden_states
        assert len(states) == DEPTH + 1
        sum(loss_of(state) for state in states).backward()  # type: ignore[union-attr]
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    found = run()
    with kept(model):
        close(found, run(), 1e-3)


@VARIANTS
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_is_kept_depends_on_the_kept_streams_alone(name: str, variant: int) -> None:
    sizes = {}
    for depth in (2, 6):
        model = attached(deep(name, num_hidden_layers=depth), variant=variant, keep_every=6)
        sizes[depth] = _kept_bytes(model, name)
    assert sizes[2] == sizes[6]
    full = inlay.attach(deep(name, num_hidden_layers=6), inlay.FullFineTuning()).train()
    assert sizes[6] < 0.16 * _kept_bytes(full, name)  # the paper: 84 % less than full fine-tuning
    one = 2 * 7 * 32 * 4  # bytes of one hidden state
    less = _kept_bytes(attached(deep(name, num_hidden_layers=6), variant=variant, keep_every=2), name)
    assert less - sizes[6] == 2 * 2 * one  # two more pairs of streams


def _kept_bytes(model: nn.Module, name: str) -> int:
    fixed = [*model.parameters(), *model.buffers()]
    with plain_formulas.kept(*fixed) as found:
        states = output(model, name, use_cache=False) if name == "llama" else output(model, name)
    del states
    return plain_formulas.size(found)


def test_generate_with_a_cache_gives_what_it_gives_without() -> None:
    for variant in (1, 2, 3):
        model: Any = attached(deep("llama"), variant=variant).eval()
        ids = inputs("llama")["input_ids"]
        with_cache, without = (
            model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)
        )
        assert torch.equal(with_cache, without)
        assert not torch.equal(with_cache, deep("llama").generate(ids, max_new_tokens=6, do_sample=False))  # type: ignore[operator]


def test_training_on_past_keys_is_refused_and_evaluating_on_them_is_not() -> None:
    model = attached(deep("llama"))
    with torch.no_grad():
        past = model.eval()(**inputs("llama"), use_cache=True).past_key_values
    ids = {"input_ids": torch.tensor([[3], [4]]), "past_key_values": past}
    loss_of(model(**ids).logits).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(UnsupportedError, match="keys and values of an earlier call"):
        model.train()(**ids)


@VARIANTS
def test_two_active_adapters_add_up_in_one_pass(variant: int) -> None:
    model = attached(attached(deep("bert"), variant=variant), "law", variant=variant)
    inlay.trainable(model, "default", "law")
    inlay.activate(model, "default", "law")
    found = gradients(model, "bert")
    assert {name.split(".inlays.")[1].split(".")[0] for name in found} == {"default", "law"}
    with kept(model):
        close(found, gradients(model, "bert"), 1e-3)
    if variant != 3:  # in the halves the second adapter after an attention reads what the first has changed
        both = output(model.eval(), "bert")
        inlay.activate(model, "law", "default")
        torch.testing.assert_close(output(model, "bert"), both, rtol=1e-4, atol=1e-4)


def test_adapters_that_couple_differently_cannot_be_active_together() -> None:
    model = attached(attached(deep("bert"), variant=1), "law", variant=2)
    with pytest.raises(UnsupportedError, match=r"couple the streams differently.*activate one of them"):
        output(model, "bert")
    inlay.activate(model, "law")
    gradients(model, "bert")


@VARIANTS
def test_another_method_in_the_blocks_trains_along(variant: int) -> None:
    model = attached(deep("bert"), variant=variant)
    inlay.attach(model, inlay.LoRA(r=2, targets="attention", dropout=0.2), name="low")
    for parameter in adapters_of(model).get("low").parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    found = gradients(model, "bert")
    assert any("lora_A" in name for name in found)
    with kept(model):
        close(found, gradients(model, "bert"), 1e-3)


def test_some_blocks_only() -> None:
    model = attached(deep("bert"), layers="1-3")
    assert [len(found.blocks) for found in running(model)] == [3]
    found = gradients(model, "bert")
    assert not any(".layer.0." in name or ".layer.4." in name for name in found)
    with kept(model):
        close(found, gradients(model, "bert"), 1e-3)
    both = attached(deep("bart"), targets="encoder")
    assert [found.name for found in running(both)] == ["model.encoder.layers[0-2]"]


def run_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss_of(output(model.train(), "bert")).backward()
        optimizer.step()


def test_a_run_that_was_saved_and_loaded_goes_on_as_the_same_run(tmp_path: Path) -> None:
    def started(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    model = attached(deep("bert"), variant=1, dropout=0.2)
    optimizer = started(model)
    run_steps(model, optimizer, range(2))
    inlay.save(model, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    resumed = inlay.load(deep("bert"), tmp_path, trainable=True)
    again = started(resumed)
    again.load_state_dict(state)
    for one, its in ((model, optimizer), (resumed, again)):
        run_steps(one, its, range(2, 4))
    ours, theirs = (dict(m.named_parameters()) for m in (model, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@VARIANTS
def test_it_learns(variant: int) -> None:
    model, target = attached(deep("bert"), variant=variant), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(30):
        torch.manual_seed(step)
        loss = (output(model, "bert")[:, 0, :2] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sorted(losses[-9:])[4] < 0.2 * losses[0]  # the middle one, since dropout makes single losses jump


# -- what is refused ---------------------------------------------------------------------------------------------------


class Between(nn.Module):
    """A model that does something to its hidden states between two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(12, 2, 20, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) + 1
        return x


def test_a_model_that_changes_states_between_blocks_is_refused_when_it_is_called() -> None:
    model = attached(Between())
    with pytest.raises(UnsupportedError, match="changes its hidden states between two blocks"):
        model(torch.randn(2, 3, 12))
    inlay.detach(model)(torch.randn(2, 3, 12))


def test_a_block_without_two_halves_is_refused_by_variant_3() -> None:
    ids = torch.arange(3, 10)[None]
    attached(build("phi", "causal"), variant=1)(ids)
    model = attached(build("phi", "causal"), variant=3)
    with pytest.raises(UnsupportedError, match="PhiDecoderLayer is not an attention half followed by a feed-forward"):
        model(ids)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": 4}, "variant=4.*choose one of 1, 2, 3"),
        ({"bottleneck": 0}, "bottleneck=0.*at least 1"),
        ({"keep_every": 1.5}, "keep_every=1.5.*whole number"),
        ({"lambda_": 0.0}, "lambda_=0.0.*positive"),
        ({"tolerance": -1.0}, "tolerance=-1.0.*positive"),
        ({"dropout": 1.0}, "dropout=1.0.*probability"),
        ({"activation": "gelo"}, "activation='gelo'.*choose one of relu"),
        ({"compat": "peft"}, "compat='peft'.*choose one of None, authors"),
        ({"compat": "authors", "beta": 0.5}, "compat='authors'.*leave them out"),
        ({"overrides": {"0": {"bottleneck": 2}}}, "no overrides"),
    ],
)
def test_fields_that_cannot_be_used(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MEFT(**fields)


def test_places_that_cannot_be_used() -> None:
    for make, method, error, message in _places():
        model = make()
        before = list(model.state_dict())
        with pytest.raises(error, match=message):
            inlay.attach(model, method)
        assert list(model.state_dict()) == before
    with pytest.raises(AdapterError, match="needs an active MEFT adapter"):
        reconstruction_error(inlay.attach(deep("bert"), inlay.LoRA()), **inputs("bert"))


def _places() -> Iterator[tuple[Any, MEFT, type[Exception], str]]:
    yield functools.partial(deep, "bert"), MEFT(layers=[0, 2]), ConfigError, r"follow upon each other.*\[0, 2\]"
    yield functools.partial(deep, "bert"), MEFT(targets="query"), TargetError, "MEFT: target 'query'"
    yield functools.partial(deep, "bert"), MEFT(targets="pooler"), TargetError, "no place for a reversible stack"
    yield Plain, MEFT(), TargetError, "no feed-forward network was recognised"


@pytest.mark.parametrize(("variant", "every"), [(1, 3), (2, 3), (3, 2)])
def test_how_often_streams_are_kept(variant: int, every: int) -> None:
    """As docs/methods/meft.md says; and the largest that the bound allows."""
    assert MEFT(variant=variant).every(torch.float32, 12) == MEFT(variant=variant).every(torch.bfloat16, 12) == every
    assert MEFT(variant=variant).every(torch.float64, 12) > every
    assert MEFT(variant=variant, compat="authors").every(torch.float32, 12) == 12
    gains = {1: (2.0, 0.0), 2: (0.0, 2.0), 3: (2.0, 2.0)}[variant]
    bounds = [error_bound(PUBLISHED[variant], gains, variant != 3, k - 1, torch.float32) for k in (every, every + 1)]
    assert bounds[0] <= 1e-3 < bounds[1]


def test_the_adapters_take_the_models_own_activation() -> None:
    names = {"opt": "relu", "llama": "silu", "bert": "gelu"}
    for name, expected in names.items():
        model = inlay.attach(deep(name), MEFT())
        blocks = [piece for _, piece in adapters_of(model).get("default").pieces() if hasattr(piece, "network")]
        assert {piece.network.activation for piece in blocks} == {expected}
    x = torch.randn(3, 32)
    network = blocks[0].network
    hidden = F.gelu(F.linear(x, network.down.weight, network.down.bias))
    torch.testing.assert_close(network(x), F.linear(hidden, network.up.weight, network.up.bias))
