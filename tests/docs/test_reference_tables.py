"""The other tables of the docs against the code: roles, tasks, columns, formats and metrics, and the keys of a run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from docs.places import DOCS, tables

from inlay.engine.registry import make_method, method_class
from inlay.engine.roles import ALIASES, ROLES
from inlay.tasks import columns
from inlay.tasks.readers import LINE_READERS
from inlay.tasks.task import Task, kinds, make_task, task_class
from inlay.train import settings
from inlay.train.arguments import LEARNING_RATE, resolved
from inlay.train.record import LEFT_BY_A_RUN, Record
from inlay.train.run import RESERVED, Run


def table_of(page: str, heading: str) -> list[list[str]]:
    """The rows of the one table of a page whose first heading is this."""
    (found,) = (table[1:] for table in tables(DOCS / page) if table[0][0] == heading)
    return found


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# -- engine.md ---------------------------------------------------------------------------------------------------------


def test_roles() -> None:
    assert {codes(role)[0]: what for role, what in table_of("engine.md", "Role")} == ROLES
    text = (DOCS / "engine.md").read_text(encoding="utf-8")
    assert all(f"`{alias}`" in text for alias in ALIASES)


# -- tasks.md ----------------------------------------------------------------------------------------------------------

COMMON = [field.name for field in dataclasses.fields(Task)]


def sections() -> dict[str, list[list[list[str]]]]:
    """The tables under each second-level heading of tasks.md."""
    parts = re.split(r"^## ", (DOCS / "tasks.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = {}
    for part in parts:
        rows = [line for line in part.splitlines() if line.startswith("| `")]
        found[part.splitlines()[0]] = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    return found


def test_every_task_has_a_section_with_its_fields() -> None:
    found = sections()
    assert {codes(row[0])[0] for row in table_of("tasks.md", "Kind")} == set(kinds())
    assert set(kinds()) <= set(found)
    for kind in kinds():
        own = {field.name: field for field in dataclasses.fields(task_class(kind)) if field.name not in COMMON}
        assert [codes(row[0])[0] for row in found[kind]] == list(own)
        for name, default, what in found[kind]:
            assert eval(default.strip("`")) == own[codes(name)[0]].default
            assert what
    assert [codes(row[0])[0] for row in found["What all tasks share"]] == COMMON
    shared = next(row[2] for row in found["What all tasks share"] if "max_length" in row[0])
    limits = {kind: task_class(kind).__dataclass_fields__["max_length"].default for kind in kinds()}
    assert {kind for kind, limit in limits.items() if limit != 128} == {"causal-lm", "seq2seq"}
    assert f"{limits['causal-lm']} for `causal-lm`, {limits['seq2seq']} for `seq2seq`" in shared


def test_the_names_that_columns_are_recognised_by() -> None:
    rows = {role: re.split(r", |; else .*", cell) for role, cell in table_of("tasks.md", "Role")}
    names = {role: tuple(name for name in found if name) for role, found in rows.items()}
    pairs = names.pop("`text`, `text_pair`")
    assert tuple(tuple(pair.split(" + ")) for pair in pairs) == columns.PAIRS
    known = ("TEXT", "LABEL", "TOKENS", "TAGS", "SOURCE", "TARGET", "MESSAGES", "IMAGE", "AUDIO", "FEATURES")
    assert {role.strip("`"): found for role, found in names.items()} == {
        name.lower(): getattr(columns, name) for name in known
    }


def test_formats() -> None:
    listed = {suffix for row in table_of("tasks.md", "Format") for suffix in codes(row[0])}
    assert listed == {*LINE_READERS, ".parquet"}


TEXTS = ["the film was good", "a story so bad", "it is great", "plot was awful"]
CASES: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("text-classification", 0, {"text": TEXTS, "label": ["yes", "no", "yes", "no"]}, {}),
    ("text-classification", 1, {"text": TEXTS, "label": [["a"], ["b"], ["a", "b"], []]}, {}),
    ("text-classification", 2, {"text": TEXTS, "label": [0.5, 1.5, 2.0, 0.0]}, {}),
    (
        "token-classification",
        3,
        {"tokens": [text.split() for text in TEXTS], "tags": [["B-x"] + ["O"] * text.count(" ") for text in TEXTS]},
        {},
    ),
    (
        "token-classification",
        4,
        {"tokens": [text.split() for text in TEXTS], "tags": [["DET"] + ["N"] * text.count(" ") for text in TEXTS]},
        {},
    ),
    ("masked-lm", 5, {"text": TEXTS}, {}),
    ("causal-lm", 6, {"text": TEXTS}, {}),
    ("seq2seq", 7, {"source": TEXTS, "target": TEXTS}, {"max_target_length": 4}),
    (
        "image-to-text",
        10,
        {"features": [[[0.5, 1.0]]] * 4, "source": TEXTS, "target": TEXTS},
        {"max_target_length": 4},
    ),
]


@pytest.mark.parametrize(("kind", "number", "cells", "fields"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_metrics(
    kind: str,
    number: int,
    cells: dict[str, Any],
    fields: dict[str, Any],
    tiny_model: Path,
    tiny_decoder: Path,
    tiny_translator: Path,
) -> None:
    row = table_of("tasks.md", "Kind")[number]
    assert codes(row[0]) == [kind]
    known = {"causal-lm": tiny_decoder, "seq2seq": tiny_translator, "image-to-text": tiny_translator}
    folder = known.get(kind, tiny_model)
    rows = Dataset.from_dict(cells)
    task = make_task(kind, max_length=16, **fields).resolve({"train": rows, "validation": rows})
    found = task.evaluate(task.load_model(folder), task.load_tokenizer(folder), rows)
    name, greater = task.primary_metric
    if kind in ("seq2seq", "image-to-text"):  # ROUGE and BLEU are there where their libraries are
        assert set(found) <= set(codes(row[2]))
        assert {"loss", "exact_match"} <= set(found)
        assert name in (*codes(row[3]), "exact_match")
    else:
        assert sorted(found) == sorted(codes(row[2]))
        assert [name] == codes(row[3])
    assert greater == (name not in ("mse", "loss"))


# -- training.md -------------------------------------------------------------------------------------------------------


def test_keys_of_a_run() -> None:
    assert [codes(row[0])[0] for row in table_of("training.md", "Key")] == [
        field.name for field in dataclasses.fields(Run)
    ]


def test_other_names_of_keys() -> None:
    line = next(
        part for part in (DOCS / "training.md").read_text(encoding="utf-8").split("\n\n") if "other libraries" in part
    )
    known = {**settings.ALIASES, **settings.DATA_ALIASES, **settings.METHOD_ALIASES, **settings.TRAIN_ALIASES}
    assert set(codes(line)) <= set(known)


def test_defaults_of_training_arguments() -> None:
    run = resolved(Run(model="m"), [make_method("ia3")], rows=64, evaluates=True)
    assert {codes(row[0])[0] for row in table_of("training.md", "Argument")} == set(run.train)
    stated = {codes(row[0])[0]: row[1] for row in table_of("training.md", "Argument")}
    rates = [float(number) for number in re.findall(r"\de-\d", stated["learning_rate"])]
    assert rates == [run.train["learning_rate"], LEARNING_RATE]
    assert run.train["num_train_epochs"] == 20
    assert resolved(Run(model="m"), [make_method("lora")], 16_000, True).train["num_train_epochs"] == 3
    assert run.train["per_device_eval_batch_size"] == 4 * run.train["per_device_train_batch_size"]
    for name in ("per_device_train_batch_size", "lr_scheduler_type", "warmup_steps", "logging_steps"):
        assert str(run.train[name]) in stated[name]
    for name in ("save_strategy", "eval_strategy", "report_to"):
        assert codes(stated[name])[0] == run.train[name]
    named = resolved(Run(model="m", train={"save_steps": 5, "eval_steps": 5}), [make_method("lora")], 64, True).train
    assert (named["save_strategy"], named["eval_strategy"]) == ("steps", "steps")
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    line = next(part for part in text.split("\n\n") if "are the run's own" in part)
    assert set(codes(line.partition(" are the")[0])) == set(RESERVED)


def test_what_a_run_leaves_and_records() -> None:
    assert {codes(row[0])[0] for row in table_of("training.md", "In `out`")} == set(LEFT_BY_A_RUN)
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    line = next(part for part in text.split("\n\n") if part.startswith("`record.json` holds"))
    assert codes(line)[1:] == [field.name for field in dataclasses.fields(Record)]


def test_learning_rates_on_the_pages() -> None:
    for kind in (path.stem for path in (DOCS / "methods").glob("*.md")):
        text = re.sub(r"\s+", " ", (DOCS / "methods" / f"{kind}.md").read_text(encoding="utf-8"))
        stated = re.findall(r"names no learning rate, [^.]*? (\d+e-\d)", text)
        rate = getattr(method_class(kind), "learning_rate", None)
        assert [float(number) for number in stated] == ([rate] if rate is not None else []), kind
