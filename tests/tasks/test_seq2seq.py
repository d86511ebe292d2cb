"""Sequence to sequence: sources, several targets, generation and its metrics."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from inlay.errors import DataError, MissingExtraError
from inlay.tasks import text_metrics
from inlay.tasks.data import read_splits
from inlay.tasks.task import Task, make_task
from inlay.tasks.text_metrics import text_scores


def test_published_rows_end_to_end(shared_data: Path, t5: Path) -> None:
    splits = read_splits(shared_data / "generation" / "e2e")
    task = make_task("seq2seq", max_length=200, max_target_length=8).resolve(splits)
    assert dict(task.columns) == {"source": "source", "target": "target"}
    assert task.prompt_template == "{source}"
    tokenizer, model = task.load_tokenizer(t5), task.load_model(t5)
    rows = splits["test"].select(range(3))
    several = [len(found) for found in rows["targets"][:]]
    train, given = task.features(rows, tokenizer, train=True), task.features(rows, tokenizer, train=False)
    assert (len(train), len(given)) == (sum(several), 3)
    assert tokenizer.decode(given[0]["input_ids"]) == rows[0]["source"] + "</s>"
    assert tokenizer.decode(given[0]["labels"]) == rows[0]["targets"][0][:7] + "</s>"
    batch = task.collator(tokenizer, model)(given.to_list())
    model.eval()
    with torch.no_grad():
        expected = model(**batch).loss.item()
    scores = task.evaluate(model, tokenizer, rows)
    assert scores["loss"] == pytest.approx(expected, rel=1e-5)
    assert set(scores) == {"loss", "exact_match", "rouge1", "rouge2", "rougeL", "bleu"}
    assert task.primary_metric == ("rougeL", True)
    found = task.predict(model, tokenizer, rows.remove_columns("targets"))
    assert [row["source"] for row in found] == rows["source"][:]
    assert found == task.predict(model, tokenizer, rows, batch_size=1)


def test_a_prefix_and_instructions(t5: Path) -> None:
    rows = Dataset.from_list([{"instruction": "Add.", "input": "1 2", "output": "3"}])
    task = make_task("seq2seq").resolve({"train": rows})
    tokenizer = task.load_tokenizer(t5)
    assert tokenizer.decode(task.features(rows, tokenizer, train=True)[0]["input_ids"]) == "Add.\n1 2</s>"
    rows = Dataset.from_list([{"article": "Long.", "summary": "L."}])
    task = make_task("seq2seq", prompt_template="summarize: {source}").resolve({"train": rows})
    assert tokenizer.decode(task.features(rows, tokenizer, train=True)[0]["input_ids"]) == "summarize: Long.</s>"
    assert Task.from_dict(task.to_dict()) == task


def test_unlabelled_rows_can_be_predicted_only(t5: Path) -> None:
    rows, bare = Dataset.from_list([{"source": "a", "target": "b"}]), Dataset.from_list([{"source": "a"}])
    task = make_task("seq2seq").resolve({"train": rows, "test": bare})
    assert (task.labelled(rows), task.labelled(bare)) == (True, False)
    with pytest.raises(DataError, match=r"has no targets \(column 'target'\)"):
        task.evaluate(task.load_model(t5), task.load_tokenizer(t5), bare)
    with pytest.raises(DataError, match="which column is the target"):
        make_task("seq2seq").resolve({"train": bare})
    with pytest.raises(DataError, match="has no targets"):
        make_task("seq2seq").resolve({"train": rows, "validation": bare})


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_scores_of_perfect_and_hopeless_texts() -> None:
    references = [["the cat sat on the mat", "a cat sat"], ["dogs bark loudly at night"]]
    perfect = text_scores(text_metrics.METRICS, [" a cat sat", "dogs bark loudly at night"], references)
    assert perfect["exact_match"] == perfect["rougeL"] == 1.0
    assert text_scores(["bleu"], ["the cat sat on the mat", "dogs bark loudly at night"], references)[
        "bleu"
    ] == pytest.approx(100)
    hopeless = text_scores(text_metrics.METRICS, ["x", "y"], references)
    assert hopeless["exact_match"] == hopeless["rouge1"] == hopeless["bleu"] == 0.0


def test_a_missing_second_reference_is_not_an_empty_one() -> None:
    one = text_scores(
        ["bleu"], ["a cat sat on it", "dogs bark at night now"], [["a cat sat on it"], ["dogs bark at night"]]
    )
    two = text_scores(["bleu"], ["a cat sat on it", "dogs bark at night now"], [["a cat sat on it", "a cat sat on it"],
                                                                                  ["dogs bark at night"]])  # fmt: skip
    assert one == two


def test_rouge_l_by_hand() -> None:
    # the longest common subsequence "the cat mat" has 3 of 4 and 3 of 6 words: F = 2·(3/4)·(3/6) / (3/4 + 3/6) = 0.6
    scores = text_scores(["rouge"], ["the cat a mat"], [["the cat sat on the mat"]])
    assert scores["rougeL"] == pytest.approx(0.6)


def test_without_the_extra_exact_match_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    real = text_metrics.importlib.util.find_spec
    monkeypatch.setattr(
        text_metrics.importlib.util,
        "find_spec",
        lambda name: None if name in ("rouge_score", "sacrebleu") else real(name),
    )
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    rows = Dataset.from_list([{"source": "a", "target": "b"}])
    task = make_task("seq2seq").resolve({"train": rows})
    assert (task.metrics, task.primary_metric) == (("exact_match",), ("exact_match", True))
    assert "pip install 'inlay[text-metrics]'" in task.describe()
    with pytest.raises(
        MissingExtraError, match=r"the metric bleu needs sacrebleu.*pip install 'inlay\[text-metrics\]'"
    ):
        make_task("seq2seq", metrics=["bleu"])
