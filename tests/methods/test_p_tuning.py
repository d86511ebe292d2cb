"""P-tuning: what its encoders compute, that they are kept, and that deep prompts are prefixes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.prompt_hosts import TEXT, N, before, host, padded
from torch import Tensor, nn

import inlay
from inlay import PrefixTuning, PTuning
from inlay.engine.adapters import adapters_of
from inlay.engine.prompts.entry import prompt_of
from inlay.errors import BaseModelError, CheckpointError, ConfigError

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""The same sums over the same keys, in another order of rows."""
ENCODERS: dict[str, dict[str, Any]] = {
    "none": {"encoder": None},
    "mlp": {"hidden_size": 5},
    "lstm": {"encoder": "lstm", "hidden_size": 5},
    "one layer": {"encoder": "lstm", "hidden_size": 5, "num_layers": 1},
}


def attached(name: str, head: str, **fields: Any) -> Any:
    return inlay.attach(host(name, head), PTuning(num_virtual_tokens=N, **fields), modules_to_save=[])


def encoder_of(model: nn.Module) -> nn.Module:
    return prompt_of(adapters_of(model).loaded["default"].placed[0])


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(("name", "head"), [("bert", "masked"), ("gpt2", "causal")])
def test_the_model_reads_what_the_encoder_gives(name: str, head: str, encoder: str) -> None:
    model = attached(name, head, **ENCODERS[encoder])
    base = inlay.detach(copy.deepcopy(model))
    vectors = encoder_of(model)().detach()
    embeds = torch.cat((vectors.expand(2, N, -1), base.get_input_embeddings()(TEXT)), dim=1)  # type: ignore[operator]
    found, expected = model(TEXT, labels=TEXT), base(inputs_embeds=embeds, labels=before(TEXT, -100))
    torch.testing.assert_close(found.logits, expected.logits[:, N:], **CLOSE)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    found.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_the_encoders_are_those_of_the_paper() -> None:
    def linear(layer: Any, x: Tensor) -> Tensor:
        return x @ layer.weight.T + layer.bias

    mlp: Any = encoder_of(attached("llama", "causal", hidden_size=5))
    first, second, third = mlp.mlp[0], mlp.mlp[2], mlp.mlp[4]
    expected = linear(third, linear(second, linear(first, mlp.embedding).relu()).relu())
    torch.testing.assert_close(mlp(), expected, **CLOSE)

    lstm: Any = encoder_of(attached("llama", "causal", encoder="lstm", hidden_size=5, num_layers=1))

    def run(direction: str) -> Tensor:
        w, u, b, c = (
            getattr(lstm.lstm, f"{n}_l0{direction}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h = cell = torch.zeros(5)
        rows = []
        for x in lstm.embedding.flip(0) if direction else lstm.embedding:
            i, f, g, o = (w @ x + u @ h + b + c).chunk(4)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            h = o.sigmoid() * cell.tanh()
            rows.append(h)
        return torch.stack(rows).flip(0) if direction else torch.stack(rows)

    both = torch.cat((run(""), run("_reverse")), dim=1)
    torch.testing.assert_close(lstm(), linear(lstm.mlp[2], linear(lstm.mlp[0], both).relu()), **CLOSE)


@pytest.mark.parametrize(("name", "head"), [("llama", "causal"), ("t5", "conditional")])
def test_it_generates_the_same_by_every_way(name: str, head: str) -> None:
    model = attached(name, head, encoder="lstm", hidden_size=5)
    inputs = padded(model, "left" if head == "causal" else "right")
    expected = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, use_cache=False), expected)
    alone = model.generate(TEXT[1:, :-2], max_new_tokens=4)
    assert torch.equal(alone[0, -4:], expected[1, -4:])


