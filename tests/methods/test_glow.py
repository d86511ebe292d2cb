"""The affine coupling of invertible adapters: against the formula, against a brute-force inverse, in models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from engine.tiny import build
from torch import Tensor

import inlay
from inlay import InvertibleAdapter
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError
from inlay.pieces.coupling import AffineCoupling

IDS = torch.arange(3, 13).view(2, 5)
GLOW = InvertibleAdapter(init="bert", activation="gelu", coupling="glow")


def coupling(width: int, std: float = 0.5) -> AffineCoupling:
    made = AffineCoupling(width, GLOW, SimpleNamespace(dtype=torch.float64, device="cpu"))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=std)
    return made


@pytest.mark.parametrize("width", [8, 9])
def test_the_formula(width: int) -> None:
    made, x = coupling(width), torch.randn(3, width, dtype=torch.float64)

    def network(name: str, half: Tensor) -> tuple[Tensor, ...]:
        part = getattr(made, name)
        hidden = F.gelu(half @ part.down.weight.T + part.down.bias)
        return (hidden @ part.up.weight.T + part.up.bias).chunk(2, -1)

    def e(s: Tensor) -> Tensor:
        return torch.exp(5 * 0.636 * torch.atan(s / 5))

    x1, x2 = x[:, : width // 2], x[:, width // 2 :]
    s2, t2 = network("f", x2)
    y1 = e(s2) * x1 + t2
    s1, t1 = network("g", y1)
    torch.testing.assert_close(made(x), torch.cat((y1, e(s1) * x2 + t1), -1))
    assert 1 / torch.e**5 < e(torch.tensor(-1e9)) < e(torch.tensor(1e9)) < torch.e**5


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("width", [8, 9])
def test_the_inverse_is_one_both_ways(width: int, dtype: torch.dtype, digits: float) -> None:
    made, x = coupling(width).requires_grad_(False), torch.randn(3, 4, width, dtype=dtype)
    for there, back in ((made, made.inverse), (made.inverse, made)):
        assert not torch.allclose(there(x), x, atol=0.1)
        # roundings of sums of a few units, multiplied by factors of a few units
        assert (back(there(x)) - x).abs().max() <= digits * max(1.0, float(there(x).abs().max()))


def test_the_inverse_is_the_one_that_newton_finds() -> None:
    made, y = coupling(6).requires_grad_(False), torch.randn(6, dtype=torch.float64)
    x = y.clone()
    for _ in range(60):  # damped at first, as factors are far from linear
        jacobian = torch.autograd.functional.jacobian(made, x)
        step = torch.linalg.solve(jacobian, made(x) - y)
        x = x - step * min(1.0, 0.5 / float(step.abs().max().clamp(min=1e-12)))
    assert (made(x) - y).abs().max() < 1e-12
    torch.testing.assert_close(made.inverse(y), x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_in_a_model_it_starts_as_the_base_and_undoes_itself(name: str, tmp_path: Path) -> None:
    head = {"bert": "masked", "gpt2": "causal", "t5": "conditional"}[name]
    given = {"decoder_input_ids": IDS} if name == "t5" else {}
    model = build(name, head)
    with torch.no_grad():
        base = model(IDS, **given).logits
        inlay.attach(model, InvertibleAdapter(coupling="glow"))
        assert torch.equal(model(IDS, **given).logits, base)
    adapter = adapters_of(model).get("default")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model(IDS, **given).logits.square().sum().backward()
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in adapter.parameters())
    found = model(IDS, **given).logits
    made = next(module for module in model.modules() if isinstance(module, AffineCoupling))
    x = torch.randn(2, 32)
    torch.testing.assert_close(made.inverse(made(x)), x, rtol=1e-4, atol=1e-5)
    loaded = inlay.load(build(name, head), inlay.save(model, tmp_path))
    assert torch.equal(loaded(IDS, **given).logits, found)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"InvertibleAdapter\(coupling='glw'\): choose one of nice, glow"):
        InvertibleAdapter(coupling="glw")  # type: ignore[arg-type]
