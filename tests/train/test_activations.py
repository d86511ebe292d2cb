"""`train.activation_budget`: the same losses and gradients with no more bytes held than the budget says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from train.test_cache import SIZES, Ran, bert, collate, features, gpt2
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.errors import ConfigError
from inlay.train.activations import MECHANISMS, ActivationBudget, Plan, plan, units_of
from inlay.train.saved import Profile, Unit, profile
from inlay.train.trainer import Trainer

RECOMPUTE, OFFLOAD = MECHANISMS["recompute"], MECHANISMS["offload"]


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **SIZES))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: bert(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2),
    "llama": llama,
    "gpt2": gpt2,
}
METHODS: dict[str, Any] = {
    "lora": inlay.LoRA(r=2, targets="all-linear", dropout=0.2),
    "dora": inlay.DoRA(r=2),
    "adapter": inlay.Adapter(),
    "prefix": inlay.PrefixTuning(num_virtual_tokens=2),
    "full": inlay.FullFineTuning(),
}


def prepared(family: str, method: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model with perturbed adapters, and its training forward on one batch."""
    torch.manual_seed(1)
    model = inlay.attach(MODELS[family](), METHODS[method]).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    batch = collate(features(family)[:6])
    model.config.use_cache = False  # type: ignore[union-attr, assignment]
    return model, lambda: model(**batch).loss


def gradients(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)  # of dropout
    model.zero_grad()
    loss = forward()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def everything(found: Profile) -> int:
    """Bytes kept with every block recomputed."""
    blocks = [u for u in found.units if not any(u.path.startswith(f"{other.path}.") for other in found.units)]
    return found.kept({unit.path: RECOMPUTE.kept(unit) for unit in blocks})


CASES = [("bert", name) for name in METHODS] + [(family, "lora") for family in ("llama", "gpt2")]


@pytest.mark.parametrize(("family", "method"), CASES)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_loss_and_gradients_are_those_without_a_budget(family: str, method: str, share: float) -> None:
    model, forward = prepared(family, method)
    loss, wanted = gradients(model, forward)
    found = profile(model, units_of(model), forward)
    least = everything(found)
    made = plan(found, int(least + share * (found.total - least)), [RECOMPUTE])
    assert made.treated
    with made.applied():
        again, got = gradients(model, forward)
    assert torch.equal(again, loss)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():  # the same operations on the same numbers
        assert torch.equal(got[name], gradient), name
    assert not [module for module in model.modules() if "forward" in vars(module)]


class Made(TorchDispatchMode):
    """Weak references to every storage that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.refs: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                self.refs.setdefault(ref.cdata, (ref, tensor.untyped_storage().nbytes()))
        return made

    def alive(self) -> int:
        return sum(size for ref, size in self.refs.values() if not ref.expired())


def alive_after(forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward made and that live as long as its loss does, the loss itself left out."""
    with Made() as made:
        loss = forward()
        return made.alive() - loss.untyped_storage().nbytes()


@pytest.mark.parametrize(("family", "method"), [("llama", "lora"), ("gpt2", "lora"), ("bert", "full")])
def test_what_is_predicted_is_what_is_held(family: str, method: str) -> None:
    model, forward = prepared(family, method)
    found = profile(model, units_of(model), forward)
    least = everything(found)
    before = alive_after(forward)
    assert 0 < least < found.total <= before
    held = []
    for share in (1.0, 0.6, 0.3, 0.0):
        budget = int(least + share * (found.total - least))
        made = plan(found, budget, [RECOMPUTE])
        assert made.kept <= budget
        with made.applied():
            held.append(alive_after(forward))
        # What something other than autograd holds is in both figures: what goes is what was predicted to go.
        assert before - held[-1] == found.total - made.kept
    assert held == sorted(held, reverse=True)


def test_a_budget_that_cannot_be_met_names_the_least() -> None:
    model, forward = prepared("bert", "lora")
    found = profile(model, units_of(model), forward)
    with pytest.raises(ConfigError, match=r"activation_budget=1\.0 kB cannot be met: a step keeps at least [\d.]+ kB"):
        plan(found, 1000, [RECOMPUTE])
    assert plan(found, found.total, [RECOMPUTE]).treated == {}


def unit(path: str, flops: int, **inputs: int) -> Unit:
    return Unit(path, nn.Identity(), {ord(name): size for name, size in inputs.items()}, flops, 1)