def test_the_encoder_is_stored_once_and_stays_shared() -> None:
    model = attached("bart", "conditional", hidden_size=5)
    keys = [key for key in model.state_dict() if "inlays" in key]
    assert len(keys) == 7
    assert all(key.startswith("model.encoder.embed_tokens.inlays.default.p_tuning.prompt.") for key in keys)
    embeds = model.get_encoder().get_input_embeddings()(TEXT).detach()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(TEXT, labels=TEXT).logits, model(TEXT, labels=TEXT).logits)
        with torch.no_grad():
            encoder_of(other).embedding.zero_()  # type: ignore[union-attr, operator]
        by_ids, by_embeddings = other(TEXT, labels=TEXT).logits, other(inputs_embeds=embeds, labels=TEXT).logits
        torch.testing.assert_close(by_ids, by_embeddings, **CLOSE)
        assert not torch.equal(by_ids, model(TEXT, labels=TEXT).logits)


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"encoder": None}, N * 32),
        ({}, N * 32 + 3 * 32 * 33),
        ({"hidden_size": 5}, N * 32 + 5 * 33 + 5 * 6 + 32 * 6),
        ({"encoder": "lstm", "hidden_size": 5, "num_layers": 1}, N * 32 + 40 * 39 + 10 * 11 + 32 * 11),
        ({"encoder": "lstm", "hidden_size": 5, "num_layers": 3}, N * 32 + 40 * 39 + 2 * 40 * 17 + 10 * 11 + 32 * 11),
        ({"deep": True}, N * 2 * 32),  # 2 layers; keys and values of 2 heads of 8
        ({"deep": True, "hidden_size": 5}, N * 32 + 5 * 33 + 6 * 2 * 32),
    ],
)
def test_parameters_are_those_of_the_formula(fields: dict[str, Any], count: int) -> None:
    assert inlay.summary(attached("llama", "causal", **fields)).trainable_parameters == count


