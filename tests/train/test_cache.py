"""`train.cache_frozen`: the same losses, from states computed once; and every case in which it must step aside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train.interrupted import curve, same_adapters, train_until
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.bert import modeling_bert

import inlay
from inlay.errors import ConfigError
from inlay.tasks.batches import Padder
from inlay.train import Run, train
from inlay.train.cache import FrozenCache
from inlay.train.callbacks import Curve
from inlay.train.frozen import NotFixed, NothingFrozen, frozen_part
from inlay.train.options import Options
from inlay.train.trainer import Trainer

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(**changes: Any) -> nn.Module:
    return BertForSequenceClassification(BertConfig(vocab_size=40, **SIZES, **{**STILL, **changes}))


def gpt2() -> nn.Module:
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40, bos_token_id=1, eos_token_id=1, **none)
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "bert": bert,
    "roberta": lambda: RobertaForSequenceClassification(
        RobertaConfig(vocab_size=40, max_position_embeddings=40, **SIZES, **STILL)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=40, **SIZES)),
    "gpt2": gpt2,
    "vit": lambda: ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SIZES, **STILL)),
}


def features(family: str) -> list[dict[str, Any]]:
    """20 rows, of unlike lengths where they are text."""
    draw = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for row in range(20):
        length = 4 + row % 5
        ids = torch.randint(2, 40, (length,), generator=draw).tolist()
        if family == "vit":
            rows.append({"pixel_values": torch.randn(3, 16, 16, generator=draw).tolist(), "labels": row % 2})
        elif family in ("llama", "gpt2"):
            rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": ids})
        else:
            rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": row % 2})
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    pad = {"input_ids": 0, "attention_mask": 0}
    return Padder({**pad, "labels": -100} if isinstance(rows[0]["labels"], list) else pad)(rows)


class Ran:
    """One training of 4 epochs of 20 rows, with its losses, its lines and how often each block computed."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        method: Any,
        family: str = "bert",
        cache: Mapping[str, Any] | None = None,
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]] = collate,
        **train: Any,
    ) -> None:
        self.lines: list[str] = []
        self.model = inlay.attach(model, method)
        self.cache = FrozenCache(Options.of(cache or {}), self.lines.append)
        folder.mkdir()
        args = TrainingArguments(
            str(folder), num_train_epochs=4, per_device_train_batch_size=4, learning_rate=0.01, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=False, **train,
        )  # fmt: skip
        curve = Curve(folder / "curve.jsonl")
        self.trainer = Trainer(
            model=self.model, args=args, features=features(family), collator=collator, curve=curve, around=[self.cache]
        )
        torch.manual_seed(0)
        self.trainer.run()
        self.losses = torch.tensor([line["loss"] for line in curve.lines], dtype=torch.float64)


def made(family: str) -> nn.Module:
    torch.manual_seed(1)
    return FAMILIES[family]()


# A row served in a batch padded to another length was rounded in another order: some 1e-7 of the loss in fp32, and 20
# steps at this learning rate let it grow; 1e-5 is still a hundredth of what one wrong row would change.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_losses_are_those_of_the_uncached_run(family: str, place: str, tmp_path: Path) -> None:
    method = inlay.LoRA(r=2, layers=[2], dropout=0.1)
    plain = Ran(tmp_path / "plain", made(family), method, family, {"cache_frozen": "off"})
    cached = Ran(tmp_path / "cached", made(family), method, family, {"cache_frozen": place})
    torch.testing.assert_close(cached.losses, plain.losses, **CLOSE)
    assert cached.losses[-1] != cached.losses[0]
    [line] = cached.lines
    assert line.startswith("cache_frozen: 2 of 3 blocks are frozen; the states of 20 rows are computed once")
    assert line.endswith("on disk)" if place == "disk" else "in memory)")
    assert not [name for block in cached.cache.part.blocks for name in vars(block) if name == "forward"]  # type: ignore[union-attr]
    cached.cache.close()
    assert not (tmp_path / "cached" / "frozen-states").exists()


