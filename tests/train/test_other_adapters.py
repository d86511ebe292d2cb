"""Runs over the adapters of other runs: fusions, scales, mixtures and compositions, from settings to a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train.interrupted import curve, train_until

import inlay
from inlay.combining.composition import AdapterDrop, Average, Fuse, Split, Stack
from inlay.combining.trees import composed, plain
from inlay.engine.adapters import adapters_of
from inlay.errors import BaseModelError, CheckpointError, ConfigError, InlayError, UnsupportedError
from inlay.train import Run, check, evaluate, merge, predict, show, train
from inlay.train.use import open_run

BRIEF = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def sources(tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two runs on the task of these tests, and one on a task of three labels."""
    folder = tmp_path_factory.mktemp("sources")
    three = folder / "three.jsonl"
    lines = (rows / "train.jsonl").read_text().splitlines()
    three.write_text(
        "".join(json.dumps({**json.loads(line), "label": "xyz"[i % 3]}) + "\n" for i, line in enumerate(lines))
    )
    common: dict[str, Any] = {
        "model": str(tiny_model),
        "method": {"kind": "lora", "r": 2, "init": "random"},
        "max_length": 16,
        "train": BRIEF,
    }
    for seed, (name, data) in enumerate({"a": str(rows), "b": str(rows), "three": {"train": str(three)}}.items()):
        train(Run.from_settings({**common, "data": data, "seed": seed, "out": str(folder / name)}), progress=False)
    return {name: str(folder / name) for name in ("a", "b", "three")}


def logits(folder: str | Path, **how: Any) -> torch.Tensor:
    opened = open_run(folder, **how)
    with torch.no_grad():
        found: torch.Tensor = opened.model(torch.arange(5, 17)[None]).logits
    return found


METHODS = ["fusion", "scalearn", "scalearn_uniform", "scalearn++", "scalearn_uniform++", "xlora"]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_over_adapters_of_other_tasks(
    method: str, make_run: Callable[..., Run], sources: dict[str, str]
) -> None:
    run = make_run(train=BRIEF, method=method, adapters=sources)
    record = train(run, progress=False)
    opened = open_run(run.out)
    assert adapters_of(opened.model).state.active == ("default",)
    assert list(adapters_of(opened.model).loaded) == ["a", "b", "three", "default"]
    others = [adapters_of(opened.model).get(name) for name in sources]
    assert not any(parameter.requires_grad for adapter in others for parameter in adapter.parameters())
    assert evaluate(run.out) == record.metrics["test"]
    assert Run.from_yaml(Path(run.out) / "run.yaml").method[0]["adapters"] == ["a", "b", "three"]
    # What it was made on may go: the run has kept it.
    before = logits(run.out)
    for name in sources:
        kept = Path(run.out) / "adapters" / name / "adapter_model.safetensors"
        assert kept.read_bytes() == (Path(sources[name]) / "adapter" / kept.name).read_bytes()
    assert torch.equal(logits(run.out), before)
    with pytest.raises(UnsupportedError, match="not a change of the weights"):
        merge(run.out, Path(run.out) / "merged")


def test_a_new_adapter_on_top_of_a_loaded_one(make_run: Callable[..., Run], sources: dict[str, str]) -> None:
    run = make_run(train=BRIEF, adapters={"three": sources["three"]}, compose="three")
    found = check(run)
    record = train(run, progress=False)
    assert (found.matched.keys(), found.trainable_parameters) == (
        {"lora", "modules_to_save"},
        record.trainable_parameters,
    )
    assert evaluate(run.out) == record.metrics["test"]
    assert len(predict(run.out, Path(str(run.data.path)) / "test.jsonl")) == 12
    opened = open_run(run.out)
    assert inlay.summary(opened.model).active == ("three", "default")
    lower = adapters_of(opened.model).get("three")
    assert all(not piece.replaces for _, piece in lower.pieces()), "its head, of three labels, stayed behind"
    # By hand: the same two adapters, one around the other. The head of the other task is all that differs.
    by_hand = opened.task.load_model(run.model)
    inlay.load(by_hand, Path(run.out) / "adapter", name="default")
    assert not torch.equal(by_hand.eval()(torch.arange(5, 17)[None]).logits, logits(run.out)), "it needs the lower one"
    merged = merge(run.out, Path(run.out) / "merged")
    assert merged.largest_difference <= merged.tolerance
    shown = show(run.out)
    assert (shown.adapters, shown.compose) == ({"three": sources["three"]}, "three")  # type: ignore[union-attr]
    assert "inlay.activate(model, Stack('three', 'default'))" in (Path(run.out) / "README.md").read_text()


