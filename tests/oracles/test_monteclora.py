"""MonteCLoRA against HF peft: files both ways, training and its loss from the same noise; and that runs repeat."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles.against_peft import Case, gradients, gradients_of_peft, run
from oracles.other_methods import both_ways, ids, model, perturbed_peft
from torch import Tensor, nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError
from inlay.kernels import monte_carlo

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own

BERT = ["query", "key", "value", "attention.output.dense"]
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def theirs_config(**fields: Any) -> peft.MontecloraConfig:
    return peft.MontecloraConfig(buffer_size=2, **fields)


CASES: dict[str, tuple[Callable[[], Any], inlay.Method, peft.PeftConfig]] = {
    "bert": (
        model("bert"), inlay.MonteCLoRA(r=3, alpha=5, num_samples=4, use_entropy=True, targets="attention"),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=BERT,
                        monteclora_config=theirs_config(num_samples=4, use_entropy=True)),
    ),
    "gpt2": (
        model("gpt2"), inlay.MonteCLoRA(r=2, rank_stabilised=True, targets="query,up"),
        peft.LoraConfig(r=2, use_rslora=True, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True,
                        monteclora_config=theirs_config()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    build, method, config = CASES[name]
    both_ways(Case(build, ids, {}, method), config, tmp_path)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["monteclora_config"]
    entry = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["monteclora_config"]
    assert written == entry | {"buffer_size": 1}


# -- training ----------------------------------------------------------------------------------------------------------


def with_pefts_noise(ours: nn.Module, theirs: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of our draws is made of the noise that peft's next one at the same place will use."""
    pieces = [piece for _, piece in adapters_of(ours).get("default").pieces()]
    samplers = [m.lora_monteclora_sampler["default"] for m in theirs.modules() if hasattr(m, "lora_monteclora_sampler")]
    noise = {}
    for piece, sampler in zip(pieces, samplers, strict=True):
        sample = sampler.sampler.buffer[sampler.sampler.index]
        noise[id(piece.std_prior)] = (sample, piece)

    def drawn(log_std: Tensor, log_alpha: Tensor) -> monte_carlo.Draw:
        sample, _ = noise[id(log_std)]
        return monte_carlo.Draw(sample["z_wishart"].diagonal(), sample["z_dirichlet"])

    matrices = {id(piece.lora_A): entry for entry in noise.values() for piece in [entry[1]]}

    def randn_like(a: Tensor) -> Tensor:
        sample, piece = matrices[id(a)]
        w = piece.expert_weights
        return (w[:, None, None] * sample["z_mvn"]).sum(0).T / w.norm()

    monkeypatch.setattr(monte_carlo, "drawn", drawn)
    monkeypatch.setattr(torch, "randn_like", randn_like)