@pytest.mark.parametrize("hidden_size", [None, 5])
def test_deep_prompts_are_prefixes(hidden_size: int | None, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = attached("llama", "causal", deep=True, hidden_size=hidden_size)
    torch.manual_seed(3)
    prefix = inlay.attach(host("llama", "causal"), PrefixTuning(num_virtual_tokens=N, projection_size=hidden_size))
    expected = prefix(TEXT).logits
    assert torch.equal(model(TEXT).logits, expected)
    inlay.save(model, tmp_path)
    assert torch.equal(inlay.load(host("llama", "causal"), tmp_path)(TEXT).logits, expected)
    inlay.detach(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("encoder", ENCODERS)
def test_training_goes_on_from_the_files(encoder: str, tmp_path: Path) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(TEXT, labels=TEXT).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)

    model = attached("gpt2", "causal", **ENCODERS[encoder])
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    inlay.save(model, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    unbroken = train(model, optimizer, 3)
    resumed = inlay.load(host("gpt2", "causal"), tmp_path, trainable=True)
    again = optimizer_of(resumed)
    again.load_state_dict(state)
    assert train(resumed, again, 3) == unbroken
    if ENCODERS[encoder].get("encoder", "mlp"):
        (tmp_path / "adapter_extra.safetensors").unlink()
        with pytest.raises(CheckpointError):
            inlay.load(host("gpt2", "causal"), tmp_path)


def test_dropout_in_the_encoder_never_reaches_the_file(tmp_path: Path) -> None:
    model = attached("gpt2", "causal", encoder="lstm", hidden_size=5, dropout=0.5).train()
    prompt = encoder_of(model)
    assert not torch.equal(prompt(), prompt())
    (stored, _), (again, _) = (
        PTuning(encoder="lstm").export(adapters_of(model).loaded["default"].placed[0]) for _ in "12"
    )
    assert torch.equal(stored["prompt_embeddings"], again["prompt_embeddings"])
    assert prompt.training


def test_compiling() -> None:
    model = attached("llama", "causal", hidden_size=5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(TEXT, use_cache=False).logits, model(TEXT).logits, **CLOSE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 0}, "1 or more"),
        ({"hidden_size": 0}, "1 or more"),
        ({"num_layers": 0}, "1 or more"),
        ({"num_virtual_tokens": None}, "1 or more"),
        ({"num_virtual_tokens": "20"}, "1 or more"),
        ({"encoder": "gru"}, "choose"),
        ({"dropout": 0.1}, "layers of an LSTM"),
        ({"dropout": 1.0, "encoder": "lstm"}, "lies in"),
        ({"deep": True, "encoder": "lstm"}, "no LSTM"),
        ({"layers": 0}, "deep=True only"),
        ({"overrides": {"0": {}}}, "no overrides"),
    ],
)
def test_fields_that_cannot_be_used_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PTuning(**fields)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_prompt_starts_from_another(encoder: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = attached("bert", "masked", **ENCODERS[encoder])
    inlay.save(source, tmp_path)
    torch.manual_seed(2)
    started = attached("bert", "masked", **ENCODERS[encoder], init_from=str(tmp_path))
    for mine, there in zip(encoder_of(started).parameters(), encoder_of(source).parameters(), strict=True):
        assert torch.equal(mine, there)
        assert mine.requires_grad
    assert torch.equal(started.eval()(TEXT).logits, source.eval()(TEXT).logits)
    inlay.save(started, tmp_path / "again")  # which no longer needs its source
    for file in tmp_path.glob("*.*"):
        file.unlink()
    again = inlay.load(host("bert", "masked"), tmp_path / "again")
    assert torch.equal(again.eval()(TEXT).logits, started(TEXT).logits)


def test_vectors_start_from_any_prompt_or_their_mean(tmp_path: Path) -> None:
    vectors = []
    for number, method in enumerate(
        [PTuning(num_virtual_tokens=N, hidden_size=5), inlay.PromptTuning(num_virtual_tokens=N)]
    ):
        source = inlay.attach(host("bert", "masked"), method, modules_to_save=[])
        inlay.save(source, tmp_path / str(number))
        vectors.append(encoder_of(source)().detach())
    folders = [str(tmp_path / "0"), str(tmp_path / "1")]
    mean = attached("bert", "masked", encoder=None, init_from=folders, init_weights=[3, 1])
    torch.testing.assert_close(encoder_of(mean)(), (3 * vectors[0] + vectors[1]) / 4, **CLOSE)


def test_deep_prompts_start_from_prefixes(tmp_path: Path) -> None:
    source = inlay.attach(host("bert", "masked"), PrefixTuning(num_virtual_tokens=N), modules_to_save=[])
    inlay.save(source, tmp_path)
    started = attached("bert", "masked", deep=True, init_from=str(tmp_path))
    assert torch.equal(started.eval()(TEXT).logits, source.eval()(TEXT).logits)


def test_starts_that_cannot_be(tmp_path: Path) -> None:
    inlay.save(attached("bert", "masked", hidden_size=5), tmp_path / "mlp")
    inlay.save(attached("gpt2", "causal", encoder=None), tmp_path / "none")
    inlay.save(attached("bert", "masked", encoder=None), tmp_path / "bert")
    mlp = str(tmp_path / "mlp")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"init_from": str(tmp_path / "bert")}, ConfigError, "has encoder=None and 'mlp' is needed: .*or encoder=None"),
        ({"init_from": mlp, "encoder": "lstm"}, ConfigError, "has encoder='mlp' and 'lstm' is needed"),
        ({"init_from": mlp, "hidden_size": 6}, ConfigError, "has encoder='mlp' of other sizes: set"),
        ({"init_from": [mlp, mlp]}, ConfigError, "encoders have no mean; name one folder"),
        ({"init_from": []}, ConfigError, "name at least one folder"),
        ({"init_weights": [1, 2]}, ConfigError, "needs init_from="),
        ({"init_from": str(tmp_path / "none")}, BaseModelError, "made for another base model"),
        ({"init_from": mlp, "deep": True, "encoder": None}, ConfigError, "a prefix .* is needed here"),
        ({"init_from": mlp, "deep": True, "encoder": None, "hidden_size": 5}, ConfigError, "has no inverse"),
    ]
    for fields, error, message in cases:
        with pytest.raises(error, match=message):
            attached("bert", "masked", **fields)
