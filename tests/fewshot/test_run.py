"""A few-shot run's description: YAML, flags and Python make the same one; what cannot be meant is one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest

from inlay.errors import ConfigError
from inlay.fewshot.run import SEEDS, FewShotRun, is_few_shot

FULL = {
    "train": "train.jsonl",
    "method": {"kind": "pet", "repetitions": 2},
    "templates": ["{text} It was {mask}.", "{mask}: {text}"],
    "verbalizer": {"neg": "terrible", "pos": ["great", "fine"]},
    "test": "test.jsonl",
    "shots": 16,
    "seeds": [1, 2],
    "peft": [{"kind": "ia3"}],
    "recipe": {"steps": 10},
}


def test_yaml_and_settings_make_the_same_run(tmp_path: Path) -> None:
    run = FewShotRun.from_settings(FULL)
    (tmp_path / "fewshot.yaml").write_text(run.to_yaml(), encoding="utf-8")
    assert FewShotRun.from_yaml(tmp_path / "fewshot.yaml") == run
    assert FewShotRun.from_settings(run.to_dict()) == run
    assert is_few_shot(tmp_path)


def test_flags_and_sets_go_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: a.jsonl\nmethod: pet\nshots: 8\nunlabeled: u.jsonl\n", encoding="utf-8")
    run = FewShotRun.from_yaml(
        tmp_path / "a.yaml", {"shots": 4, "test": None}, ["recipe.steps=3", "method.auxiliary=0"]
    )
    assert (run.shots, run.unlabelled, run.recipe) == (4, "u.jsonl", {"steps": 3})
    assert run.method == {"kind": "pet", "auxiliary": 0}


def test_a_number_of_seeds_is_so_many_of_them() -> None:
    assert FewShotRun(train="a", seeds=5).seeds == SEEDS  # type: ignore[arg-type]
    assert FewShotRun(train="a", seeds=7).seeds[:5] == SEEDS  # type: ignore[arg-type]
    assert len(set(FewShotRun(train="a", seeds=7).seeds)) == 7  # type: ignore[arg-type]


def test_plain_names_will_do() -> None:
    run = FewShotRun(train="a", method="pet", peft="lora", templates="{text} {mask}")  # type: ignore[arg-type]
    assert run.method == {"kind": "pet"}
    assert run.peft == [{"kind": "lora"}]
    assert run.templates == ("{text} {mask}",)
    assert run.out == "runs/fewshot-pet"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train": "a", "shot": 3}, "did you mean 'shots'"),
        ({"method": "pet"}, "names no labelled rows"),
        ({"train": "a", "shots": -1}, "shots=-1"),
        ({"train": "a", "find_words": 2, "verbalizer": {"a": "b"}}, "leave one out"),
        ({"train": "a", "shots": True}, "shots must be a whole number or null, got True"),
        ({"train": "a", "per": "row"}, "per='row'"),
        ({"train": "a", "templates": 3}, "the run: templates must be a list, got 3"),
        ({"train": "a", "verbalizer": "good"}, "the run: verbalizer must be a mapping, got 'good'"),
        ({"train": "a", "baseline": "no"}, "the run: baseline must be true or false, got 'no'"),
        ({"train": "a", "peft": 3}, "peft must be a name, or a mapping with `kind:`; got 3"),
        ({"train": "a", "peft": [{"r": 8}]}, "peft must be a name, or a mapping with `kind:`; got {'r': 8}"),
        ({"train": "a", "method": 3}, "method must be a name, or a mapping with `kind:`; got 3"),
        ({"train": 3}, "the run: train must be text, got 3"),
        ({"train": "a", "seeds": [1, 1]}, "same seed twice"),
        ({"train": "a", "seeds": "many"}, "seeds='many'"),
        ({"train": "a", "seeds": 0}, "seeds=0"),
        ({"train": "a", "dtype": "float8"}, "dtype must be one of"),
        ({"train": "a", "method": {"repetitions": 2}}, "method must be a name"),
    ],
)
def test_what_cannot_be_meant_is_one_error(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        FewShotRun.from_settings(settings)
