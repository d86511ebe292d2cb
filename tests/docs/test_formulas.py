"""The formulas of docs/methods.md, computed here from the adapters' tensors; and the fields that its pages list."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from docs.places import DOCS, FAMILIES, HOSTS, ROWS, aimed, fresh, moved, output, tables
from engine.tiny import build
from torch import Tensor, nn
from transformers import DynamicCache

import inlay
from inlay.engine.adapters import adapters_of
from inlay.engine.piece import Method
from inlay.engine.registry import make_method, method_class


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters by the last part of their names."""
    pieces = adapters_of(model).get("default").pieces()
    return {name: p for _, piece in pieces for name, p in piece.named_parameters()}


def linear(change: Callable[..., Tensor]) -> Callable[[str], tuple[Tensor, Tensor]]:
    """An oracle on a linear: `change(x, W, b, **tensors)` is what the adapted linear should compute."""

    def check(kind: str) -> tuple[Tensor, Tensor]:
        (host,) = HOSTS["linear"]
        model, x = moved(inlay.attach(fresh(host), aimed(kind, host.target))), host.inputs()
        base: Any = fresh(host).place
        named = {name.replace(".", "_"): tensor for name, tensor in tensors(model).items()}
        with torch.no_grad():
            return output(model, x), change(x, base.weight, base.bias, **named)

    return check


