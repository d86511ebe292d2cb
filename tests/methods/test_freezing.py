"""Partial fine-tuning: blocks, embeddings, names, single heads, and gradual unfreezing that resumes exactly."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from engine.tiny import build, build_transformer_encoder
from torch import nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError, TargetError, TrainingError, UnsupportedError

Partial = inlay.PartialFineTuning


def trained(model: nn.Module) -> set[str]:
    """What is trained, by the name of the base's parameter."""
    return {site.name for site, _ in adapters_of(model).get("default").pieces()}


def values(model: nn.Module) -> dict[str, nn.Parameter]:
    return {site.name: piece.value for site, piece in adapters_of(model).get("default").pieces()}


def names(model: nn.Module, *parts: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if any(part in name for part in parts)}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    model(ids)[0].square().mean().backward()
    optimizer.step()
    for controller in inlay.controllers(model):
        controller.after_step(optimizer)
    optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(3, 15).reshape(2, 6)


def test_the_last_blocks() -> None:
    model = build("bert")
    wanted = names(model, "encoder.layer.1.")
    assert trained(inlay.attach(model, Partial(top_k=1))) == wanted
    model = build("t5")
    wanted = names(model, "encoder.block.1.", "decoder.block.1.")
    assert trained(inlay.attach(model, Partial(top_k=1))) == wanted
    model = build("t5")
    wanted = names(model, "decoder.block.")
    assert trained(inlay.attach(model, Partial(top_k=5, exclude="encoder"))) == wanted


def test_embeddings_names_patterns_and_layers() -> None:
    model = build("bert")
    wanted = names(model, "_embeddings.", "pooler", "0.output.LayerNorm")
    method = Partial(embeddings=True, targets=["pooler", r"re:.*\.0\.output\.LayerNorm\..*"])
    assert trained(inlay.attach(model, method)) == wanted
    model = build("bert")
    assert trained(inlay.attach(model, Partial(targets="query,value", layers=1))) == {
        f"encoder.layer.1.attention.self.{name}.{part}" for name in ("query", "value") for part in ("weight", "bias")
    }


def test_what_is_tied_goes_along() -> None:
    model = build("gpt2", "causal")
    inlay.attach(model, Partial(embeddings=True))
    assert {"transformer.wte.weight", "lm_head.weight"} <= trained(model)
    assert model.transformer.wte.weight is model.lm_head.weight


def test_a_step_equals_freezing_by_hand(ids: torch.Tensor) -> None:
    ours, plain = build("llama"), build("llama").requires_grad_(False)
    inlay.attach(ours, Partial(top_k=1))
    plain.layers[1].requires_grad_(True)
    for model in (ours, plain):
        optimizer = adamw(model)
        for _ in range(2):
            step_by_hand = model(ids)[0].square().mean()
            step_by_hand.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(ours(ids)[0], plain(ids)[0])


def test_single_heads_and_every_other_bit(ids: torch.Tensor) -> None:
    model = build("bert")
    before = copy.deepcopy(model.state_dict())
    inlay.attach(model, Partial(heads={0: [1, 3]}))
    assert inlay.summary(model).trainable_parameters == 2 * (4 * 8 * 32 + 3 * 8)
    optimizer = adamw(model)
    for _ in range(2):
        step(model, optimizer, ids)
    rows = torch.zeros(32, dtype=torch.bool)
    rows[8:16] = rows[24:32] = True
    attention = model.encoder.layer[0].attention
    for name in ("query", "key", "value"):
        linear = getattr(attention.self, name)
        for part in ("weight", "bias"):
            same = getattr(linear, part) == before[f"encoder.layer.0.attention.self.{name}.{part}"]
            assert same[~rows].all()
            assert (name, part) == ("key", "bias") or not same[rows].any()  # softmax ignores the keys' bias
    same = attention.output.dense.weight == before["encoder.layer.0.attention.output.dense.weight"]
    assert same[:, ~rows].all()
    assert not same[:, rows].any()
    assert torch.equal(attention.output.dense.bias, before["encoder.layer.0.attention.output.dense.bias"])


def test_heads_that_share_keys_and_values() -> None:
    model = inlay.attach(build("llama"), Partial(heads={1: [2, 3]}))  # 4 heads over 2 key-value heads, 8 wide
    shapes = {name.split(".")[-2]: tuple(value.shape) for name, value in values(model).items()}
    assert shapes == {"q_proj": (16, 32), "k_proj": (8, 32), "v_proj": (8, 32), "o_proj": (32, 16)}
    weight = model.layers[1].self_attn._modules["k_proj"]._parameters["weight"]
    assert torch.equal(values(model)["layers.1.self_attn.k_proj.weight"], weight[8:])


