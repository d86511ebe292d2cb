"""Runs of methods that learn several tasks: every row goes through as what it is, in training and afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from docs.conftest import tiny_decoder
from train.interrupted import curve, train_until

import inlay
from inlay.errors import ConfigError, DataError
from inlay.tasks.data import read_rows
from inlay.tasks.task import make_task
from inlay.tasks.task_ids import SOURCE, all_of, ids_of, task_names
from inlay.train import Run, evaluate, predict, train
from inlay.train.prepare import splits_of
from inlay.train.several import hidden, task_column, told
from inlay.train.use import open_run

__all__ = ["tiny_decoder"]
BRIEF = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def mixture(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two sources for each split, and the same rows in files with a column that says which."""
    folder = tmp_path_factory.mktemp("mixture")
    data: dict[str, Any] = {"named": {}, "column": {}}
    for split in ("train", "validation", "test"):
        lines = [json.loads(line) for line in (rows / f"{split}.jsonl").read_text().splitlines()]
        halves = {"yor": lines[: len(lines) // 2], "hau": lines[len(lines) // 2 :]}
        data["named"][split] = {}
        for name, part in halves.items():
            file = folder / f"{name}-{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in part))
            data["named"][split][name] = str(file)
        # Interleaved, so that rows of one task are not neighbours.
        both = [
            {**row, "lang": name}
            for pair in zip(*halves.values(), strict=True)
            for name, row in zip(halves, pair, strict=True)
        ]
        data["column"][split] = str(folder / f"{split}.jsonl")
        Path(data["column"][split]).write_text("".join(json.dumps(row) + "\n" for row in both))
    return data


def by_hand(folder: str, ids: list[int], rows: Dataset) -> torch.Tensor:
    """Logits row by row, each with its task."""
    opened = open_run(folder)
    found = []
    for number, text in zip(ids, rows["text"], strict=True):
        batch = opened.tokenizer(text, return_tensors="pt", truncation=True, max_length=16)
        with torch.no_grad():
            found.append(opened.model(**batch, task_ids=torch.tensor([number])).logits[0])
    return torch.stack(found)


METHODS = [{"kind": "poly", "r": 2, "n_skills": 2}, {"kind": "multitask_prompt_tuning", "num_virtual_tokens": 2}]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method["kind"]))
def test_a_column_says_the_task(method: dict[str, Any], make_run: Callable[..., Run], mixture: dict[str, Any]) -> None:
    run = make_run(train={**BRIEF, "learning_rate": 0.3}, method=method, data=mixture["column"], task_id_column="lang")
    record = train(run, progress=False)
    stored = Run.from_yaml(Path(run.out) / "run.yaml")
    assert stored.method[0][{"poly": "n_tasks"}.get(method["kind"], "num_tasks")] == 2
    assert stored.task_id_column == "lang"
    assert record.task["task_names"] == ["hau", "yor"]
    test = read_rows(mixture["column"]["test"])
    logits = by_hand(run.out, [1, 0] * 6, test)
    # Batches are padded, so sums have another order.
    expected = logits.softmax(-1)
    found = predict(run.out, mixture["column"]["test"])
    torch.testing.assert_close(torch.tensor([row["score"] for row in found]), expected.amax(-1), rtol=1e-4, atol=1e-5)
    assert [row["label"] for row in found] == [record.task["labels"][best] for best in expected.argmax(-1).tolist()]
    others = by_hand(run.out, [0, 1] * 6, test).softmax(-1)
    assert not torch.allclose(others, expected, atol=1e-4), "the tasks have come to differ"
    loss = torch.nn.functional.cross_entropy(
        logits, torch.tensor([record.task["labels"].index(label) for label in test["label"]])
    )
    assert record.metrics["test"]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert evaluate(run.out) == record.metrics["test"]


def test_the_source_of_a_mixture_is_the_task(make_run: Callable[..., Run], mixture: dict[str, Any]) -> None:
    run = make_run(train=BRIEF, method=METHODS[0], data=mixture["named"])
    record = train(run, progress=False)
    assert record.task["task_names"] == ["yor", "hau"], "in the order of the mixture"
    assert evaluate(run.out) == record.metrics["test"]
    # The same rows as a file, with the task in a column, or one source with its task said for all rows.
    column = evaluate(run.out, mixture["column"]["test"], task_id_column="lang")
    assert column == pytest.approx(record.metrics["test"])
    file = mixture["named"]["test"]["hau"]
    said = predict(run.out, file, task_id="hau")
    rows = read_rows(mixture["column"]["test"])
    both = predict(run.out, rows, task_id_column="lang")
    assert [row["text"] for row in both[1::2]] == [row["text"] for row in said]
    assert [row["label"] for row in both[1::2]] == [row["label"] for row in said]
    assert predict(run.out, file, task_id="yor") != said
    with pytest.raises(DataError, match=r"hau-test\.jsonl: the rows do not say which task .*--task-id NAME"):
        predict(run.out, file)
    with pytest.raises(
        DataError, match=r"there is no task 'ha'; did you mean 'hau'\?; the run was trained on: yor, hau"
    ):
        predict(run.out, file, task_id="ha")


