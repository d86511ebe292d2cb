"""Companions of the optimiser: each against brute force in a loop of one's own, and in runs, which resume."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import tiny
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from train.interrupted import assert_resumed_is_the_same, curve

import inlay
from inlay.errors import ConfigError, TrainingError, UnsupportedError
from inlay.train import Run, train
from inlay.train import optimisation as settings
from inlay.train.companions.riemannian import precondition
from inlay.train.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
IDS = torch.arange(2, 22).reshape(2, 10)


def attached(method: Any) -> nn.Module:
    torch.manual_seed(0)
    return inlay.attach(tiny.build("bert").eval(), method)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(IDS).last_hidden_state.pow(3).mean().backward()


# -- LoRA+ -------------------------------------------------------------------------------------------------------------


def test_lora_plus_gives_b_its_rate_and_leaves_the_rest() -> None:
    model = attached([inlay.LoRA(r=2), inlay.BitFit()])
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3, weight_decay=0.1)
    inlay.lora_plus(optimizer, model, ratio=8)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    slow, fast = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 8e-3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert all(name.endswith("lora_B") for name in fast)
    assert sorted(slow + fast) == sorted(names[id(p)] for p in trained(model))
    assert not any(name.endswith("lora_B") for name in slow)


def test_lora_plus_trains_as_hf_pefts() -> None:
    """Three steps from the same numbers. (Of a LoRA alone: peft's would speed up biases and norms with B.)"""
    model = attached(inlay.LoRA(r=2, alpha=4, targets="query,value"))
    theirs = get_peft_model(tiny.build("bert").eval(), LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"]))
    named = {name.replace("base_model.model.", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    pairs = [
        (p, named[name.replace("inlays.default.lora.", "") + ".default.weight"])
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    assert len(pairs) == len(named) == 8
    with torch.no_grad():
        for ours, other in pairs:
            other.copy_(ours)
    optimizer = inlay.lora_plus(torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.0), model, ratio=4)
    other_optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4)
    for _ in range(3):
        for one, step in ((model, optimizer), (theirs, other_optimizer)):
            backward(one)
            step.step()
    for ours, other in pairs:
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)  # Adam divides roundings of small gradients


def test_lora_plus_takes_new_ranks_into_their_groups() -> None:
    model = attached(inlay.IncreLoRA(target_r=2, top_h=4, interval=1, warmup=0, targets="query,value"))
    optimizer = inlay.lora_plus(torch.optim.AdamW(trained(model), lr=1e-3), model)
    (controller,) = inlay.controllers(model)
    controller.prepare(4)
    for _ in range(2):
        backward(model)
        controller.before_step(optimizer)
        optimizer.step()
        controller.after_step(optimizer)
    fast = {id(p) for p in optimizer.param_groups[1]["params"]}
    assert fast == {id(p) for name, p in model.named_parameters() if "lora_B" in name.split(".")}
    assert len(fast) == 8


# -- Riemannian --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze_a", [False, True])
def test_gradients_are_scaled_by_the_other_factor(freeze_a: bool) -> None:
    model = attached(inlay.LoRA(r=3, targets="query,value", freeze_a=freeze_a))
    pieces = [m for name, m in model.named_modules() if name.endswith("inlays.default.lora")]
    with torch.no_grad():
        for piece in pieces:
            piece.lora_B.normal_()
    backward(model)
    expected = []
    for piece in pieces:
        a, b, eye = piece.lora_A.detach(), piece.lora_B.detach(), 0.1 * torch.eye(3)
        expected.append(piece.lora_B.grad @ torch.linalg.inv(a @ a.t() + eye))
        if not freeze_a:
            expected.append(torch.linalg.inv(b.t() @ b + eye) @ piece.lora_A.grad)
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    handle = inlay.riemannian(optimizer, model, damping=0.1)
    optimizer.step()
    found = [p.grad for piece in pieces for p in ([piece.lora_B] if freeze_a else [piece.lora_B, piece.lora_A])]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    handle.remove()
    optimizer.step()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_step_is_the_same_however_the_size_is_shared_out() -> None:
    """What the method is for: B A moves alike from (B, A) and from (3 B, A / 3), which plain descent does not do."""
    torch.manual_seed(0)
    a, b, target = torch.randn(2, 5), torch.randn(4, 2), torch.randn(4, 5)

    def moved(share: float, scaled: bool) -> Tensor:
        one, two = nn.Parameter(a / share), nn.Parameter(b * share)
        (two @ one - target).square().sum().backward()
        if scaled:
            precondition([(one, two)], 1e-9)
        assert one.grad is not None
        assert two.grad is not None
        return (two - 0.01 * two.grad) @ (one - 0.01 * one.grad)

    torch.testing.assert_close(moved(3, True), moved(1, True), rtol=1e-4, atol=1e-5)
    assert (moved(3, False) - moved(1, False)).abs().max() > 0.1


def test_where_b_is_zero_nothing_blows_up() -> None:
    model = attached(inlay.LoRA(r=2))
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    inlay.riemannian(optimizer, model)
    for _ in range(2):
        backward(model)
        optimizer.step()
    assert all(parameter.isfinite().all() and parameter.abs().max() < 2 for parameter in trained(model))


# -- GaLore ------------------------------------------------------------------------------------------------------------


class Matrices(nn.Module):
    """A tall matrix, a wide one, an embedding, a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.tall, self.wide = nn.Linear(6, 10), nn.Linear(10, 7, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.wide(torch.tanh(self.tall(self.table(ids))))
        return found


def by_hand(w: Tensor, gradients: list[Tensor], rank: int, every: int, scale: float, lr: float, wd: float) -> Tensor:
    """The paper's algorithm on one matrix, step by step, in float64."""
    w = w.double()
    m = v = basis = torch.zeros(())
    for t, g in enumerate((g.double() for g in gradients), 1):
        right = g.shape[0] >= g.shape[1]
        if (t - 1) % every == 0:
            u, _, vh = torch.linalg.svd(g)
            basis = vh[:rank].t() if right else u[:, :rank]
        r = g @ basis if right else basis.t() @ g
        m, v = 0.9 * m + 0.1 * r, 0.99 * v + 0.01 * r**2
        n = (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
        w = w * (1 - lr * wd) - lr * scale * (n @ basis.t() if right else basis @ n)
    return w


def test_galore_is_the_papers_algorithm_and_adamw_elsewhere() -> None:
    torch.manual_seed(0)
    model, ids = Matrices(), torch.arange(9)
    plain = copy.deepcopy(model)
    fields: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizer = inlay.galore(model, rank=2, update_every=2, scale=0.5, **fields)
    decayed = [plain.table.weight]
    other = torch.optim.AdamW([{"params": decayed}, {"params": [plain.tall.bias], "weight_decay": 0.0}], **fields)
    starts = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen: dict[str, list[Tensor]] = {name: [] for name in starts}
    for _ in range(5):
        model.zero_grad()
        model(ids).pow(2).sum().backward()
        for (name, p), twin in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert p.grad is not None
            seen[name].append(p.grad.clone())
            twin.grad = p.grad.clone()
        optimizer.step()
        other.step()
    for name in ("tall.weight", "wide.weight"):
        # float32 against float64, and a basis of singular vectors, which small gaps between values make less exact
        expected = by_hand(starts[name], seen[name], rank=2, every=2, scale=0.5, lr=1e-2, wd=0.1)
        torch.testing.assert_close(dict(model.named_parameters())[name].double(), expected, rtol=1e-4, atol=1e-4)
    for name in ("table.weight", "tall.bias"):
        torch.testing.assert_close(dict(model.named_parameters())[name], dict(plain.named_parameters())[name])


def test_galores_state_is_as_small_as_it_says() -> None:
    model = attached(inlay.FullFineTuning())
    optimizer = inlay.galore(model, lr=1e-3, rank=4)
    model(IDS).pooler_output.pow(3).mean().backward()  # through every parameter
    optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    ours, theirs = optimizer.state_bytes()
    assert sum(value.nbytes for value in held) == ours
    assert theirs == 2 * sum(parameter.nbytes for parameter in trained(model))
    squares, tables = 2 * 4 * 32 * 32 + 32 * 32, (64 + 40 + 2) * 32  # attentions and pooler; embeddings
    ffn, vectors = 2 * 2 * 32 * 48, 5 * 64 + 2 * (4 * 32 + 48 + 32) + 32
    assert theirs == 2 * 4 * (squares + tables + ffn + vectors)
    assert ours == 4 * (9 * 4 * 3 * 32 + 4 * 4 * (2 * 48 + 32) + 2 * (tables + vectors))


def test_galore_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    model, ids = Matrices(), torch.arange(9)
    optimizer = inlay.galore(model, lr=1e-2, rank=2, update_every=3)

    def steps(one: nn.Module, of: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            one.zero_grad()
            one(ids).pow(2).sum().backward()
            of.step()

    steps(model, optimizer, 4)
    twin = copy.deepcopy(model)
    again = inlay.galore(twin, lr=1e-2, rank=2, update_every=3)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 4)
    steps(twin, again, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


# -- runs --------------------------------------------------------------------------------------------------------------

GROWING = {
    "kind": "increlora", "targets": "query,value", "target_r": 3, "top_h": 3,
    "warmup": 1, "interval": 2, "new_warmup": 4,
}  # fmt: skip
WSDC = {
    "lr_scheduler_type": "warmup_stable_decay_constant", "warmup_steps": 2,
    "lr_scheduler_kwargs": {"num_stable_steps": 2, "num_decay_steps": 0.375, "decay_type": "exponential"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ({"kind": "lora", "r": 2}, {"lora_plus_ratio": 4.0, "riemannian_damping": 0.01, **WSDC}),
        (GROWING, {"loraplus_lr_ratio": 4.0, "weight_decay": 0.1}),
        ({"kind": "full"}, {"galore_rank": 4, "galore_update_every": 4, "learning_rate": 1e-3}),
    ],
    ids=["lora", "increlora", "galore"],
)
def test_a_resumed_run_equals_the_unbroken_one(
    method: dict[str, Any], given: dict[str, Any], make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after step 5 of 8: in the decay, between two rounds of growth, between two projections."""
    made = made_optimizers(monkeypatch)
    unbroken, broken = (make_run(name, {"max_steps": 8, **given}, method=method) for name in ("unbroken", "broken"))
    train(unbroken, progress=False)
    assert_resumed_is_the_same(broken, unbroken, 5, monkeypatch)
    grown = "ranks" in (Path(broken.out) / "README.md").read_text()
    assert grown == (method is GROWING)
    assert not grown or "12 in all" in (Path(broken.out) / "README.md").read_text()  # the card is of the end
    rates = [line["learning_rate"] for line in curve(unbroken) if "loss" in line]
    for optimizer in made:
        if "galore_rank" in given:
            assert type(optimizer).__name__ == "GaLoreAdamW"
        else:
            first, last = optimizer.param_groups[0], optimizer.param_groups[-1]
            assert last["lr"] == pytest.approx(4 * first["lr"])
            assert len(optimizer._optimizer_step_pre_hooks) == ("riemannian_damping" in given)
    if "lr_scheduler_type" in given:
        assert rates == pytest.approx([0, 0.005, 0.01, 0.01, 0.01, 0.01 * 0.1 ** (1 / 3), 0.01 * 0.1 ** (2 / 3), 0.001])


def made_optimizers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every optimiser that a trainer makes from now on."""
    made: list[Any] = []
    create = Trainer.create_optimizer

    def watched(self: Trainer, model: Any = None) -> Any:
        made.append(create(self, model))
        return made[-1]

    monkeypatch.setattr(Trainer, "create_optimizer", watched)
    return made


def test_galore_says_what_its_state_takes(make_run: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    train(make_run("full", {"galore_rank": 4, "max_steps": 1}, method="full"))
    assert "galore_rank 4: 13 matrices projected; the optimiser's state takes " in capsys.readouterr().err


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_plus_ratio": -1}, "train.lora_plus_ratio must be a number above 0"),
        ({"riemannian_damping": 0}, "train.riemannian_damping must be a number above 0"),
        ({"galore_rank": 2.5}, "train.galore_rank must be a whole number"),
        ({"galore_scale": 0.5}, "give train.galore_rank too"),
        ({"galore_rank": 4, "lora_plus_ratio": 4}, "leave lora_plus_ratio out"),
        ({"galore_rank": 4, "optim": "adamw_8bit"}, "leave optim out"),
        ({"lora_plus": 4}, "did you mean 'lora_plus_ratio'"),
    ],
)
def test_settings_that_cannot_be_used(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Run(model="m", train=given)


def test_companions_where_they_do_not_belong(make_run: Callable[..., Run]) -> None:
    for name, method, given, message in (
        ("plus", "ia3", {"lora_plus_ratio": 4}, "this optimiser trains none"),
        ("riemannian", "ia3", {"riemannian_damping": 0.1}, "no LoRA trains here"),
        ("galore", {"kind": "lora", "r": 2}, {"galore_rank": 20}, "for full fine-tuning"),
    ):
        run = make_run(name, given, method=method)
        with pytest.raises(ConfigError, match=message):
            train(run, progress=False)
        assert not Path(run.out).exists()


def test_bad_values_in_a_loop_of_ones_own() -> None:
    model = attached(inlay.LoRA(r=2))
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    with pytest.raises(ConfigError, match="ratio=0"):
        inlay.lora_plus(optimizer, model, ratio=0)
    with pytest.raises(ConfigError, match="damping=-1"):
        inlay.riemannian(optimizer, model, damping=-1)
    for fields in ({"rank": 0}, {"update_every": 1.5}, {"scale": -1}):
        with pytest.raises(ConfigError, match=f"GaLore\\({next(iter(fields))}="):
            inlay.galore(model, lr=1e-3, **fields)  # type: ignore[arg-type]
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(TrainingError, match="call lora_plus first"):
        inlay.lora_plus(optimizer, model)
    grouped = inlay.attach(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), inlay.LoRA(r=2, targets="0"))
    with pytest.raises(UnsupportedError, match="are blocks"):
        inlay.riemannian(torch.optim.SGD(trained(grouped), lr=0.1), grouped)


# -- 8 bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_paged_8_bit_adamw(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own names go through; where bitsandbytes is missing the error says how to get it."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = made_optimizers(monkeypatch)
    train(make_run("paged", {"optim": "paged_adamw_8bit", "lora_plus_ratio": 2, "max_steps": 2}), progress=False)
    assert isinstance(made[0], bitsandbytes.optim.AdamW)
    assert made[0].is_paged
    assert made[0].args.optim_bits == 8
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    for optim in ("paged_adamw_8bit", "adamw_8bit", "lion_32bit"):
        with pytest.raises(ConfigError, match=f"train.optim={optim} needs bitsandbytes: pip install"):
            settings.check_optim(optim)
    settings.check_optim("adamw_torch")
    settings.check_optim(None)