def test_the_best_bytes_per_flop_go_first_and_a_block_takes_its_parts_place() -> None:
    dear, cheap, inner = unit("0", 100, x=1), unit("1", 10, y=1), unit("1.mlp", 9, z=5)
    held = (
        (ord("a"), 50, frozenset({"0"})),
        (ord("b"), 30, frozenset({"1", "1.mlp"})),
        (ord("y"), 1, frozenset({"0", "1"})),
        (ord("c"), 4, frozenset({"1"})),
        (ord("d"), 7, frozenset[str]()),
    )
    found = Profile((dear, cheap, inner), held)
    assert found.total == 92
    plans = {budget: plan(found, budget, [RECOMPUTE]) for budget in (92, 91, 60, 50, 10)}
    chosen = {budget: (set(made.treated), made.kept) for budget, made in plans.items()}
    assert chosen[92] == (set(), 92)
    assert chosen[91] == chosen[60] == ({"1"}, 58)
    assert chosen[10] == ({"0", "1"}, 9)
    part = dataclasses.replace(inner, flops=1)
    made = plan(Profile((dear, cheap, part), held), 70, [RECOMPUTE])
    assert (set(made.treated), made.kept) == ({"1.mlp"}, 67)
    made = plan(Profile((dear, cheap, part), held), 60, [RECOMPUTE])
    assert (set(made.treated), made.kept) == ({"1"}, 58)


def test_mechanisms_are_weighed_against_each_other() -> None:
    heavy = unit("0", 10**12, x=100)
    found = Profile((heavy,), ((ord("a"), 1000, frozenset({"0"})),))
    assert plan(found, 500, [RECOMPUTE, OFFLOAD]).treated["0"][1] is OFFLOAD
    light = dataclasses.replace(heavy, flops=1000)
    assert plan(Profile((light,), found.held), 500, [RECOMPUTE, OFFLOAD]).treated["0"][1] is RECOMPUTE
    assert plan(Profile((light,), found.held), 50, [RECOMPUTE, OFFLOAD]).treated["0"][1] is OFFLOAD
    assert not OFFLOAD.available(torch.device("cpu"))


def test_offloaded_units_have_the_same_gradients() -> None:
    model, forward = prepared("bert", "lora")
    loss, wanted = gradients(model, forward)
    units = [unit for unit in units_of(model) if unit.path.endswith("layer.1")]
    copied: list[Tensor] = []
    made = Plan({unit.path: (unit, OFFLOAD) for unit in units}, 0, 0)
    empty = torch.empty_like

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        copied.append(empty(*args, **kwargs))
        return copied[-1]

    with pytest.MonkeyPatch.context() as patch, made.applied():
        patch.setattr(torch, "empty_like", counted)
        again, got = gradients(model, forward)
    assert torch.equal(again, loss)
    assert all(torch.equal(got[name], gradient) for name, gradient in wanted.items())
    assert copied
    sizes = {parameter.shape for parameter in units[0].module.parameters() if parameter.dim() == 2}
    assert not [tensor for tensor in copied if tensor.shape in sizes and tensor.shape[0] == tensor.shape[1]]


def test_it_plans_again_for_a_larger_batch_only() -> None:
    model, forward = prepared("bert", "lora")
    rows = features("bert")
    sizes: list[int] = []
    lines: list[str] = []

    def run(inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        return model(**inputs).loss, None

    found = profile(model, units_of(model), forward)
    around = ActivationBudget(everything(found), lines.append)
    args = SimpleNamespace(gradient_checkpointing=False, device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(adapted=model, args=args)
    for count in (2, 1, 6):
        around(trainer, run, collate(rows[:count]))
    assert sizes == [2, 2, 1, 6, 6]
    assert lines[-1].startswith("activation_budget ")
    assert "recomputed" in lines[-1]
    args.gradient_checkpointing = True
    with pytest.raises(ConfigError, match="two ways to the same end"):
        ActivationBudget(1, print)(trainer, run, collate(rows[:2]))


def test_a_run_with_all_three_has_the_losses_of_the_plain_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inlay.train.options import Options
    from inlay.train.training import around_forward

    def run(name: str) -> Ran:
        torch.manual_seed(1)
        return Ran(tmp_path / name, llama(), inlay.LoRA(r=2, layers=[1, 2]), "llama", {"cache_frozen": "off"})

    plain, lines = run("plain"), list[str]()
    options = Options.of({"chunked_loss": True, "activation_budget": "30kB", "cache_frozen": "memory"})
    made = Trainer.__init__

    def with_all(self: Trainer, *, around: Any, **rest: Any) -> None:
        made(self, around=around_forward(options, lines.append), **rest)

    monkeypatch.setattr(Trainer, "__init__", with_all)
    both = run("all")
    torch.testing.assert_close(both.losses, plain.losses, rtol=1e-5, atol=0)
    assert lines[0].startswith("cache_frozen: 1 of 3 blocks")
    assert lines[1].startswith("activation_budget 30.0 kB: ")
    assert "recomputed" in lines[1]
    assert ".layers.0" not in lines[1]