def test_trains_as_peft_does_from_the_same_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, gradients and, with its sign, its loss; the one by α is another estimate: see the kernel's test."""
    settings: dict[str, Any] = {"num_samples": 4, "sample_scaler": 0.1, "kl_loss_weight": 0.3, "use_entropy": True}
    config = peft.LoraConfig(r=3, target_modules=BERT, monteclora_config=theirs_config(**settings))
    build = model("bert", **STILL)
    theirs = perturbed_peft(build(), config)
    theirs.save_pretrained(tmp_path)
    ours = inlay.load(build(), tmp_path, trainable=True)
    inlay.save(ours, tmp_path / "again")  # by which Inlay's own entry is there, to be edited
    config_file = tmp_path / "again" / "adapter_config.json"
    content = json.loads(config_file.read_text())
    content["auto_mapping"]["inlay"]["methods"][0]["compat"] = "authors"
    config_file.write_text(json.dumps(content))
    ours = inlay.load(build(), tmp_path / "again", trainable=True)
    ours.train(), theirs.train()
    with_pefts_noise(ours, theirs, monkeypatch)
    torch.testing.assert_close(run(ours, ids()), run(theirs, ids()), rtol=1e-4, atol=1e-5)
    found, expected = gradients(ours), gradients_of_peft(theirs)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        if "expert_weights" not in key:
            torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    monkeypatch.undo()
    ours.zero_grad(), theirs.zero_grad()
    with_pefts_noise(ours, theirs, monkeypatch)  # their loss goes back through the forward, which it then wants anew
    torch.testing.assert_close(run(ours, ids(), False), run(theirs, ids(), False), rtol=1e-4, atol=1e-5)
    (controller,) = inlay.controllers(ours)
    loss, their_loss = controller.extra_loss(), theirs.base_model._get_monteclora_loss()
    assert loss is not None
    torch.testing.assert_close(loss, their_loss, rtol=1e-4, atol=1e-5)
    loss.backward(), their_loss.backward()
    found = gradients(ours)
    for key, gradient in gradients_of_peft(theirs).items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def small(**fields: Any) -> nn.Module:
    """A network whose first linear has the adapter, with a B that matters."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    inlay.attach(network, inlay.MonteCLoRA(r=2, init="random", targets="0", **fields))
    return network


def test_noise_is_drawn_in_training_only_and_repeats_with_the_seed() -> None:
    network, x = small(sample_scaler=0.3), torch.randn(4, 6)
    mean = network.eval()(x)
    assert torch.equal(network(x), mean)
    network.train()
    torch.manual_seed(5)
    first, second = network(x), network(x)
    assert not torch.allclose(first, second)
    torch.manual_seed(5)
    assert torch.equal(network(x), first)
    assert torch.equal(network.eval()(x), mean)


def test_the_noise_of_training_has_the_mean_zero() -> None:
    linear = small(sample_scaler=0.1)[0].train()
    x = torch.randn(1, 6)
    with torch.no_grad():
        draws = torch.cat([linear(x) for _ in range(3000)])
        mean, spread = linear.eval()(x)[0], draws.std(0)
    assert ((draws.mean(0) - mean).abs() < 4 * spread / 3000**0.5).all()
    assert (spread > 1e-3).all()


def steps(network: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    """Steps of a plain loop, as docs/training.md has it."""
    (controller,) = inlay.controllers(network)
    for step in range(start, stop):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        loss = network(x).square().mean()
        extra = controller.extra_loss()
        assert extra is not None
        (loss + extra).backward()
        controller.before_step(optimizer)
        optimizer.step()
        controller.after_step(optimizer)
        optimizer.zero_grad()


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    """From the adapter's file, the optimiser's state and torch's generator: what `inlay train` keeps too."""
    fields: dict[str, Any] = {"dropout": 0.3, "kl_loss_weight": 0.1, "use_entropy": True}
    network = small(**fields).train()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.05)
    torch.manual_seed(9)
    steps(network, optimizer, 0, 3)
    inlay.save(network, tmp_path)
    state, generator = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    steps(network, optimizer, 3, 6)
    resumed = inlay.load(inlay.detach(small(**fields)), tmp_path, trainable=True).train()
    again = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=0.05)
    again.load_state_dict(state)
    torch.set_rng_state(generator)
    steps(resumed, again, 3, 6)
    ends = [adapters_of(one).get("default").pieces() for one in (network, resumed)]
    for (_, found), (_, expected) in zip(*ends, strict=True):
        tensors = found.file_tensors()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in expected.file_tensors().items())


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_holds_the_spread_to_its_prior() -> None:
    """Alone, it takes σ to where both of its divergences are least, which is below 1, and moves neither A nor B."""
    network = small(kl_loss_weight=1.0, num_samples=3).train()
    piece: Any = network[0].inlays.default.monteclora
    a, before = piece.lora_A.detach().clone(), piece.std_prior.detach().clone()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.02)
    (controller,) = inlay.controllers(network)
    torch.manual_seed(3)
    losses = []
    for _ in range(80):
        with torch.no_grad():
            network(torch.zeros(1, 6))
        loss = controller.extra_loss()
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-20:]) < sum(losses[:20])
    assert (piece.std_prior < before).all()
    assert torch.equal(piece.lora_A, a)


def test_without_weights_there_is_no_loss() -> None:
    (controller,) = inlay.controllers(small(kl_loss_weight=0))
    assert controller.extra_loss() is None
    (controller,) = inlay.controllers(small(kl_loss_weight=0, use_entropy=True, num_samples=5))
    loss = controller.extra_loss()
    assert loss is not None
    assert loss.item() == pytest.approx(1 / 5)  # before the first draw, equal shares


def test_compiles_in_training() -> None:
    network = small(sample_scaler=0.1).train()
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x = torch.randn(2, 6)
    torch.manual_seed(1)
    expected = network(x)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_samples": 0}, "num_samples=0.*at least 1"),
        ({"sample_scaler": -1}, "sample_scaler=-1.*at least 0"),
        ({"dirichlet_prior": 0}, "dirichlet_prior=0.*above 0"),
        ({"compat": "peft"}, "compat='peft'.*None or 'authors'"),
        ({"init": "pissa"}, "init='pissa'.*use LoRA"),
    ],
)
def test_what_it_cannot_do(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"MonteCLoRA.{sentence}"):
        inlay.MonteCLoRA(**fields)
