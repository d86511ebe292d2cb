"""`train` end to end on a tiny model: what it leaves behind, what it measures, and what stops it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from inlay.engine.controller import Controller
from inlay.errors import CheckpointError, ConfigError, DataError, InlayError, TargetError, TrainingError
from inlay.train import Record, Run, check, convert, evaluate, merge, predict, show, train
from inlay.train import trainer as trainer_module
from inlay.train.callbacks import read_curve
from inlay.train.checkpoints import checkpoints, step_of


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows: Path) -> Record:
    """One finished run for the tests that only look at it."""
    run = Run.from_settings(
        {
            "model": str(tiny_model),
            "data": {"path": str(rows)},
            "method": {"kind": "lora", "r": 4},
            "max_length": 16,
            "out": str(tmp_path_factory.mktemp("trained") / "run"),
            "train": {"num_train_epochs": 12, "per_device_train_batch_size": 8, "learning_rate": 0.02},
        }
    )
    return train(run, progress=False)


def test_a_run_leaves_a_folder_that_describes_itself(trained: Record) -> None:
    out = Path(trained.out)
    names = {"run.yaml", "task.json", "metrics.jsonl", "loss.svg", "record.json", "README.md", "adapter", "checkpoints"}
    assert {path.name for path in out.iterdir()} == names
    assert Record.read(out) == trained
    record = json.loads((out / "record.json").read_text())
    for key in ("method", "model", "task", "trainable_parameters", "total_parameters", "adapter_bytes", "seconds",
                "peak_memory_bytes", "seed", "versions"):  # fmt: skip
        assert record[key] or key == "seed", key
    assert set(record["metrics"]) == {"validation", "test"}
    assert set(record["metrics"]["test"]) == {"loss", "accuracy", "macro_f1", "mcc"}
    assert record["adapter_bytes"] == (out / "adapter" / "adapter_model.safetensors").stat().st_size
    assert record["trainable_parameters"] < record["total_parameters"]
    assert {"torch", "transformers", "python"} <= set(record["versions"])
    resolved = yaml.safe_load((out / "run.yaml").read_text())
    assert resolved["train"]["eval_strategy"] == "epoch"
    card = (out / "README.md").read_text()
    assert "| accuracy |" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "inlay"
    assert (out / "loss.svg").read_text().startswith("<svg")


def test_the_loss_falls(trained: Record) -> None:
    losses = [line["loss"] for line in read_curve(Path(trained.out) / "metrics.jsonl") if "loss" in line]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_the_resolved_run_makes_the_same_run_again(trained: Record, tmp_path: Path) -> None:
    again = train(Run.from_yaml(Path(trained.out) / "run.yaml", {"out": str(tmp_path / "again")}), progress=False)
    assert again.metrics == trained.metrics
    assert read_curve(tmp_path / "again" / "metrics.jsonl") == read_curve(Path(trained.out) / "metrics.jsonl")


def test_the_best_checkpoint_is_kept_not_the_last(trained: Record) -> None:
    scores = {
        line["step"]: line["validation"]["accuracy"]
        for line in read_curve(Path(trained.out) / "metrics.jsonl")
        if "validation" in line
    }
    assert trained.best_step == max(scores, key=lambda step: (scores[step], -step))  # the first of the best
    assert trained.metrics["validation"]["accuracy"] == scores[trained.best_step]


def test_evaluate_gives_the_numbers_of_the_record(trained: Record, rows: Path) -> None:
    assert evaluate(trained.out, str(rows / "test.jsonl")) == pytest.approx(trained.metrics["test"], abs=1e-6)
    assert evaluate(Path(trained.out) / "adapter") == pytest.approx(trained.metrics["test"], abs=1e-6)
    assert evaluate(trained.out, str(rows), split="validation") == pytest.approx(
        trained.metrics["validation"], abs=1e-6
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_predictions_are_one_for_each_row_and_written_whole(
    trained: Record, rows: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"predictions{suffix}"
    found = predict(trained.out, str(rows / "test.jsonl"), out)
    truth = [json.loads(line) for line in (rows / "test.jsonl").read_text().splitlines()]
    assert [row["text"] for row in found] == [row["text"] for row in truth]
    right = sum(a["label"] == b["label"] for a, b in zip(found, truth, strict=True)) / len(truth)
    assert right == pytest.approx(trained.metrics["test"]["accuracy"])
    assert out.read_text().count("positive") + out.read_text().count("negative") >= len(truth)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_predictions_refuse_an_unknown_format_before_any_work(trained: Record, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"written as \.jsonl, \.json, \.csv; did you mean '\.jsonl'"):
        predict(trained.out, str(rows / "test.jsonl"), tmp_path / "p.jsnl")


def test_a_merged_folder_is_a_plain_model_with_the_same_answers(trained: Record, rows: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    merged = merge(trained.out, tmp_path / "merged")
    # One float32 matmul with W + BA against one with W and one with BA: a few ulp of logits of size about 10.
    assert merged.largest_difference < 1e-4
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert not [name for name in model.state_dict() if "inlay" in name]
    truth = [json.loads(line) for line in (rows / "test.jsonl").read_text().splitlines()]
    batch = tokenizer([row["text"] for row in truth], padding=True, return_tensors="pt")
    with torch.no_grad():
        labels = [model.config.id2label[int(row)] for row in model(**batch).logits.argmax(-1)]
    assert labels == [row["label"] for row in predict(trained.out, str(rows / "test.jsonl"))]


def test_a_merge_above_tolerance_leaves_nothing(
    trained: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inlay.train import use

    calls = iter([torch.zeros(5, 2), torch.ones(5, 2)])
    monkeypatch.setattr(use, "_logits", lambda model, batch: next(calls))
    with pytest.raises(CheckpointError, match=r"by up to 1 on 5 sentences, more than 0\.0001\. Nothing was written"):
        merge(trained.out, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_merge_does_not_overwrite_unasked(trained: Record, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").write_text("")
    with pytest.raises(ConfigError, match="is there already"):
        merge(trained.out, tmp_path / "merged")


def test_check_trains_nothing_and_writes_nothing(make_run: Callable[..., Run], tmp_path: Path) -> None:
    found = check(make_run(method={"kind": "lora", "r": 2, "targets": "query,value"}))
    assert found.matched["lora"] == tuple(
        f"bert.encoder.layer.{{0-1}}.attention.self.{name}" for name in ("query", "value")
    )
    assert found.rows == {"train": 40, "validation": 12, "test": 12}
    assert (found.steps, len(found.tokens)) == (15, 8)
    # 4 places of r (16 + 16), the classifier of 2 × 16 + 2, and the pooler of 16 × 16 + 16 that the file lacks
    assert found.trainable_parameters == 4 * 2 * 32 + 34 + 272
    assert "text=text" in found.task
    assert not list(tmp_path.iterdir())


def test_what_the_base_lacks_is_saved_with_the_adapter_or_the_run_is_refused(make_run: Callable[..., Run]) -> None:
    # The tiny model was saved with a language-model head: it has no pooler, which a classifier needs.
    assert set(check(make_run()).matched["modules_to_save"]) == {
        f"{name}.{part}" for name in ("classifier", "bert.pooler.dense") for part in ("weight", "bias")
    }
    with pytest.raises(ConfigError, match=r"modules_to_save=\['classifier'\] leaves out bert\.pooler\.dense, which"):
        check(make_run(modules_to_save=["classifier"]))
    assert check(make_run(modules_to_save=["classifier", "pooler"])).trainable_parameters


def test_show_reads_both_kinds_of_folder(trained: Record, tiny_model: Path) -> None:
    shown: Any = show(trained.out)
    assert shown.peft_type == "LORA"
    assert shown.record == trained
    assert "LoRA(" in shown.methods[0]
    places: Any = show(tiny_model)
    query = next(place for place in places if place.pattern.endswith("layer.{0-1}.attention.self.query"))
    assert (query.count, query.kind, query.shape) == (2, "linear", (16, 16))
    assert "query" in query.roles
    with pytest.raises(ConfigError, match="holds neither an adapter"):
        show(tiny_model.parent)


def test_convert_writes_what_both_libraries_read(trained: Record, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    plain = convert(trained.out, tmp_path / "plain")
    assert (plain.peft_type, plain.renamed) == ("LORA", 0)
    before = load_file(Path(trained.out) / "adapter" / "adapter_model.safetensors")
    after = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "adapter_config.json").write_text((tmp_path / "plain" / "adapter_config.json").read_text())
    save_file(
        {key.removeprefix("base_model.model."): value for key, value in before.items()},
        bare / "adapter_model.safetensors",
    )
    assert convert(bare, tmp_path / "renamed").renamed == len(before)
    assert load_file(tmp_path / "renamed" / "adapter_model.safetensors").keys() == before.keys()


def test_a_run_with_a_head_of_its_own_is_quantised_with_the_base(
    make_run: Callable[..., Run], tiny_model: Path, tmp_path: Path
) -> None:
    """Three labels: the base's own config has two, and only the run's task knows."""
    three = [{"text": "good", "label": "a"}, {"text": "bad", "label": "b"}, {"text": "so", "label": "c"}] * 4
    data = tmp_path / "three"
    data.mkdir()
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in three))
    run = make_run(data=str(data), train={"max_steps": 2})
    train(run, progress=False)
    convert(run.out, tmp_path / "codes", model=str(tiny_model), quantise="nf4")
    stored = json.loads((tmp_path / "codes" / "adapter_config.json").read_text())
    assert stored["auto_mapping"]["inlay"]["quantised"]["kind"] == "nf4"



@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("pickle", "pickle"),
        ("cut", "truncated or damaged"),
        ("nan", "not finite"),
        ("kind", "unknown"),
        ("config", "not valid JSON"),
    ],
)
def test_convert_refuses_what_is_damaged_and_leaves_nothing(
    trained: Record, tmp_path: Path, damage: str, says: str
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "in"
    shutil.copytree(Path(trained.out) / "adapter", folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if damage == "pickle":
        weights.rename(folder / "adapter_model.bin")
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "nan":
        save_file({key: value * float("nan") for key, value in load_file(weights).items()}, weights)
    elif damage == "kind":
        config.write_text(json.dumps({"peft_type": "LORRA"}))
    else:
        config.write_text("{")
    with pytest.raises(CheckpointError, match=says):
        convert(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poison(Controller):
        steps = 0

        def after_step(self, optimizer: Any) -> None:
            self.steps += 1

        def extra_loss(self) -> torch.Tensor | None:
            return torch.tensor(float("nan")) if self.steps == 7 else None

    poison = Poison()
    monkeypatch.setattr(trainer_module, "controllers", lambda model: [poison])
    run = make_run()
    with pytest.raises(TrainingError) as caught:
        train(run, progress=False)
    assert "the loss became nan at step 8" in str(caught.value)
    assert "checkpoint-5" in str(caught.value)
    assert "Lower train.learning_rate (now 0.01)" in str(caught.value)
    [kept] = checkpoints(Path(run.out) / "checkpoints")
    assert step_of(kept) == 5
    assert len(read_curve(Path(run.out) / "metrics.jsonl")) == 7 + 1
    assert not (Path(run.out) / "record.json").exists()


def test_a_full_disk_at_a_checkpoint_is_one_error_and_the_one_before_stays(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    save, count = torch.save, 0

    def full(state: Any, place: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += str(place).endswith("optimizer.pt")
        if count == 2:
            raise RuntimeError(
                "PytorchStreamWriter failed writing file data/0: file write failed: No space left on device"
            )
        save(state, place, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    run = make_run()
    with pytest.raises(TrainingError, match=r"the disk is full while saving the checkpoint .*checkpoint-10"):
        train(run, progress=False)
    assert [step_of(path) for path in checkpoints(Path(run.out) / "checkpoints")] == [5]
    assert not list(Path(run.out).rglob(".*"))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"method": {"kind": "lora", "targets": "querry"}}, TargetError, "querry"),
        ({"method": {"kind": "lora", "targets": ["query", "querry"]}}, TargetError, "querry"),
        ({"method": {"kind": "lora", "r": 0}}, ConfigError, "r"),
        ({"model": "/nowhere/at/all"}, InlayError, "/nowhere/at/all"),
        ({"task": "text-clasification"}, ConfigError, "did you mean 'text-classification'"),
        ({"columns": {"text": "txt"}}, DataError, "txt"),
        ({"data": {}}, DataError, "give --train FILE"),
        ({"data": {"train": "nowhere.jsonl"}}, DataError, "nowhere.jsonl"),
        ({"train": {"lr_scheduler_type": "linnear"}}, ConfigError, "linnear"),
        ({"train": {"optim": "adamwx"}}, ConfigError, "adamwx"),
    ],
)
def test_what_cannot_work_is_said_before_training_and_nothing_is_written(
    make_run: Callable[..., Run], tmp_path: Path, change: dict[str, Any], error: type[InlayError], says: str
) -> None:
    with pytest.raises(error) as caught:
        train(make_run(**change), progress=False)
    assert says in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_small_data_is_gone_over_more_often_and_defaults_are_written_out(make_run: Callable[..., Run]) -> None:
    from inlay.train.arguments import default_epochs, resolved

    assert default_epochs(rows=100_000, batch=16) == 3
    assert default_epochs(rows=800, batch=16) == 6
    assert default_epochs(rows=16, batch=16) == 20
    run = Run(model="m", method=[{"kind": "lora"}])
    settings = resolved(run, run.methods(), rows=800, evaluates=True).train
    assert settings["num_train_epochs"] == 6
    assert (
        resolved(Run(model="m", train={"max_steps": 7}), run.methods(), 800, True).train.get("num_train_epochs") is None
    )


def test_without_validation_the_last_adapter_is_kept(make_run: Callable[..., Run], rows: Path) -> None:
    record = train(make_run(data={"train": str(rows / "train.jsonl")}), progress=False)
    assert (record.best_step, record.metrics) == (15, {})
    assert "nothing was measured" in (Path(record.out) / "README.md").read_text()


@pytest.mark.parametrize(("folder", "says"), [("run", "it does not exist"), (".", "it has no run.yaml")])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, folder: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        evaluate(tmp_path / folder)
