"""Runs: one description from YAML, flags and Python, and errors that name the key, the section and the nearest key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inlay.errors import ConfigError
from inlay.train import Data, Run
from inlay.train import settings as read

SETTINGS: dict[str, Any] = {
    "model": "some/model",
    "task": "text-classification",
    "data": {"train": "a.jsonl", "validation": "b.jsonl"},
    "method": {"kind": "lora", "r": 8},
    "train": {"learning_rate": 1e-3},
    "out": "runs/x",
}


def test_yaml_flags_and_python_make_the_same_run(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: some/model\ndata:\n  train: a.jsonl\n  validation: b.jsonl\nmethod: {kind: lora, r: 8}\n"
        "train:\n  learning_rate: 1e-3\nout: runs/x\n"
    )
    flags = {
        "model": "some/model",
        "task": "text-classification",
        "data": {"train": "a.jsonl", "validation": "b.jsonl"},
        "method": "lora",
        "out": "runs/x",
    }
    python = Run(
        model="some/model",
        data=Data(train="a.jsonl", validation="b.jsonl"),
        method=[{"kind": "lora", "r": 8}],
        train={"learning_rate": 1e-3},
        out="runs/x",
    )
    assert Run.from_yaml(file) == python
    assert Run.from_yaml(None, flags, ["method.r=8", "train.learning_rate=1e-3"]) == python
    assert Run.from_settings(SETTINGS) == python


def test_a_method_object_is_as_good_as_its_name() -> None:
    from inlay import LoRA

    run = Run(model="m", method=LoRA(r=4, targets="query"))  # type: ignore[arg-type]
    assert run.method == [{"kind": "lora", "r": 4, "targets": "query"}]
    assert run.methods() == [LoRA(r=4, targets="query")]


def test_what_is_written_reads_back_the_same(tmp_path: Path) -> None:
    run = Run.from_settings(SETTINGS | {"columns": {"text": "s"}, "modules_to_save": [], "max_length": 64, "seed": 3})
    (tmp_path / "run.yaml").write_text(run.to_yaml())
    assert Run.from_yaml(tmp_path / "run.yaml") == run


def test_flags_override_the_file_and_sets_override_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: a\nmethod: lora\nseed: 1\ndata: {train: a.jsonl, test: t.jsonl}\n")
    run = Run.from_yaml(
        file, {"model": "b", "seed": 2, "data": {"train": "c.jsonl"}}, ["seed=3", "train.warmup_ratio=0.1"]
    )
    assert (run.model, run.seed) == ("b", 3)
    assert run.data == Data(train="c.jsonl", test="t.jsonl")
    assert run.train == {"warmup_steps": 0.1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("2E5", 2e5),
        ("16", 16),
        ("0.5", 0.5),
        ("true", True),
        ("query,value", "query,value"),
        ("[1, 2]", [1, 2]),
        ("null", None),
        ("1e", "1e"),
        ("e-3", "e-3"),
        ("re:.*[0-3]", "re:.*[0-3]"),
    ],
)
def test_values_are_read_as_people_mean_them(text: str, value: Any) -> None:
    assert read.yaml_value(text) == value
    assert type(read.yaml_value(text)) is type(value)


def test_other_libraries_names_are_understood() -> None:
    run = Run.from_settings(
        {
            "model_name_or_path": "m",
            "train_file": "a.jsonl",
            "num_train_epochs": 2,
            "output_dir": "o",
            "method": {"peft_type": "LORA", "lora_alpha": 32, "target_modules": ["query"], "lora_dropout": 0.1},
        }
    )
    assert (run.model, run.out, run.data.train, run.train) == ("m", "o", "a.jsonl", {"num_train_epochs": 2})
    assert run.method == [{"kind": "lora", "alpha": 32, "targets": ["query"], "dropout": 0.1}]


def test_several_methods_and_how_to_reach_each() -> None:
    settings = {"model": "m", "method": ["lora", "lora"]}
    run = Run.from_yaml(None, settings, ["method.1.r=4", "method.lora.alpha=2"])
    assert run.method == [{"kind": "lora", "alpha": 2}, {"kind": "lora", "r": 4}]
    assert Run.from_yaml(None, {"model": "m"}).out == "runs/text-classification-lora"


def test_every_training_argument_of_transformers_is_known() -> None:
    import dataclasses

    from transformers import TrainingArguments

    assert set(read.training_arguments()) == {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"metod": "lora"}, "has no setting 'metod'; did you mean 'method'"),
        ({"train": {"learning_rat": 1}}, "train has no setting 'learning_rat'; did you mean 'learning_rate'"),
        ({"train": {"model": "x"}}, "it belongs at the top level"),
        ({"train": {"output_dir": "x"}}, "use out"),
        ({"train": {"learning_rate": "fast"}}, "train.learning_rate must be a number, got 'fast'"),
        ({"train": {"num_train_epochs": True}}, "train.num_train_epochs must be a number, got True"),
        ({"train": {"max_steps": 1.5}}, "train.max_steps must be a whole number, got 1.5"),
        ({"data": {"trian": "a"}}, "data has no setting 'trian'; did you mean 'train'"),
        ({"method": "lorra"}, "there is no method 'lorra'; did you mean 'lora'"),
        ({"method": {"r": 4}}, "method must be a name, or a mapping with `kind:`"),
        ({"method": []}, "method is an empty list"),
        ({"method": {"kind": "lora", "r": 4, "lora_r": 8}}, "has both 'lora_r' and 'r'"),
        ({"lora_r": 4}, "belongs in the `method:` section (r)"),
        ({"learning_rate": 0.5}, "sets 'learning_rate' twice"),
        ({"seed": "x"}, "seed must be a whole number"),
        ({"max_length": 0}, "max_length is a number of tokens, at least 1"),
        ({"dtype": "fp8"}, "dtype must be one of"),
        ({"columns": ["a"]}, "columns must be a mapping"),
        ({"columns": {"text": 3}}, "columns.text must be a name"),
        ({"model": ""}, "names no model"),
        ({"modules_to_save": "classifier"}, "modules_to_save must be a list"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Run.from_settings({**SETTINGS, **change})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("method.r", "--set takes name=value"),
        ("method..r=1", "--set takes name=value"),
        ("model.x=1", "nothing inside it to set"),
        ("train.lr=1", "train has no setting 'lr'"),
    ],
)
def test_bad_overrides_are_named(assignment: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Run.from_yaml(None, {"model": "m"}, [assignment])
    assert says in str(caught.value)


def test_an_override_among_several_methods_must_say_which() -> None:
    settings = {"model": "m", "method": ["lora", "lora"]}
    with pytest.raises(ConfigError, match=r"say which, such as method\.0\.r"):
        Run.from_yaml(None, settings, ["method.r=1"])
    with pytest.raises(ConfigError, match=r"no entry 'lorra' among 0 \(lora\), 1 \(lora\); did you mean 'lora'"):
        Run.from_yaml(None, settings, ["method.lorra.r=1"])


def test_a_field_that_a_method_has_not_is_named() -> None:
    with pytest.raises(ConfigError, match=r"method lora has no field 'rr'; did you mean 'r'"):
        Run(model="m", method=[{"kind": "lora", "rr": 3}]).methods()


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: m\n")
    with pytest.raises(ConfigError, match=r"there is no file .*rum\.yaml'; did you mean 'run\.yaml'"):
        Run.from_yaml(tmp_path / "rum.yaml")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "model: [unclosed", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        Run.from_yaml(tmp_path / "run.yaml")


def test_a_callable_target_has_no_written_form() -> None:
    from inlay import LoRA

    run = Run(model="m", method=LoRA(targets=lambda site: True))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give targets as names"):
        run.to_yaml()
