"""`APET(compat="authors")` against the loop of their script, written out over names and sizes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from properties.models import close, fresh, gradients, output

import inlay
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError

Named = list[tuple[str, int]]


def as_their_script(inserted: Named, base: Named, n: int, seed: int) -> set[str]:
    """Names of what is trained: `inserted` are A and B of LoRA after LoRA, `base` all other parameters."""
    pairs = [inserted[number : number + 2] for number in range(0, len(inserted), 2)]
    inner = list(base)
    random.seed(n * seed)
    random.shuffle(pairs)
    random.shuffle(inner)
    picked: Named = []
    allowed = n // 2
    while pairs and allowed > 0:
        if pairs[0][0][1] <= allowed:
            picked += pairs[0]
            allowed -= sum(size for _, size in pairs[0])
        pairs.pop(0)
    allowed = n // 2
    while inner and allowed > 0:
        if inner[0][1] <= allowed:
            picked.append(inner[0])
            allowed -= inner[0][1]
        inner.pop(0)
    return {name for name, _ in picked}


@pytest.mark.parametrize(("host", "head"), [("bert", "classifier"), ("llama", "score"), ("t5", None)])
@pytest.mark.parametrize(("n", "seed"), [(700, 0), (2500, 3), (6000, 42)])
def test_the_same_tensors_are_trained(host: str, head: str | None, n: int, seed: int) -> None:
    plain = fresh(host)
    base = [(name, one.numel()) for name, one in plain.named_parameters() if not (head and name.startswith(head))]
    model = inlay.attach(fresh(host), inlay.APET(budget=n, seed=seed, r=2, compat="authors"), modules_to_save=[])
    inserted: Named = []
    for site in inlay.LoRA().sites(inlay.engine.sites.SiteIndex(plain)):
        inserted += [(f"{site.path}.A", 2 * site.in_features), (f"{site.path}.B", 2 * site.out_features)]
    expected = as_their_script(inserted, base, n, seed)
    found = set()
    for method, placed in zip(adapters_of(model).get("default").methods, adapters_of(model).get("default").placed,
                              strict=True):  # fmt: skip
        for site, _ in placed:
            found |= {f"{site.path}.A", f"{site.path}.B"} if method.kind == "lora" else set()
        if method.kind == "apet":
            found |= set(method.subset.entries)
            assert all(where is None for where in method.subset.entries.values())
    assert found == expected
    sizes = dict([*inserted, *base])
    assert inlay.summary(model).trainable_parameters == sum(sizes[name] for name in expected)
    close(output(model, host, fused=False), output(plain, host, fused=False), 1e-6)


def test_it_trains_and_comes_back_from_its_file(tmp_path: Path) -> None:
    model = inlay.attach(fresh("bert"), inlay.APET(budget=4000, seed=1, r=2, compat="authors"), modules_to_save=[])
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    for _ in range(2):  # B is zero at first
        gradients(model, "bert")
        optimizer.step()
    found = output(model, "bert")
    assert (found - output(fresh("bert"), "bert")).abs().max() > 1e-3
    inlay.save(model, tmp_path)
    assert torch.equal(output(inlay.load(fresh("bert"), tmp_path), "bert"), found)


def test_what_is_refused() -> None:
    for fields, words in (
        ({"compat": "theirs"}, "leave it out, or say 'authors'"),
        ({"r": 4}, "rank of the LoRA that compat='authors' draws from"),
        ({"compat": "authors", "budget": 0.1}, "to a budget that is a number of entries"),
    ):
        with pytest.raises(ConfigError, match=words):
            inlay.APET(**{"budget": 100, **fields})
    with pytest.raises(ConfigError, match="no tensor is within half of it"):
        inlay.attach(fresh("bert"), inlay.APET(budget=3, compat="authors"))