def test_heads_of_torchs_attention() -> None:
    model = build_transformer_encoder()
    inlay.attach(model, Partial(heads={0: [1]}))
    found = values(model)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "layers.0.self_attn.in_proj_weight": (18, 12),
        "layers.0.self_attn.in_proj_bias": (18,),
        "layers.0.self_attn.out_proj.weight": (12, 6),
    }
    base = model.layers[0].self_attn._parameters["in_proj_weight"]
    assert torch.equal(found["layers.0.self_attn.in_proj_weight"], base.view(3, 2, 6, 12)[:, 1].reshape(18, 12))


def test_heads_by_name_and_beside_whole_parameters() -> None:
    model = inlay.attach(build("t5"), Partial(heads={"decoder.block.0": [0]}))
    assert {name.split(".")[5] for name in trained(model)} == {"SelfAttention", "EncDecAttention"}
    assert all(name.startswith("decoder.block.0.") for name in trained(model))
    model = inlay.attach(build("bert"), Partial(top_k=1, heads={0: [0], 1: [0]}))
    assert values(model)["encoder.layer.1.attention.self.query.weight"].shape == (32, 32)
    assert values(model)["encoder.layer.0.attention.self.query.weight"].shape == (8, 32)


def test_heads_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"no head 4 in the attention of .*\.0\.attention\.self\.query, only 0 to 3"):
        inlay.attach(build("bert"), Partial(heads={0: [4]}))
    with pytest.raises(TargetError, match=r"heads={7: …} names no attention in BertModel"):
        inlay.attach(build("bert"), Partial(heads={7: [0]}))
    with pytest.raises(UnsupportedError, match=r"h\.0\.attn\.c_attn does not hold the queries"):
        inlay.attach(build("gpt2"), Partial(heads={0: [0]}))


def test_saved_heads_load(tmp_path: Path, ids: torch.Tensor) -> None:
    model = inlay.attach(build("bert"), Partial(heads={0: [2]}, targets="pooler"))
    with torch.no_grad():
        for parameter in adapters_of(model).get("default").parameters():
            parameter.add_(torch.randn_like(parameter))
    inlay.save(model, tmp_path)
    loaded = inlay.load(build("bert"), tmp_path)
    assert torch.equal(loaded(ids)[1], model(ids)[1])


def test_with_another_method(ids: torch.Tensor) -> None:
    model = inlay.attach(build("bert"), [inlay.LoRA(r=2, targets="query"), Partial(top_k=1)])
    with torch.no_grad():
        for parameter in adapters_of(model).get("default").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    expected = model(ids)[0]
    inlay.merge(model)
    torch.testing.assert_close(model(ids)[0], expected, rtol=1e-5, atol=1e-5)


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Numbers of the blocks, and 'embeddings', whose copies are not what they were."""
    changed = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    return {name.split(".")[1] if name.startswith("layers.") else name.split(".")[0] for name in changed}


def test_gradual_unfreezing(ids: torch.Tensor) -> None:
    model = build("llama", num_hidden_layers=3)
    inlay.attach(model, Partial(top_k=3, embeddings=True, targets="re:norm[.]weight", unfreeze_every=2))
    optimizer, stages = adamw(model), []
    for _ in range(8):
        before = {name: value.detach().clone() for name, value in values(model).items()}
        step(model, optimizer, ids)
        stages.append(moved(model, before))
    late = [{"2", "norm"}, {"1", "2", "norm"}, {"0", "1", "2", "norm"}, {"0", "1", "2", "norm", "embed_tokens"}]
    assert stages == [late[i // 2] for i in range(8)]
    assert all(p.requires_grad for p in adapters_of(model).get("default").parameters())


def test_a_resumed_schedule_is_the_same_schedule(ids: torch.Tensor) -> None:
    method = Partial(top_k=2, unfreeze_every=0.5)
    whole = inlay.attach(build("llama"), method)
    (controller,) = inlay.controllers(whole)
    with pytest.raises(TrainingError, match=r"prepare\(total_steps\)"):
        controller.after_step(adamw(whole))
    controller.prepare(4)
    optimizer = adamw(whole)
    for _ in range(2):
        step(whole, optimizer, ids)
    state = controller.state_dict()
    resumed = inlay.attach(build("llama"), method)
    (other,) = inlay.controllers(resumed)
    other.load_state_dict(state)
    second = adamw(resumed)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for one, two in zip(values(resumed).values(), values(whole).values(), strict=True):
            one.copy_(two)
    for _ in range(2):
        step(whole, optimizer, ids)
        step(resumed, second, ids)
    assert all(torch.equal(values(resumed)[name], value) for name, value in values(whole).items())
    twin = copy.deepcopy(resumed)
    assert inlay.controllers(twin)[0].state_dict() == {"step": 4, "period": 2}
    assert inlay.controllers(twin)[0].pieces[0] is not other.pieces[0]


def test_nothing_chosen() -> None:
    with pytest.raises(ConfigError, match="chooses nothing"):
        Partial()
    for wrong in ({"top_k": -1}, {"top_k": 1.5}, {"top_k": 1, "unfreeze_every": 0}):
        with pytest.raises(ConfigError, match="PartialFineTuning"):
            Partial(**wrong)