def test_compositions_of_runs_are_those_of_python(make_run: Callable[..., Run], sources: dict[str, str]) -> None:
    mean = {"average": ["b", "default"], "weights": [0.25, 0.75]}
    found = logits(sources["a"], adapters={"b": sources["b"]}, compose=mean)
    opened = open_run(sources["a"])
    inlay.load(opened.model, Path(sources["b"]) / "adapter", name="b")
    with inlay.using(opened.model, Average("b", "default", weights=[0.25, 0.75])), torch.no_grad():
        assert torch.equal(opened.model(torch.arange(5, 17)[None]).logits, found)
    assert not torch.equal(found, logits(sources["a"]))
    assert torch.equal(logits(sources["a"], compose=["default"]), logits(sources["a"]))


def test_a_run_that_stopped_goes_on_over_what_it_kept(
    make_run: Callable[..., Run], sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = {name: str(shutil.copytree(folder, tmp_path / name)) for name, folder in sources.items()}
    settings = {**BRIEF, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
    fields = {"train": settings, "method": "scalearn", "adapters": moved}
    whole, halves = make_run("whole", **fields), make_run("halves", **fields)
    train(whole, progress=False)
    train_until(halves, 4, monkeypatch)
    for folder in moved.values():
        shutil.rmtree(folder)
    train(halves, resume=True, progress=False)
    assert torch.equal(logits(whole.out), logits(halves.out))
    assert curve(whole) == curve(halves)


def test_a_copy_that_changed_or_went_is_one_error(make_run: Callable[..., Run], sources: dict[str, str]) -> None:
    run = make_run(train=BRIEF, adapters={"a": sources["a"]}, compose="a")
    train(run, progress=False)
    folder = Path(run.out) / "adapters" / "a"
    shutil.copyfile(Path(sources["b"]) / "adapter" / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapters/a has changed: the run was trained over the adapter 'a'"):
        evaluate(run.out)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="is missing"):
        evaluate(run.out)


def test_dropping_blocks_of_the_own_adapter(make_run: Callable[..., Run]) -> None:
    run = make_run(train=BRIEF, compose={"adapter_drop": "default", "first": [0, 1]})
    train(run, progress=False)
    quick = logits(run.out, compose={"adapter_drop": "default", "first": 1})
    assert torch.equal(logits(run.out), logits(run.out, compose="default"))
    assert not torch.equal(quick, logits(run.out))


def test_rows_are_looked_at_through_what_runs_below(make_run: Callable[..., Run], sources: dict[str, str]) -> None:
    run = make_run(
        train=BRIEF, adapters={"a": sources["a"]}, compose="a", method={"kind": "lora", "r": 2, "init": "eva"}
    )
    train(run, progress=False)
    assert inlay.summary(open_run(run.out).model).active == ("a", "default")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "xlora"}, "the run loads none: add --adapters NAME=FOLDER"),
    ({"adapters": {"a": "A"}}, "the run loads a and nothing uses them"),
    ({"adapters": {"a": "A"}, "compose": "aa"}, r"compose names the adapter 'aa', and the run has a, default; did you"),
    ({"adapters": {"a": "A"}, "method": {"kind": "fusion", "adapters": ["b"]}}, "names the adapter 'b', which the run"),
    ({"adapters": {"a": "A"}, "method": "fusion", "compose": "a"}, "'a', which runs inside the run's own method"),
    ({"adapters": {"default": "A"}, "compose": "default"}, "'default' is the run's own adapter"),
    ({"adapters": {"a b": "A"}, "compose": "a b"}, "'a b' cannot name an adapter"),
    ({"adapters": ["A"], "compose": "a"}, "adapters must be a mapping"),
    ({"adapters": {"a": 3}, "compose": "a"}, "adapters.a must be a folder"),
    ({"adapters": {"a": "A"}, "compose": {"parallel": ["a", "default"]}}, "several answers for each row"),
    ({"adapters": {"a": "A"}, "compose": {"batch_split": ["a"], "sizes": [1]}}, "goes by a row's number"),
    ({"compose": {"stak": ["default"]}}, "did you mean 'stack'"),
    ({"compose": {"average": ["default"], "first": 1}}, "average takes weights beside its parts"),
    ({"compose": {"stack": ["default"], "first": 1}}, "stack takes its parts alone"),
    ({"compose": {"split": ["default", None]}}, r"needs sizes, as in \{split"),
    ({"compose": {"average": "default"}}, "average takes a list of parts"),
    ({"compose": {"average": ["default"], "weights": "half"}}, "weights takes numbers"),
    ({"compose": 3}, "a composition is a name, a list, or a mapping"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_cannot_be_a_run(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Run.from_settings({"model": "m", **fields})


def test_what_cannot_be_loaded(make_run: Callable[..., Run], sources: dict[str, str], tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], type[InlayError], str]] = [
        ({"adapters": {"a": sources["a"] + "x"}, "compose": "a"}, ConfigError, "there is no folder .*; did you"),
        ({"adapters": {"a": str(tmp_path)}, "compose": "a"}, ConfigError, "holds no adapter"),
        ({"adapters": sources, "compose": ["a", "b"]}, ConfigError, "'three' is loaded and nothing uses it"),
        (
            {"adapters": sources, "compose": {"average": [*sources, "default"]}},
            ConfigError,
            "classifier with random numbers",
        ),
    ]
    for fields, error, message in cases:
        run = make_run("refused", train=BRIEF, **fields)
        with pytest.raises(error, match=message):
            train(run, progress=False)
        assert not Path(run.out).exists()
    inside = make_run("a", train=BRIEF, adapters={"a": sources["a"]}, compose="a").replace(out=sources["a"])
    with pytest.raises(ConfigError, match="which the run writes: choose another --out"):
        train(inside, overwrite=True, progress=False)
    with pytest.raises(ConfigError, match="nothing says how b should run"):
        evaluate(sources["a"], adapters={"b": sources["b"]})


