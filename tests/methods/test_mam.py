"""MAM is its two parts: what it computes, trains and saves is theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from engine.tiny import build, build_transformer_encoder

import inlay
from inlay import MAM, Adapter, PrefixTuning
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError, InlayError


def test_it_is_a_prefix_and_a_parallel_adapter(tmp_path: Path) -> None:
    ids = torch.arange(3, 13).view(2, 5)
    model, other = build("bert"), build("bert")
    torch.manual_seed(0)
    inlay.attach(model, MAM(num_virtual_tokens=3, projection_size=5, bottleneck=6, layers=1))
    torch.manual_seed(0)
    parts = [
        PrefixTuning(num_virtual_tokens=3, projection_size=5, layers=1),
        Adapter(placement="parallel", bottleneck=6, scale=4.0, layers=1),
    ]
    inlay.attach(other, parts)
    assert [method.kind for method in adapters_of(model).get("default").methods] == ["prefix_tuning", "adapter"]
    assert torch.equal(model(ids)[0], other(ids)[0])
    content = json.loads((inlay.save(model, tmp_path) / "adapter_config.json").read_text())
    assert [method["kind"] for method in content["auto_mapping"]["inlay"]["methods"]] == ["prefix_tuning", "adapter"]
    assert torch.equal(inlay.load(build("bert"), tmp_path)(ids)[0], model(ids)[0])


def test_without_the_prefix_it_starts_as_the_base() -> None:
    model, ids = build("bert"), torch.arange(3, 13).view(2, 5)
    base = model(ids)[0]
    inlay.attach(model, MAM(num_virtual_tokens=3, bottleneck=6).methods()[1])
    assert torch.equal(model(ids)[0], base)


def test_the_count_on_bert_base() -> None:
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig())
    inlay.attach(model, MAM(num_virtual_tokens=16, projection_size=512, bottleneck=16, scale=2.0))
    prefix = 16 * 768 + 512 * 769 + 513 * 12 * 2 * 768
    assert inlay.summary(model).trainable_parameters == prefix + 12 * (2 * 768 * 16 + 16 + 768)


def test_errors_name_it_before_anything_is_changed() -> None:
    for fields in ({"targets": "query"}, {"exclude": "0"}, {"overrides": {"1": {"scale": 2.0}}}):
        with pytest.raises(ConfigError, match=r"MAM has no targets.*attach \[PrefixTuning"):
            MAM(**fields)
    with pytest.raises(ConfigError, match="bottleneck=0"):
        MAM(bottleneck=0)
    model = build_transformer_encoder()  # its attention is not open to prefixes
    with pytest.raises(InlayError, match="MAM: PrefixTuning"):
        inlay.attach(model, MAM())
    assert not hasattr(model, "_inlay")
