"""Compacter: the formula with the matrices written out, the paper's counts, and one A for the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from engine.tiny import build
from safetensors.torch import load_file
from torch import Tensor

import inlay
from inlay import Compacter
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError
from inlay.pieces.bottlenecks.phm import PHMBottleneck, PHMLayer


def randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in adapters_of(model).get("default").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


def written_out(layer: PHMLayer, rule: Tensor) -> Tensor:
    factors = layer.factors
    blocks = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
    return torch.stack([torch.kron(rule[i], blocks[i]) for i in range(len(rule))]).sum(0)


@pytest.mark.parametrize("r", [1, 2, None])
def test_after_a_network_it_is_the_formula(r: int | None) -> None:
    model, x = build("llama"), torch.randn(2, 5, 32)
    mlp = model.layers[1].mlp
    h = mlp(x)
    inlay.attach(model, Compacter(placement="pfeiffer", r=r, bottleneck=8, layers=-1, train_norms=False))
    randomise(model)
    (network,) = (module for module in mlp.modules() if isinstance(module, PHMBottleneck))
    down, up = (written_out(layer, network.behind[0].a) for layer in (network.down, network.up))
    hidden = F.gelu(h @ down + network.down.bias, approximate="tanh")
    # fp32: sums of 32 in another order.
    torch.testing.assert_close(mlp(x), h + hidden @ up + network.up.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("placement", "count"), [("houlsby", 161_728), ("pfeiffer", 104_704)])
def test_the_papers_counts_on_t5_base(placement: str, count: int) -> None:
    with torch.device("meta"):
        config = transformers.T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
        model = transformers.T5ForConditionalGeneration(config)
    inlay.attach(model, Compacter(placement=placement))
    assert inlay.summary(model).trainable_parameters == count


def test_one_rule_is_trained_and_written_once(tmp_path: Path) -> None:
    model = inlay.attach(build("t5"), Compacter())
    networks = [module for module in model.modules() if isinstance(module, PHMBottleneck)]
    assert len(networks) == 4 + 4  # self-attentions and feed-forward networks, not the 2 cross-attentions
    assert len({network.behind[0].a.data_ptr() for network in networks}) == 1
    assert sum("rule" in key for key in load_file(inlay.save(model, tmp_path) / "adapter_model.safetensors")) == 1
    apart = inlay.attach(build("t5"), Compacter(shared_rule=False, cross_attention=True))
    networks = [module for module in apart.modules() if isinstance(module, PHMBottleneck)]
    assert len({network.behind[0].a.data_ptr() for network in networks}) == len(networks) == 6 + 4


def test_the_authors_start_is_near_the_base() -> None:
    model, ids = build("bert"), torch.arange(3, 13)[None]
    base = model(ids)[0]
    inlay.attach(model, Compacter(init="authors"))
    assert 0 < (model(ids)[0] - base).abs().max() < 1e-4  # products with two factors of A of 1e-4 each


def test_what_n_does_not_divide_is_refused_before_anything_is_changed() -> None:
    model = build("bert")
    for method in (Compacter(n=5), Compacter(bottleneck=6)):
        with pytest.raises(ConfigError, match=r"Compacter\(n=[45]\) at .*divide 32"):
            inlay.attach(model, method)
    with pytest.raises(ConfigError, match=r"Compacter\(n=None\)"):
        Compacter(n=None)
    with pytest.raises(ConfigError, match=r"Compacter\(r=0\)"):
        Compacter(r=0)
    with pytest.raises(ConfigError, match=r"Compacter\(init='bert'\): choose one of zero_up, authors"):
        Compacter(init="bert")
    assert not hasattr(model, "_inlay")
