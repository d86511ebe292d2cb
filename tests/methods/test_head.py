"""Frozen features: only the head learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine.tiny import build

import inlay
from inlay.errors import ConfigError, TargetError


def test_only_the_new_head_learns() -> None:
    model = inlay.attach(build("bert", "sequence"), inlay.FrozenFeatures())
    assert inlay.summary(model).trainable_parameters == 32 * 2 + 2
    model(torch.arange(3, 13)[None]).logits.sum().backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(name.startswith("classifier.") for name in names)
    assert len(names) == 2


def test_a_saved_head_loads(tmp_path: Path) -> None:
    model = inlay.attach(build("bert", "sequence"), inlay.FrozenFeatures())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    inlay.save(model, tmp_path)
    ids = torch.arange(3, 13)[None]
    assert torch.equal(inlay.load(build("bert", "sequence"), tmp_path)(ids).logits, model(ids).logits)


def test_a_model_without_a_new_head() -> None:
    model = build("gpt2", "causal")
    with pytest.raises(TargetError, match=r"GPT2LMHeadModel has no new head.*head='lm_head'"):
        inlay.attach(model, inlay.FrozenFeatures())
    inlay.attach(model, inlay.FrozenFeatures(head="lm_head"))
    assert inlay.summary(model).trainable_parameters == 64 * 32  # tied: the embedding learns with it
    assert model.transformer.wte.weight is model.lm_head.weight


def test_there_is_nothing_to_target() -> None:
    with pytest.raises(ConfigError, match="no targets"):
        inlay.FrozenFeatures(targets="query")


def test_a_head_that_is_no_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="a role or a name is needed"):
        inlay.FrozenFeatures(head=lambda site: True)
