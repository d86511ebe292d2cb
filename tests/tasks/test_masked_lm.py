"""Masked language modelling: how tokens are chosen, that masks repeat exactly, and that no text is lost."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from inlay.errors import DataError
from inlay.tasks.batches import IGNORE
from inlay.tasks.data import read_splits
from inlay.tasks.task import Task, make_task


@pytest.fixture(scope="module")
def rows(shared_data: Path) -> Dataset:
    return read_splits(str(shared_data / "text" / "wikitext2_test.txt.gz"))["train"].select(range(0, 600, 10))


@pytest.fixture(scope="module")
def task(rows: Dataset) -> Task:
    return make_task("masked-lm", max_length=64).resolve({"train": rows})


def test_end_to_end_on_real_text(task: Task, rows: Dataset, bert: Path) -> None:
    tokenizer, model = task.load_tokenizer(bert), task.load_model(bert)
    some = rows.select(range(6))
    batch = task.collator(tokenizer, model)(task.features(some, tokenizer, train=True).to_list())
    assert model(**batch).loss.isfinite()
    scores = task.evaluate(model, tokenizer, some)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["loss"] == pytest.approx(math.log(len(tokenizer)), rel=0.05)  # untrained: about uniform
    # the same masks, however the rows are batched; padding changes the last bits of float32
    assert task.evaluate(model, tokenizer, some, batch_size=2) == pytest.approx(scores, rel=1e-5)
    assert task.evaluate(model, tokenizer, some) == scores


def test_no_text_is_lost_and_pieces_fit(task: Task, rows: Dataset, bert: Path) -> None:
    tokenizer = task.load_tokenizer(bert)
    features = task.features(rows, tokenizer, train=True)
    assert max(len(ids) for ids in features["input_ids"][:]) == 64
    pieces = [
        token for ids, special in zip(features["input_ids"][:], features["special_tokens_mask"][:], strict=True)
        for token, is_special in zip(ids, special, strict=True) if not is_special
    ]  # fmt: skip
    whole = [
        token
        for text in rows["text"][:]
        for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ]
    assert pieces == whole


def test_fifteen_percent_and_eighty_ten_ten(task: Task, rows: Dataset, bert: Path) -> None:
    tokenizer, model = task.load_tokenizer(bert), task.load_model(bert)
    features = task.features(rows, tokenizer, train=True).to_list()
    batch = task.collator(tokenizer, model)(features)
    original = torch.tensor([[*row["input_ids"], *[0] * (64 - len(row["input_ids"]))] for row in features])
    ordinary = (original == 1) | (original > 4)  # words and [UNK]: neither padding nor [CLS], [SEP]
    chosen = batch["labels"] != IGNORE
    assert not (chosen & ~ordinary).any()
    assert torch.equal(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    count = chosen.sum().item()

    # binomial: four standard deviations of the share around its mean
    def near(share: float, mean: float, among: float) -> bool:
        return abs(share - mean) < 4 * math.sqrt(mean * (1 - mean) / among)

    assert near(count / ordinary.sum().item(), 0.15, ordinary.sum().item())
    masked = (batch["input_ids"][chosen] == tokenizer.mask_token_id).float().mean().item()
    kept = (batch["input_ids"][chosen] == original[chosen]).float().mean().item()
    assert near(masked, 0.8, count)
    assert near(kept, 0.1, count)


def test_masks_change_with_the_batch_and_repeat_with_it(task: Task, rows: Dataset, bert: Path) -> None:
    tokenizer, model = task.load_tokenizer(bert), task.load_model(bert)
    features = task.features(rows, tokenizer, train=True).to_list()[:8]
    state = torch.get_rng_state()
    first = task.collator(tokenizer, model)(features)
    assert torch.equal(torch.get_rng_state(), state), "masks must not draw from the trainer's random numbers"
    torch.manual_seed(99)
    again = task.collator(tokenizer, model)(features)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = task.collator(tokenizer, model)(features[::-1])
    assert not torch.equal(other["labels"].flip(0), first["labels"])
    seeded = make_task("masked-lm", columns={"text": "text"}, max_length=64, seed=1).collator(tokenizer, model)(
        features
    )
    assert not torch.equal(seeded["labels"], first["labels"])


def test_every_example_has_something_to_guess(task: Task, bert: Path) -> None:
    tokenizer, model = task.load_tokenizer(bert), task.load_model(bert)
    short = Dataset.from_list([{"text": word} for word in ("a", "my card", "x")])
    for order in ([0, 1, 2], [2, 0, 1], [1]):
        batch = task.collator(tokenizer, model)(task.features(short.select(order), tokenizer, train=True).to_list())
        assert ((batch["labels"] != IGNORE).sum(-1) >= 1).all()


def test_predict_fills_the_masks(task: Task, bert: Path) -> None:
    tokenizer, model = task.load_tokenizer(bert), task.load_model(bert)
    found = task.predict(
        model, tokenizer, Dataset.from_list([{"text": "where is my [MASK] and [MASK]"}, {"text": "[MASK]"}])
    )
    assert [len(row["fills"]) for row in found] == [2, 1]
    assert "[MASK]" not in found[0]["filled"]
    assert found[0]["filled"].startswith("where is my ")
    assert all(0 < fill["score"] <= 1 for row in found for fill in row["fills"])
    with pytest.raises(DataError, match=r"row 1: there is no \[MASK\] to fill in"):
        task.predict(model, tokenizer, Dataset.from_list([{"text": "[MASK]"}, {"text": "none"}]))


def test_empty_texts_are_refused() -> None:
    with pytest.raises(DataError, match=r"row 1: the text .* is empty"):
        make_task("masked-lm").resolve({"train": Dataset.from_list([{"text": "a"}, {"text": ""}])})
