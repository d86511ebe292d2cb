"""Text classification: columns and labels from real files, each problem type, and rows that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from scipy.stats import pearsonr, spearmanr

from inlay.errors import ConfigError, DataError
from inlay.tasks.class_metrics import regression_scores
from inlay.tasks.data import read_splits
from inlay.tasks.task import Task, make_task

Write = Callable[..., Path]
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def resolve(splits: dict[str, Dataset] | Dataset, **fields: Any) -> Task:
    splits = {"train": splits} if isinstance(splits, Dataset) else splits
    return make_task("text-classification", **fields).resolve(splits)


@pytest.mark.parametrize(
    ("folder", "columns", "labels"),
    [
        ("text_classification/sst2_glue_tsv", {"text": "sentence", "label": "label"}, ("0", "1")),
        ("text_classification/sst2", {"text": "text", "label": "label"}, ("negative", "positive")),
        ("nli/snli", {"text": "premise", "text_pair": "hypothesis", "label": "label"},
         ("contradiction", "entailment", "neutral")),
        ("nli/cb", {"text": "premise", "text_pair": "hypothesis", "label": "label"},
         ("contradiction", "entailment", "neutral")),
    ],
)  # fmt: skip
def test_published_folders_resolve(
    shared_data: Path, folder: str, columns: dict[str, str], labels: tuple[str, ...]
) -> None:
    task = resolve(read_splits(shared_data / folder))
    assert (dict(task.columns), task.labels, task.problem_type) == (columns, labels, SINGLE)
    assert task.primary_metric == ("accuracy", True)


def test_glue_folder_end_to_end(shared_data: Path, bert: Path) -> None:
    splits = read_splits(shared_data / "text_classification" / "sst2_glue_tsv")
    task = resolve(splits)
    tokenizer, model = task.load_tokenizer(bert), task.load_model(bert)
    assert [task.labelled(rows) for rows in splits.values()] == [True, True, False]
    dev, test = splits["validation"].select(range(20)), splits["test"].select(range(5))
    features = task.features(dev, tokenizer, train=True)
    assert set(features.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert features["labels"][:] == [int(label) for label in dev["label"][:]]
    batch = task.collator(tokenizer, model)(features.to_list()[:4])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert model(**batch).loss.isfinite()
    scores = task.evaluate(model, tokenizer, dev)
    assert set(scores) == {"loss", "accuracy", "macro_f1", "mcc"}
    found = task.predict(model, tokenizer, test)
    assert [row["text"] for row in found] == test["sentence"][:]
    assert all(
        set(row) == {"text", "label", "score"} and row["label"] in "01" and 0.5 <= row["score"] <= 1 for row in found
    )
    with pytest.raises(DataError, match=r"test.tsv has no labels to evaluate with \(column 'label'\)"):
        task.evaluate(model, tokenizer, test)


def test_results_do_not_depend_on_batches_and_match_a_plain_loop(shared_data: Path, bert: Path) -> None:
    rows = read_splits(shared_data / "nli" / "snli")["validation"].select(range(7))
    task = resolve(rows)
    tokenizer, model = task.load_tokenizer(bert), task.load_model(bert)
    model.train()
    losses, right = [], 0
    model.eval()
    for row in rows:
        encoded = tokenizer(row["premise"], row["hypothesis"], return_tensors="pt", truncation=True, max_length=128)
        with torch.no_grad():
            logits = model(**encoded).logits[0]
        target = task.labels.index(row["label"])
        losses.append(-logits.log_softmax(-1)[target].item())
        right += int(logits.argmax().item() == target)
    model.train()
    for batch_size in (1, 3, 32):
        scores = task.evaluate(model, tokenizer, rows, batch_size=batch_size)
        assert scores["loss"] == pytest.approx(np.mean(losses), abs=1e-5)  # padding changes the last bits of float32
        assert scores["accuracy"] == right / 7
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_decoder_classifies_whatever_the_padding(gpt2: Path) -> None:
    rows = Dataset.from_list([{"text": "a" * 30, "label": "x"}, {"text": "b", "label": "y"}])
    task = resolve(rows)
    tokenizer, model = task.load_tokenizer(gpt2), task.load_model(gpt2)
    together = task.predict(model, tokenizer, rows)
    alone = task.predict(model, tokenizer, rows.select([1]))
    assert together[1]["score"] == pytest.approx(alone[0]["score"], abs=1e-5)


# -- labels ------------------------------------------------------------------------------------------------------------


def labelled(values: list[Any], **columns: list[Any]) -> Dataset:
    texts = [f"text number {index}" for index in range(len(values))]
    return Dataset.from_dict({"text": texts, "label": values, **columns})


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["b", "a", "b"], ("a", "b")),
        (["10", "9", "2"], ("2", "9", "10")),
        ([10, 9, 2], ("2", "9", "10")),
        ([1.0, 2.0, 10.0], ("1", "2", "10")),
        ([True, False], ("False", "True")),
    ],
)
def test_labels_are_ordered_once_and_for_all(values: list[Any], labels: tuple[str, ...]) -> None:
    assert resolve(labelled(values)).labels == labels


def test_numbered_classes_of_the_hub_keep_their_names_and_order() -> None:
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
    rows = Dataset.from_dict({"sentence": ["a", "b"], "label": [1, 0]}, features=features)
    hidden = Dataset.from_dict({"sentence": ["a", "b"], "label": [-1, -1]}, features=features)
    task = resolve({"train": rows, "test": hidden})
    assert task.labels == ("positive", "negative")
    assert not task.labelled(hidden)


def test_given_labels_are_the_models_order(bert: Path) -> None:
    task = resolve(labelled(["a", "b"]), labels=("b", "a", "c"))
    assert task.features(labelled(["a", "b"]), task.load_tokenizer(bert), train=True)["labels"][:] == [1, 0]
    assert task.load_model(bert).config.num_labels == 3
    with pytest.raises(DataError, match="label 'd' is not one that the task has"):
        resolve(labelled(["a", "d"]), labels=("a", "b"))


def test_a_label_that_training_has_not(write: Write) -> None:
    train = write("train.jsonl", [{"text": "x", "label": "positive"}, {"text": "y", "label": "negative"}])
    dev = write("dev.jsonl", '{"text": "x", "label": "positive"}\n\n{"text": "z", "label": "postive"}\n')
    with pytest.raises(DataError) as caught:
        resolve(read_splits({"train": str(train), "validation": str(dev)}))
    assert str(caught.value) == (
        f"{dev} line 3: the validation label 'postive' is not one that the training rows have; "
        "did you mean 'positive' or 'negative'?; labels: negative, positive"
    )


# -- several labels, and numbers ---------------------------------------------------------------------------------------

LISTS = Dataset.from_dict({"text": ["one", "two", "three"], "labels": [["a", "b"], [], ["c"]]})
STRINGS = Dataset.from_dict({"text": ["one", "two", "three"], "labels": ["a, b", "", "c"]})
FLAGS = Dataset.from_dict(
    {"text": ["one", "two", "three"], "a": [1, 0, 0], "b": ["1", "0", "0"], "c": [False, False, True]}
)


@pytest.mark.parametrize(
    ("rows", "fields"),
    [(LISTS, {}), (STRINGS, {"separator": ","}), (FLAGS, {"columns": {"label": "a+b+c"}})],
    ids=["lists", "strings", "columns"],
)
def test_several_labels_in_any_form(bert: Path, rows: Dataset, fields: dict[str, Any]) -> None:
    task = resolve(rows, **fields)
    assert (task.labels, task.problem_type, task.primary_metric) == (("a", "b", "c"), MULTI, ("micro_f1", True))
    tokenizer, model = task.load_tokenizer(bert), task.load_model(bert)
    features = task.features(rows, tokenizer, train=True)
    assert features["labels"][:] == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    batch = task.collator(tokenizer, model)(features.to_list())
    assert batch["labels"].dtype == torch.float32
    with torch.no_grad():
        model.eval()
        expected = model(**batch).loss.item()
    scores = task.evaluate(model, tokenizer, rows)
    assert scores["loss"] == pytest.approx(expected, abs=1e-5)
    assert set(scores) == {"loss", "micro_f1", "macro_f1", "exact"}
    found = task.predict(model, tokenizer, rows)[0]
    assert set(found["scores"]) == {"a", "b", "c"}
    assert found["labels"] == [name for name, score in found["scores"].items() if score >= 0.5]


@pytest.mark.parametrize("values", [[0.5, 1.0, 4.75], ["0.5", "1", "4.75"]])
def test_numbers_are_regression(bert: Path, values: list[Any]) -> None:
    rows = labelled(values)
    task = resolve(rows)
    assert (task.labels, task.problem_type, task.primary_metric) == (None, REGRESSION, ("mse", False))
    tokenizer, model = task.load_tokenizer(bert), task.load_model(bert)
    batch = task.collator(tokenizer, model)(task.features(rows, tokenizer, train=True).to_list())
    model.eval()
    with torch.no_grad():
        expected = model(**batch).loss.item()
    scores = task.evaluate(model, tokenizer, rows)
    assert scores["mse"] == pytest.approx(expected, rel=1e-5)
    assert Task.from_dict(task.to_dict()).predict(model, tokenizer, rows)[0].keys() == {"text", "value"}
    with pytest.raises(DataError, match="row 1: the label 'high' is not a number"):
        resolve(labelled(["1.5", "high"]), problem_type=REGRESSION)


def test_whole_numbers_are_classes_unless_said_otherwise() -> None:
    assert resolve(labelled([1, 2, 3])).problem_type == SINGLE
    assert resolve(labelled([1, 2, 3]), problem_type=REGRESSION).problem_type == REGRESSION


def test_correlations_are_scipys() -> None:
    draw = np.random.default_rng(0)
    predicted, true = draw.integers(0, 5, 50).astype(float), draw.normal(size=50)
    scores = regression_scores(predicted, true)
    assert scores["pearson"] == pytest.approx(pearsonr(predicted, true).statistic)
    assert scores["spearman"] == pytest.approx(spearmanr(predicted, true).statistic)
    assert regression_scores(np.ones(3), np.arange(3.0))["pearson"] == 0.0


# -- columns and rows that cannot be used ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"id": "1", "Sentence": "a", "Label": "x"}, {"text": "Sentence", "label": "Label"}),
        ({"what_was_said": "a b c", "kind": "x"}, {"text": "what_was_said", "label": "kind"}),
        ({"question1": "a", "question2": "b", "is_duplicate": 1},
         {"text": "question1", "text_pair": "question2", "label": "is_duplicate"}),
        ({"review": "a", "stars": 3, "user": "z"}, {"text": "review", "label": "stars"}),
    ],
)  # fmt: skip
def test_columns_are_recognised(row: dict[str, Any], columns: dict[str, str]) -> None:
    other = {name: value if name.lower().startswith(("s", "q", "w", "r", "i")) and name != "stars" else
             (2 if isinstance(value, int) else "other") for name, value in row.items()}  # fmt: skip
    other |= {"is_duplicate": 0} if "is_duplicate" in row else {}
    assert dict(resolve(Dataset.from_list([row, other])).columns) == columns


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([{"text": "a", "label": "x"}, {"text": None, "label": "y"}], {}, "line 2: the text .* is null"),
        ([{"text": "a", "label": "x"}, {"text": "  ", "label": "y"}], {}, "line 2: the text .* is empty"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], {}, "line 2: the label .* is null"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], {}, "every row has the label 'x'"),
        ([{"text": "a", "label": None}], {}, "label column 'label' is empty in every row"),
        ([{"text": ["a"], "label": "x"}], {}, "which column is the text"),
        ([{"text": "a", "p": "x", "q": "z"}], {}, "which column is the label.*--columns label=…"),
        ([{"text": "a", "label": "x"}], {"columns": {"text": "txt"}}, "no column 'txt' .*did you mean 'text'"),
        ([{"text": "a", "x": 1, "y": 2}], {"columns": {"label": "x+y"}}, "label column 'y' holds 2; 0 or 1 is needed"),
        ([{"text": "a", "label": ["x"]}], {"problem_type": SINGLE}, "the label is a list; set task.problem_type"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(
    write: Write, rows: list[dict[str, Any]], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        resolve(read_splits(write("train.jsonl", rows)), **fields)


def test_validation_must_have_labels_but_test_need_not(write: Write) -> None:
    train, bare = labelled(["a", "b"]), Dataset.from_dict({"text": ["t"]})
    assert resolve({"train": train, "test": bare}).labels == ("a", "b")
    with pytest.raises(DataError, match="the validation rows have no labels"):
        resolve({"train": train, "validation": bare})
    with pytest.raises(DataError, match="labels come from the training rows"):
        resolve({"validation": train})


def test_new_data_with_other_columns_is_one_clear_error(bert: Path) -> None:
    task = resolve(labelled(["a", "b"]))
    with pytest.raises(DataError, match=r"no column 'text' .*columns: sentence"):
        task.predict(task.load_model(bert), task.load_tokenizer(bert), Dataset.from_dict({"sentence": ["a"]}))
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        task.predict(task.load_model(bert), task.load_tokenizer(bert), labelled(["a"]), batch_size=0)