def test_a_head_needs_no_block_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Ran(tmp_path / "plain", made("bert"), inlay.FrozenFeatures(), cache={"cache_frozen": "off"})
    forward, rows = modeling_bert.BertAttention.forward, Counter[str]()

    def counted(self: nn.Module, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows["grad" if torch.is_grad_enabled() else "once"] += len(states)
        return forward(self, states, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(modeling_bert.BertAttention, "forward", counted)
    cached = Ran(tmp_path / "cached", made("bert"), inlay.FrozenFeatures())
    torch.testing.assert_close(cached.losses, plain.losses, **CLOSE)
    # With gradients: the traced batch alone. Without: every row once, and the batch on which the cache is tried.
    assert rows == {"grad": 3 * 4, "once": 3 * (20 + 4)}
    assert cached.lines[0].startswith("cache_frozen: 3 of 3 blocks are frozen")


def test_bfloat16_halves_the_bytes_and_is_near(tmp_path: Path) -> None:
    exact = Ran(tmp_path / "exact", made("bert"), inlay.FrozenFeatures())
    half = Ran(tmp_path / "half", made("bert"), inlay.FrozenFeatures(), cache={"cache_frozen_dtype": "bfloat16"})
    tokens = sum(len(row["input_ids"]) for row in features("bert"))
    assert exact.cache.states is not None
    assert half.cache.states is not None
    assert exact.cache.states.nbytes == tokens * 16 * 4 == 2 * half.cache.states.nbytes
    torch.testing.assert_close(half.losses, exact.losses, rtol=2**-8, atol=0)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
def test_gradient_checkpointing_goes_with_it(tmp_path: Path) -> None:
    method = inlay.PartialFineTuning(top_k=2)
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    plain = Ran(tmp_path / "plain", made("bert"), method, cache={"cache_frozen": "off"}, **settings)
    cached = Ran(tmp_path / "cached", made("bert"), method, **settings)
    torch.testing.assert_close(cached.losses, plain.losses, **CLOSE)
    assert cached.lines[0].startswith("cache_frozen: 1 of 3 blocks")
    settings["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    with pytest.raises(ConfigError, match="reentrant gradient checkpointing wants gradients"):
        Ran(tmp_path / "other", made("bert"), method, cache={"cache_frozen": "memory"}, **settings)


def test_autocast_states_are_those_of_autocast(tmp_path: Path) -> None:
    plain = Ran(tmp_path / "plain", made("bert"), inlay.FrozenFeatures(), cache={"cache_frozen": "off"}, bf16=True)
    cached = Ran(tmp_path / "cached", made("bert"), inlay.FrozenFeatures(), bf16=True)
    torch.testing.assert_close(cached.losses, plain.losses, rtol=2**-8, atol=0)
    assert cached.cache.states is not None


# -- where it must step aside -----------------------------------------------------------------------------------------


def masking(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = collate(rows)
    hidden = torch.rand(batch["input_ids"].shape) < 0.5
    return {**batch, "input_ids": torch.where(hidden, 1, batch["input_ids"])}


@pytest.mark.parametrize(
    ("model", "collator", "cache", "why"),
    [
        (lambda: bert(hidden_dropout_prob=0.1), collate, {}, "draw random numbers in training (dropout)"),
        (lambda: bert(attention_probs_dropout_prob=0.1), collate, {}, "draw random numbers in training (dropout)"),
        (bert, masking, {}, "the rows come out of the collator otherwise each time"),
        (bert, collate, {"cache_frozen_budget": "1kB"}, "take 7.7 kB, more than train.cache_frozen_budget (1.0 kB)"),
    ],
)
def test_where_it_does_not_apply_auto_says_so_and_memory_is_an_error(
    model: Callable[[], nn.Module], collator: Any, cache: dict[str, Any], why: str, tmp_path: Path
) -> None:
    def run(name: str, place: str) -> Ran:
        torch.manual_seed(1)
        around = {**cache, "cache_frozen": place}
        return Ran(tmp_path / name, model(), inlay.FrozenFeatures(), cache=around, collator=collator)

    off, auto = run("off", "off"), run("auto", "auto")
    assert torch.equal(off.losses, auto.losses)
    [line] = auto.lines
    assert line.startswith("cache_frozen: not used, because ")
    assert why in line
    with pytest.raises(ConfigError, match=r"train\.cache_frozen=memory cannot be used: ") as caught:
        run("memory", "memory")
    assert why in str(caught.value)


@pytest.mark.parametrize(
    "method",
    [
        inlay.LoRA(r=2),
        inlay.LoRA(r=2, layers=[0]),
        inlay.PromptTuning(num_virtual_tokens=2),
        inlay.BitFit(),
        inlay.PartialFineTuning(embeddings=True),
    ],
)
def test_nothing_is_said_where_nothing_is_frozen(method: Any, tmp_path: Path) -> None:
    ran = Ran(tmp_path / "run", made("bert"), method)
    assert ran.lines == []
    assert ran.cache.states is None
    with pytest.raises(ConfigError, match=r"cannot be used: (the first block trains|something trains below)"):
        Ran(tmp_path / "again", made("bert"), method, cache={"cache_frozen": "memory"})


class MeanOfAll(BertForSequenceClassification):
    """Averages over padding too, which no cache of real tokens can serve."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        states = self.bert(input_ids, attention_mask).last_hidden_state.mean(1)
        return {"loss": nn.functional.cross_entropy(self.classifier(states), labels)}


def test_it_is_tried_before_it_is_used(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = MeanOfAll(BertConfig(vocab_size=40, initializer_range=1.0, **SIZES, **STILL))
    ran = Ran(tmp_path / "run", model, inlay.FrozenFeatures(head="classifier"))
    assert len(ran.lines) == 1
    assert ran.lines[0].startswith("cache_frozen: not used, because the loss of the first batch would be ")
    assert ran.cache.states is None


def trace(model: nn.Module, method: Any, **inputs: Any) -> Any:
    inlay.attach(model, method).train()
    batch = collate(features("bert")[:4])
    return frozen_part(model, lambda: model(**{**batch, **inputs}))


def test_what_unfreezes_later_counts_as_trained() -> None:
    later = inlay.PartialFineTuning(top_k=2, unfreeze_every=5)
    assert len(trace(bert(), later).blocks) == 1
    assert len(trace(bert(), inlay.PartialFineTuning(top_k=2)).blocks) == 1
    assert len(trace(bert(), inlay.PartialFineTuning(top_k=1)).blocks) == 2
    with pytest.raises(NothingFrozen):
        trace(bert(), inlay.PartialFineTuning(top_k=2, embeddings=True, unfreeze_every=5))


def test_models_that_do_more_than_hand_states_up_are_refused() -> None:
    albert = AlbertForSequenceClassification(AlbertConfig(vocab_size=40, embedding_size=16, **SIZES))
    with pytest.raises(NotFixed):
        trace(albert, inlay.FrozenFeatures())
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    with pytest.raises(NotFixed, match="has 2 stacks of blocks"):
        trace(t5, inlay.FrozenFeatures(head="lm_head"))
    with pytest.raises(NotFixed, match="BatchNorm"):
        model = bert()
        model.add_module("norm", nn.BatchNorm1d(2))
        trace(model, inlay.FrozenFeatures())


# -- dropout in the frozen part ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [inlay.FrozenFeatures(), inlay.LoRA(r=2, layers=[1, 2])])
def test_frozen_dropout_off_silences_the_frozen_part_alone(method: Any, tmp_path: Path) -> None:
    def run(name: str, **cache: Any) -> Ran:
        torch.manual_seed(1)
        model = bert(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
        return Ran(tmp_path / name, model, method, cache={"frozen_dropout": False, **cache})

    plain, cached = run("plain", cache_frozen="off"), run("cached")
    torch.testing.assert_close(cached.losses, plain.losses, **CLOSE)
    assert cached.cache.states is not None
    part: Any = plain.cache.part
    frozen = {id(module) for block in part.blocks for module in block.modules()}
    assert not any(module.training for module in part.modules)
    plain.model.train()
    part.silence()
    quiet = {id(module) for module in plain.model.modules() if not module.training}
    embeddings: Any = plain.model
    quiet -= {id(module) for module in embeddings.bert.embeddings.modules()}
    assert quiet == frozen - {id(m) for block in part.blocks for m in block.modules() if m.training}
    assert embeddings.dropout.training


def test_frozen_dropout_off_is_refused_where_it_cannot_be_done(tmp_path: Path) -> None:
    model = AlbertForSequenceClassification(AlbertConfig(vocab_size=40, embedding_size=16, **SIZES))
    with pytest.raises(ConfigError, match=r"train\.frozen_dropout=false cannot be used: "):
        Ran(tmp_path / "run", model, inlay.FrozenFeatures(), cache={"frozen_dropout": False})


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("at", [3, 7])
def test_a_resumed_run_equals_the_unbroken_one(
    make_run: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    at: int,
) -> None:
    settings = {"cache_frozen": place, "frozen_dropout": False}
    unbroken, broken = (make_run(name, settings, method="head") for name in ("unbroken", "broken"))
    whole = train(unbroken, progress=False)
    train_until(broken, at, monkeypatch)
    kept = Path(broken.out) / "checkpoints" / "frozen-states"
    assert kept.exists() == (place == "disk")
    resumed = train(broken, resume=True)
    assert ("are read back" if place == "disk" else "are computed once") in capsys.readouterr().err
    assert curve(broken) == curve(unbroken)
    assert same_adapters(broken, unbroken)
    assert resumed.metrics == whole.metrics
    assert not kept.exists()


def test_evaluations_after_the_first_compute_no_frozen_block(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    off = make_run("off", {"cache_frozen": "off", "frozen_dropout": False}, method="head")
    train(off, progress=False)
    forward, calls = modeling_bert.BertAttention.forward, list[str]()

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append("attention")
        return forward(self, *args, **kwargs)

    add = Curve.add

    def noted(self: Curve, line: dict[str, Any]) -> None:
        calls.append("validation" if "validation" in line else "step")
        add(self, line)

    monkeypatch.setattr(modeling_bert.BertAttention, "forward", counted)
    monkeypatch.setattr(Curve, "add", noted)
    cached = make_run("cached", {"frozen_dropout": False}, method="head")
    train(cached, progress=False)
    first = calls.index("validation")
    last = len(calls) - 1 - calls[::-1].index("validation")
    assert "attention" in calls[:first]
    assert "attention" not in calls[first:last]
    assert calls[:last].count("validation") == 2
    for served, computed in zip(curve(cached), curve(off), strict=True):
        kind = "loss" if "loss" in served else "validation"
        assert served[kind] == pytest.approx(computed[kind], rel=1e-5)
