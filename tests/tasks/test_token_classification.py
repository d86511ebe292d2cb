"""Token classification: tags at first sub-tokens, words that are lost, spans and plain tags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import PreTrainedTokenizerFast

from inlay.errors import ConfigError, DataError
from inlay.tasks.batches import IGNORE
from inlay.tasks.data import read_splits
from inlay.tasks.task import Task, make_task

Write = Callable[..., Path]
ROWS = Dataset.from_dict(
    {
        "tokens": [["Jo", "Smith", "lives", "in", "Rome"], ["nobody", "here"]],
        "tags": [["I-PER", "I-PER", "O", "O", "B-LOC"], ["O", "O"]],
    }
)


def resolve(splits: dict[str, Dataset] | Dataset, **fields: Any) -> Task:
    splits = {"train": splits} if isinstance(splits, Dataset) else splits
    return make_task("token-classification", **fields).resolve(splits)


def test_published_entities_end_to_end(shared_data: Path, bert: Path) -> None:
    splits = {name: rows.select(range(200)) for name, rows in read_splits(shared_data / "ner" / "wnut17").items()}
    task = resolve(splits)
    kinds = ["corporation", "creative-work", "group", "location", "person", "product"]
    assert task.labels == ("O", *(f"{letter}-{kind}" for kind in kinds for letter in "BI"))
    assert (task.scheme, task.primary_metric) == ("bio", ("f1", True))
    tokenizer, model = task.load_tokenizer(bert), task.load_model(bert)
    rows = splits["validation"].select(range(8))
    batch = task.collator(tokenizer, model)(task.features(rows, tokenizer, train=True).to_list())
    assert model(**batch).loss.isfinite()
    scores = task.evaluate(model, tokenizer, rows)
    assert set(scores) == {"loss", "accuracy", "precision", "recall", "f1", "words_lost"}
    model.eval()
    with torch.no_grad():
        assert scores["loss"] == pytest.approx(model(**batch).loss.item(), abs=1e-5)
    found = task.predict(model, tokenizer, rows.remove_columns("tags"))
    assert [row["tokens"] for row in found] == rows["tokens"][:]
    assert [len(row["tags"]) for row in found] == [len(words) for words in rows["tokens"][:]]


def test_a_published_file_with_stray_tags_is_repaired(shared_data: Path) -> None:
    rows = read_splits(shared_data / "ner" / "masakhaner2_hau")["train"]
    tags = resolve(rows)._tags(rows)
    before = [tag for row in rows["tags"][:] for tag in row]
    after = [tag for row in tags for tag in row]
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert all(old.startswith("I-") and new == "B-" + old[2:] for old, new in changed)
    assert 0 < len(changed) < 5  # "one or two tags in a file", as the data's notes say


def test_tags_stand_at_first_sub_tokens(bert: Path) -> None:
    task = resolve(ROWS)
    tokenizer = task.load_tokenizer(bert)
    features = task.features(ROWS, tokenizer, train=True)
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in features["input_ids"][:]]
    for row, (pieces, labels) in enumerate(zip(tokens, features["labels"][:], strict=True)):
        starts = [index for index, piece in enumerate(pieces) if not piece.startswith(("##", "["))]
        assert [index for index, label in enumerate(labels) if label != IGNORE] == starts
        expected = [["B-PER", "I-PER", "O", "O", "B-LOC"], ["O", "O"]][row]
        assert [task.labels[labels[index]] for index in starts] == expected


class Answering(torch.nn.Module):
    """Stands for a model: gives every token the logits of its true tag, so that evaluation must be perfect."""

    def __init__(self, model: Any, answers: dict[tuple[int, ...], list[int]]) -> None:
        super().__init__()
        self.inner, self.answers, self.config = model, answers, model.config

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        found = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        found.logits = torch.zeros_like(found.logits)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            for place, label in enumerate(self.answers[tuple(ids[: sum(mask)])]):
                found.logits[row, place, max(label, 0)] = 9.0
        return found


def answering(task: Task, model: Any, tokenizer: PreTrainedTokenizerFast, rows: Dataset) -> Any:
    features = task.features(rows, tokenizer, train=True).to_list()
    return Answering(model, {tuple(row["input_ids"]): row["labels"] for row in features})


def test_a_perfect_model_scores_one_and_lost_words_cost(bert: Path) -> None:
    task = resolve(ROWS)
    tokenizer, model = task.load_tokenizer(bert), task.load_model(bert)
    perfect = answering(task, model, tokenizer, ROWS)
    scores = task.evaluate(perfect, tokenizer, ROWS)
    assert (scores["f1"], scores["accuracy"], scores["words_lost"]) == (1.0, 1.0, 0.0)
    assert task.predict(perfect, tokenizer, ROWS)[0]["tags"] == ["B-PER", "I-PER", "O", "O", "B-LOC"]
    # [CLS] j ##o s ##m … : 12 tokens hold "Jo Smith" and a part of "lives"; "in" and "Rome" are cut off
    short = make_task("token-classification", max_length=12).resolve({"train": ROWS})
    scores = short.evaluate(answering(short, model, tokenizer, ROWS), tokenizer, ROWS)
    assert scores["words_lost"] == 2.0
    assert (scores["precision"], scores["recall"]) == (1.0, 0.5)
    assert scores["accuracy"] == pytest.approx(6 / 7)


def test_words_that_the_tokenizer_drops_are_lost_not_shifted(bert: Path) -> None:
    rows = Dataset.from_dict({"tokens": [["Jo", "\u200d", "Rome"]], "tags": [["B-PER", "O", "B-LOC"]]})
    task = resolve(rows)
    tokenizer, model = task.load_tokenizer(bert), task.load_model(bert)
    scores = task.evaluate(answering(task, model, tokenizer, rows), tokenizer, rows)
    assert (scores["f1"], scores["words_lost"]) == (1.0, 1.0)


def test_plain_tags_are_scored_by_accuracy(bert: Path) -> None:
    names = ["NOUN", "VERB", "ADJ"]
    features = Features({"words": List(Value("string")), "pos_tags": List(ClassLabel(names=names))})
    rows = Dataset.from_dict({"words": [["cats", "sleep"], ["soft"]], "pos_tags": [[0, 1], [2]]}, features=features)
    task = resolve(rows)
    assert (dict(task.columns), task.labels) == ({"tokens": "words", "tags": "pos_tags"}, tuple(names))
    assert (task.scheme, task.primary_metric) == ("plain", ("accuracy", True))
    tokenizer, model = task.load_tokenizer(bert), task.load_model(bert)
    assert set(task.evaluate(model, tokenizer, rows)) == {"loss", "accuracy", "macro_f1", "words_lost"}
    assert {tag for row in task.predict(model, tokenizer, rows) for tag in row["tags"]} <= set(names)


def test_byte_level_tokenizers_are_told_that_words_begin_with_a_space(gpt2: Path, tmp_path: Path) -> None:
    tokenizer = make_task("token-classification").load_tokenizer(gpt2)
    encoded = tokenizer([["ab", "c"]], is_split_into_words=True)
    assert len(encoded.word_ids(0)) >= 3


def test_the_plain_form_keeps_the_scheme(bert: Path) -> None:
    task = resolve(ROWS)
    assert Task.from_dict(task.to_dict()) == task


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"tokens": ["a", "b"], "tags": ["O"]}], "line 1: 2 tokens and 1 tags .*each token needs one tag"),
        ([{"tokens": [], "tags": []}], "line 1: the tokens .* are empty"),
        ([{"tokens": ["a"], "tags": ["O"]}, {"tokens": ["a", None], "tags": ["O"] * 2}], "line 2: the tokens .* not a"),
        ([{"tokens": ["a"], "tags": ["O"]}, {"tokens": ["a"], "tags": None}], "line 2: 1 tokens and tags None"),
        ([{"tokens": "a b", "tags": "O O"}], "which column is the tokens"),
        ([{"tokens": ["a"], "tags": None}], "which column is the tags"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(write: Write, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        resolve(read_splits(write("train.jsonl", rows)))


def test_a_tag_that_training_has_not(bert: Path) -> None:
    other = Dataset.from_dict({"tokens": [["a"]], "tags": [["B-ORG"]]})
    with pytest.raises(DataError, match=r"row 0: the validation label 'B-ORG' is not one .*labels: O, B-LOC"):
        resolve({"train": ROWS, "validation": other})
    continued = Dataset.from_dict({"tokens": [["a", "b"]], "tags": [["B-LOC", "I-LOC"]]})
    assert resolve({"train": ROWS, "test": continued}).labels == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    with pytest.raises(ConfigError, match="does not know its tags yet"):
        make_task("token-classification").load_model(bert)