def test_a_resumed_run_is_the_same_run(
    make_run: Callable[..., Run], mixture: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**BRIEF, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
    whole, halves = (make_run(out, train=settings, method=METHODS[0], data=mixture["named"]) for out in ("one", "two"))
    train(whole, progress=False)
    train_until(halves, 4, monkeypatch)
    train(halves, resume=True, progress=False)
    assert curve(whole) == curve(halves)


def test_a_number_of_tasks_that_is_left_open_is_that_of_the_rows(
    make_run: Callable[..., Run], mixture: dict[str, Any]
) -> None:
    method = {"kind": "poly", "n_tasks": None}
    run = make_run(train=BRIEF, method=method, data=mixture["column"], task_id_column="lang")
    splits = splits_of(run)
    task = make_task("text-classification").resolve(hidden(splits, "lang"))
    found, _ = told(run, task, splits, task_column(run))
    assert found.method[0]["n_tasks"] == 2


def test_generation_and_texts_in_pieces(
    tiny_decoder: Path, mixture: dict[str, Any], make_run: Callable[..., Run]
) -> None:
    fields = {"model": str(tiny_decoder), "data": mixture["column"], "method": METHODS[1], "task_id_column": "lang"}
    texts = make_run(train=BRIEF, task="causal-lm", columns={"text": "text"}, **{**fields, "max_length": 4})
    found = train(texts, progress=False).metrics["test"]
    assert evaluate(texts.out) == found
    task = {"kind": "causal-lm", "prompt_template": "{source}", "max_new_tokens": 3, "metrics": ["exact_match"]}
    pairs = make_run("pairs", train=BRIEF, task=task, columns={"source": "text", "target": "label"}, **fields)
    record = train(pairs, progress=False)
    assert evaluate(pairs.out) == record.metrics["test"]
    rows = read_rows(mixture["column"]["test"])
    generated = [row["generation"] for row in predict(pairs.out, mixture["column"]["test"])]
    opened = open_run(pairs.out)
    for number, name in enumerate(record.task["task_names"]):
        mine = [row for row, one in enumerate(rows["lang"]) if one == name]
        with inlay.for_tasks(opened.model, number):
            alone = opened.task.__class__.from_dict({**opened.task.to_dict(), "task_id_column": None, "task_names": ()})
            found = alone.predict(opened.model, opened.tokenizer, rows.select(mine))
        assert [row["generation"] for row in found] == [generated[row] for row in mine]


def test_what_cannot_be(make_run: Callable[..., Run], mixture: dict[str, Any], rows: Path) -> None:
    three = {"kind": "poly", "n_tasks": 3}
    one = {"kind": "poly", "n_tasks": 1}
    plain = {**mixture["named"], "validation": str(rows / "validation.jsonl")}
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"method": three}, ConfigError, "poly learns 3 tasks, and nothing says which a row is of: --task-id-column"),
        ({"task_id_column": "lang", "data": mixture["column"]}, ConfigError, "lora learns no several tasks"),
        ({"method": "poly", "data": mixture["column"], "task_id_column": "lan"}, DataError, "no column 'lan'; did you"),
        ({"method": "poly", "data": plain}, DataError, "name their sources as the training rows' are"),
        ({"method": one, "data": mixture["column"], "task_id_column": "lang"}, ConfigError, "set method.n_tasks=2"),
    ]
    for fields, error, message in cases:
        with pytest.raises(error, match=message):
            train(make_run(train=BRIEF, **fields), progress=False)
    run = make_run("one", train=BRIEF, method=one, data=mixture["named"])
    train(run, progress=False)  # one task, whatever the sources
    with pytest.raises(ConfigError, match="the run's method learns one task"):
        evaluate(run.out, task_id="hau")


def test_names_and_numbers() -> None:
    rows = Dataset.from_dict({"text": list("abcd"), "task": [10, 2, 10, 2], SOURCE: ["z", "a", "z", "a"]})
    assert task_names(rows, "task") == ("2", "10")
    assert task_names(rows, SOURCE) == ("z", "a")
    task = inlay_task(rows)
    assert ids_of(task, rows) == [1, 0, 1, 0]
    assert all_of(rows, "x")[SOURCE][:] == ["x"] * 4
    with pytest.raises(DataError, match="names no task"):
        task_names(Dataset.from_dict({"task": ["a", None]}), "task")


def inlay_task(rows: Dataset) -> Any:
    from inlay.tasks.masked_lm import MaskedLM

    return MaskedLM(task_id_column="task", task_names=task_names(rows, "task"))