def test_an_adapter_of_another_base(make_run: Callable[..., Run], sources: dict[str, str], tmp_path: Path) -> None:
    for labels in ("a", "three"):  # with its head, and without
        other = Path(shutil.copytree(sources[labels], tmp_path / labels))
        config = json.loads((other / "adapter" / "adapter_config.json").read_text())
        config["auto_mapping"]["inlay"]["base"]["config"]["num_hidden_layers"] = 12
        (other / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        run = make_run(train=BRIEF, adapters={"x": str(other)}, compose="x")
        with pytest.raises(BaseModelError, match=r"adapters\.x .* num_hidden_layers is 2 here, 12 there"):
            train(run, progress=False)


@pytest.mark.parametrize(
    "part",
    [
        "a",
        None,
        Stack("a", Average("b", None, weights=[0.5, 2.0])),
        Split("a", Fuse("a", "b"), sizes=[1, 2]),
        AdapterDrop(Stack("a", "b"), first=(0, 3)),
        AdapterDrop("a", first=2),
    ],
)
def test_compositions_are_plain_data_and_back(part: Any) -> None:
    tree = plain(part)
    assert composed(json.loads(json.dumps(tree))) == part
    assert Run(model="m", adapters={"a": "A", "b": "B"}, compose=part).compose == tree if part else tree is None


def test_flags_add_adapters_to_a_file_and_replace_its_composition(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\nadapters: {a: A}\ncompose: {average: [a, default]}\n")
    run = Run.from_yaml(file, {"adapters": {"b": "B"}, "compose": {"stack": ["a", "b"]}})
    assert (dict(run.adapters), run.compose) == ({"a": "A", "b": "B"}, {"stack": ["a", "b"]})
    assert Run.from_settings(run.to_dict()) == run
    file.write_text("model: m\nadapters: {a: A, a: B}\ncompose: a\n")
    with pytest.raises(ConfigError, match="'a' is given twice"):
        Run.from_yaml(file)