def lora(x: Tensor, w: Tensor, b: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return F.linear(x, w, b) + 16 / 2 * (x @ lora_A.T @ lora_B.T)


def dora(x: Tensor, w: Tensor, b: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
    direction = w + 16 / 2 * lora_B @ lora_A
    return F.linear(x, magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True), b)


def ia3(x: Tensor, w: Tensor, b: Tensor, ia3_l: Tensor) -> Tensor:
    return ia3_l.flatten() * F.linear(x, w, b)


def adapter(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    hidden = F.relu(F.linear(h, t["bottleneck_down_weight"], t["bottleneck_down_bias"]))
    return h + 2.0 * F.linear(hidden, t["bottleneck_up_weight"], t["bottleneck_up_bias"])


def copied(kind: str) -> tuple[Tensor, Tensor]:
    (host,) = HOSTS["linear"]
    model, x = moved(inlay.attach(fresh(host), aimed(kind, host.target))), host.inputs()
    weight, bias = (piece.value for _, piece in adapters_of(model).get("default").pieces())
    with torch.no_grad():
        return output(model, x), F.linear(x, weight, bias)


def bitfit(x: Tensor, w: Tensor, b: Tensor, value: Tensor) -> Tensor:
    return F.linear(x, w, value)


def norm(kind: str) -> tuple[Tensor, Tensor]:
    host = HOSTS["norm"][0]
    model, x = moved(inlay.attach(fresh(host), aimed(kind, host.target))), host.inputs()
    gain, bias = (piece.value for _, piece in adapters_of(model).get("default").pieces())
    sigma = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    with torch.no_grad():
        return output(model, x), gain * (x - x.mean(-1, keepdim=True)) / sigma + bias


def tokens(kind: str) -> tuple[Tensor, Tensor]:
    (host,) = HOSTS["embedding"]
    model = moved(inlay.attach(fresh(host), aimed(kind, host.target)))
    base: Any = fresh(host).place
    table = base.weight.detach().clone()
    table[[3, 7]] = tensors(model)["value"].detach()
    x = torch.arange(11)
    return output(model, x), table[x]


def prompt(kind: str) -> tuple[Tensor, Tensor]:
    model, ids = build("llama", "causal"), torch.randint(3, 60, (2, 5))
    base = copy.deepcopy(model)
    inlay.attach(model, make_method(kind, {"num_virtual_tokens": 3}))
    pieces = dict(adapters_of(model).get("default").pieces())
    (owner,) = (piece for piece in pieces.values() if hasattr(piece, "prompt"))
    with torch.no_grad():
        vectors = owner.prompt()  # the parameter itself, or what an encoder makes of others
        embedded = torch.cat((vectors.expand(2, -1, -1), base.model.embed_tokens(ids)), dim=1)
        return model(ids).logits, base(inputs_embeds=embedded).logits[:, 3:]


def prefix(kind: str) -> tuple[Tensor, Tensor]:
    model, ids = build("llama", "causal"), torch.randint(3, 60, (2, 5))
    base = copy.deepcopy(model)
    inlay.attach(model, make_method(kind, {"num_virtual_tokens": 3}))
    cache = DynamicCache(config=base.config)
    for layer, rows in enumerate(adapters_of(model).get("default").parameters()):
        # (n, 2 · heads · width): keys, then values
        keys, values = (half.detach().view(1, 3, 2, 8).transpose(1, 2) for half in rows.chunk(2, -1))
        cache.update(keys.expand(2, -1, -1, -1), values.expand(2, -1, -1, -1), layer)
    with torch.no_grad():
        return model(ids).logits, base(ids, past_key_values=cache).logits


FORMULAS: dict[str, tuple[str, Callable[[str], tuple[Tensor, Tensor]]]] = {
    "adapter": ("h + s · (W_up f(W_down h + b_down) + b_up)", linear(adapter)),
    "bitfit": ("y = W x + b′", linear(bitfit)),
    "dora": ("W′ = m · V / ‖V‖, V = W + s · B A", linear(dora)),
    "freezing": ("W′ = a trained copy of chosen W", copied),
    "full": ("W′ = a trained copy of every W", copied),
    "head": ("y = head(f(x)), f frozen", copied),
    "ia3": ("y = l ⊙ (W x + b), or y = W (l ⊙ x) + b", linear(ia3)),
    "layer_norm": ("y = γ′ ⊙ (x − μ) / σ + β′", norm),
    "lora": ("y = W x + s · B (A x)", linear(lora)),
    "p_tuning": ("E′ = [p_1 … p_n ; E(x)], p = MLP(e)", prompt),
    "prefix_tuning": ("softmax(q [K_p ; K]ᵀ / √d) [V_p ; V]", prefix),
    "prompt_tuning": ("E′ = [p_1 … p_n ; E(x)]", prompt),
    "trainable_tokens": ("E′[i] = v_i for chosen ids i", tokens),
}
for family in FAMILIES:
    FORMULAS |= {kind: (text, linear(change)) for kind, (text, change) in family.FORMULAS.items()}
    FORMULAS |= getattr(family, "ORACLES", {})  # of methods that no linear can hold: (text, oracle) as they are


@pytest.mark.parametrize("kind", ROWS)
def test_formula(kind: str) -> None:
    text, oracle = FORMULAS[kind]
    assert ROWS[kind].formula == text
    found, expected = oracle(kind)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # fp32 sums, in another order


# -- the pages ---------------------------------------------------------------------------------------------------------

COMMON = {field.name for field in dataclasses.fields(Method)}


@pytest.mark.parametrize("kind", ROWS)
def test_a_page_lists_the_fields_and_their_defaults(kind: str) -> None:
    own = [field for field in dataclasses.fields(method_class(kind)) if field.name not in COMMON]
    found = next((table[1:] for table in tables(DOCS / "methods" / f"{kind}.md") if table[0][0] == "Field"), [])
    assert [cells[0] for cells in found] == [f"`{field.name}`" for field in own]
    for field, cells in zip(own, found, strict=True):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        assert eval(cells[1].strip("`")) == default, field.name
        assert cells[2]
    headings = re.findall(r"^## (.+)$", (DOCS / "methods" / f"{kind}.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == ["Fields", "Where it sits", "Parameters", "In Python", "On the command line", "Files", "Traps"]


def test_the_common_fields_are_listed() -> None:
    (table,) = (table for table in tables(DOCS / "methods.md") if table[0][0] == "Field")
    assert {cells[0].strip("`") for cells in table[1:]} == COMMON
