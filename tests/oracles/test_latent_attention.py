"""Multi-head latent attention (DeepSeek-V2 and V3): its projections are found by role, adapted as peft adapts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from oracles.against_peft import Case, both_ways
from oracles.other_methods import both_ways as other_both_ways
from oracles.other_methods import ids
from torch import nn

import inlay
from inlay.engine.adapters import adapters_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 48, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 8, "first_k_dense_replace": 2, "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
ROLES = {
    "q_a": "q_a_proj", "q_b": "q_b_proj", "kv_a": "kv_a_proj_with_mqa", "kv_b": "kv_b_proj", "query": "q_b_proj",
    "key": "kv_b_proj", "value": "kv_b_proj", "output": "o_proj",
}  # fmt: skip
"""Which projection is which; keys and values come out of one."""


def deepseek(version: str, **changes: Any) -> Callable[[], nn.Module]:
    """A builder of a tiny model with dense feed-forward networks, always the same."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = getattr(transformers, f"Deepseek{version}Config")(**SIZES, **changes)
            model: nn.Module = getattr(transformers, f"Deepseek{version}ForCausalLM")(config)
        return model.eval()

    return build


@pytest.mark.parametrize("version", ["V2", "V3"])
def test_each_projection_by_its_role(version: str) -> None:
    build = deepseek(version)
    for role, name in ROLES.items():
        model = inlay.attach(build(), inlay.LoRA(r=2, targets=role))
        found = [site.path for site, _ in adapters_of(model).get("default").pieces()]
        assert found == [f"model.layers.{layer}.self_attn.{name}" for layer in range(2)], role
    model = inlay.attach(build(), inlay.LoRA(r=2, targets="attention"))
    assert inlay.summary(model).trainable_parameters == 2 * 2 * (
        (32 + 12) + (12 + 4 * 10) + (32 + 10 + 4) + (10 + 4 * (6 + 8)) + (4 * 8 + 32)
    )


@pytest.mark.parametrize("version", ["V2", "V3"])
def test_without_a_latent_query(version: str) -> None:
    whole = {**SIZES, "q_lora_rank": None}
    config = getattr(transformers, f"Deepseek{version}Config")(**whole)
    model = inlay.attach(getattr(transformers, f"Deepseek{version}ForCausalLM")(config), inlay.LoRA(r=2))
    found = {site.path.rpartition(".")[2] for site, _ in adapters_of(model).get("default").pieces()}
    assert found == {"q_proj", "kv_b_proj"}  # query and value, the default


@pytest.mark.parametrize("version", ["V2", "V3"])
def test_as_peft_adapts_them(version: str, tmp_path: Path) -> None:
    method = inlay.LoRA(r=3, alpha=4, targets="kv_a,kv_b,q_a,q_b")
    modules = ["kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj"]
    config = {"r": 3, "lora_alpha": 4, "target_modules": modules}
    both_ways(Case(deepseek(version), ids, config, method), tmp_path)


def test_dora_and_a_cache(tmp_path: Path) -> None:
    build, method = deepseek("V3"), inlay.DoRA(r=3, alpha=4, targets="kv_a,kv_b")
    theirs = peft.LoraConfig(r=3, lora_alpha=4, use_dora=True, target_modules=["kv_a_proj_with_mqa", "kv_b_proj"])
    other_both_ways(Case(build, ids, {}, method), theirs, tmp_path)
    model = inlay.load(build(), tmp_path / "theirs")
    given = ids()["input_ids"]
    with torch.no_grad():
        whole = model(given).logits
        cached = model(given[:, :6], use_cache=True)
        rest = model(given[:, 6:], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-4, atol=1e-5)
