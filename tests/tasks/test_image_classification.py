"""Image classification: paths and pixels, what is refused, and a run from beginning to end, resumed and merged."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from docs.places import DOCS, tables
from PIL import Image as Pillow
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from inlay.errors import ConfigError, DataError, MissingExtraError, TrainingError
from inlay.tasks.data import read_splits
from inlay.tasks.loading import quiet
from inlay.tasks.task import Task, make_task
from inlay.train import Run, evaluate, merge, predict, train
from inlay.train.callbacks import read_curve
from inlay.train.prepare import splits_of

SIDE = 12


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ViT of 2 layers of 32 over 12 × 12 grey pixels, with its image processor."""
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=SIDE, patch_size=4,
        num_channels=1, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    with quiet():
        ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5], image_std=[0.5], resample=0
    ).save_pretrained(folder)
    return folder


def picture(label: int, draw: np.random.Generator) -> np.ndarray:
    """Noise with a bright upper or left half."""
    pixels = draw.integers(0, 120, (SIDE, SIDE), dtype=np.uint8)
    pixels[(slice(None, 6), slice(None)) if label else (slice(None), slice(None, 6))] += 100
    return pixels


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of PNG files beside train, validation and test rows that name them."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    (folder / "png").mkdir()
    for split, count in (("train", 32), ("validation", 8), ("test", 8)):
        lines = []
        for row in range(count):
            name = f"png/{split}{row}.png"
            Pillow.fromarray(picture(row % 2, draw)).save(folder / name)
            lines.append(json.dumps({"image": name, "label": ["left", "upper"][row % 2]}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run_of(vit: Path, pictures: Path, out: Path, **train_settings: Any) -> Run:
    settings = {"num_train_epochs": 6, "per_device_train_batch_size": 8, "learning_rate": 0.02, **train_settings}
    return Run.from_settings(
        {
            "model": str(vit), "task": "image-classification", "data": {"path": str(pictures)},
            "method": {"kind": "lora", "r": 4, "targets": "query,value"}, "out": str(out), "train": settings,
        }
    )  # fmt: skip


def test_paths_pixels_and_bytes_are_the_same_image(vit: Path, pictures: Path) -> None:
    splits = read_splits(pictures)
    task = make_task("image-classification").resolve(splits)
    assert (dict(task.columns), task.labels) == ({"image": "image", "label": "label"}, ("left", "upper"))
    processor, model = task.load_tokenizer(vit), task.load_model(vit)
    named = splits["test"]
    files = [pictures / name for name in named["image"][:]]
    pixels = Dataset.from_dict({"pixels": [np.array(Pillow.open(path)).tolist() for path in files]})
    encoded = [{"bytes": path.read_bytes(), "path": None} for path in files]
    held = Dataset.from_dict({"photo": encoded}, features=Features({"photo": Image()}))
    collate = task.collator(processor, model)
    batches = []
    for rows, column in ((named, "image"), (pixels, "pixels"), (held, "photo")):
        other = make_task(**{**task.to_dict(), "columns": {"image": column, "label": "label"}})
        batches.append(collate(other.features(rows, processor, train=False).to_list())["pixel_values"])
        assert other.labelled(rows) == (column == "image")
        assert [set(row) for row in other.predict(model, processor, rows)] == [
            {"image" if column == "image" else "row", "label", "score"}
        ] * len(rows)
    assert batches[0].shape == (8, 1, SIDE, SIDE)
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])
    expected = np.array(Pillow.open(files[3])) / 255 / 0.5 - 1
    assert np.allclose(batches[0][3, 0].numpy(), expected, atol=1e-6)
    assert Task.from_dict(task.to_dict()) == task


def test_selected_rows_find_their_files_and_batches_do_not_change_answers(vit: Path, pictures: Path) -> None:
    splits = read_splits(pictures)
    task = make_task("image-classification").resolve(splits)
    processor, model = task.load_tokenizer(vit), task.load_model(vit)
    chosen = splits["test"].select([5, 2])
    whole = task.predict(model, processor, splits["test"], batch_size=3)
    for one, index in zip(task.predict(model, processor, chosen), (5, 2), strict=True):
        assert one["image"] == whole[index]["image"]
        assert one["score"] == pytest.approx(whole[index]["score"], abs=1e-6)


def test_shards_find_their_files(write: Callable[..., Path]) -> None:
    stream = io.BytesIO()
    Pillow.new("L", (4, 4)).save(stream, "PNG")
    write("shards/ok.png", stream.getvalue())
    for number in range(2):
        write(f"shards/train-0000{number}-of-00002.jsonl", [{"image": "ok.png", "label": str(number)}])
    folder = write("shards/notes.txt", "").parent
    assert make_task("image-classification").resolve(read_splits(folder)).labels == ("0", "1")
    write("shards/train-00001-of-00002.jsonl", [{"image": "gone.png", "label": "1"}])
    with pytest.raises(DataError, match=r"train-\*-of-00002\.jsonl row 1: the image .*gone\.png, and there is no such"):
        make_task("image-classification").resolve(read_splits(folder))


def test_a_mixture_reads_from_the_working_directory(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = {"a": str(pictures / "train.jsonl"), "b": str(pictures / "test.jsonl")}
    run = Run.from_settings({"model": "m", "task": "image-classification", "data": {"train": mixture}})
    with pytest.raises(DataError, match="there is no such file"):
        make_task("image-classification").resolve(splits_of(run))
    monkeypatch.chdir(pictures)
    assert make_task("image-classification").resolve(splits_of(run)).labels == ("left", "upper")


def test_colours_sizes_and_cameras(vit: Path, tmp_path: Path) -> None:
    tall = Pillow.fromarray(np.arange(8 * 24 * 3, dtype=np.uint8).reshape(24, 8, 3))
    exif = Pillow.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    tall.save(tmp_path / "a.png")
    tall.save(tmp_path / "turned.png", exif=exif)
    tall.transpose(Pillow.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    task = make_task("image-classification", columns={"image": "f", "label": "y"}, labels=["0", "1"],
                     problem_type="single_label_classification")  # fmt: skip
    processor, model = task.load_tokenizer(vit), task.load_model(vit)
    rows = Dataset.from_dict({"f": [str(tmp_path / f"{name}.png") for name in ("a", "turned", "upright")]})
    batch = task.collator(processor, model)(task.features(rows, processor, train=False).to_list())
    assert batch["pixel_values"].shape == (3, 1, SIDE, SIDE)
    assert torch.equal(batch["pixel_values"][1], batch["pixel_values"][2])
    assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])


def test_images_of_16_bits_keep_their_greys(vit: Path, tmp_path: Path) -> None:
    """Pillow's own conversion makes everything above 255 of 65,535 white."""
    greys = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * (65535 // (SIDE * SIDE - 1))
    Pillow.fromarray(greys).save(tmp_path / "deep.png")
    Pillow.fromarray((greys / 257).round().astype(np.uint8)).save(tmp_path / "flat.png")
    task = make_task("image-classification", columns={"image": "f", "label": "y"}, labels=["0", "1"],
                     problem_type="single_label_classification")  # fmt: skip
    processor, model = task.load_tokenizer(vit), task.load_model(vit)
    rows = Dataset.from_dict({"f": [str(tmp_path / f"{name}.png") for name in ("deep", "flat")]})
    batch = task.collator(processor, model)(task.features(rows, processor, train=False).to_list())
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])
    Pillow.fromarray(greys.astype(np.float32)).save(tmp_path / "real.tiff")
    with pytest.raises(DataError, match=r"row 0: .*real\.tiff is an image of real numbers"):
        task.features(Dataset.from_dict({"f": [str(tmp_path / "real.tiff")]}), processor, train=False)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("png/a.png", r"train.jsonl line 2: the image \(column 'image'\) is to be .*, and there is no such file"),
        ("notes.txt", r"train.jsonl line 2: .*notes.txt is not an image that Pillow can read"),
        ("", r"line 2: the image \(column 'image'\) is empty"),
        (None, r"line 2: the image \(column 'image'\) is null"),
    ],
)
def test_a_bad_cell_is_named_before_training(write: Callable[..., Path], cell: str | None, message: str) -> None:
    write("notes.txt", "no picture")
    stream = io.BytesIO()
    Pillow.new("L", (4, 4)).save(stream, "PNG")
    write("ok.png", stream.getvalue())
    path = write("train.jsonl", [{"image": "ok.png", "label": "a"}, {"image": cell, "label": "b"}])
    with pytest.raises(DataError, match=message):
        make_task("image-classification").resolve(read_splits(path))


@pytest.mark.parametrize("cell", [[[1, 2], [3]], [1, 2], [[0.5, 1.0]], [[256]], [[[1, 2]]], [[-1]]])
def test_pixels_of_a_wrong_shape(cell: list[Any]) -> None:
    rows = Dataset.from_list([{"image": cell, "label": "a"}, {"image": cell, "label": "b"}])
    with pytest.raises(DataError, match=r"row 0: its (pixels|lists of pixels) .* is needed"):
        make_task("image-classification").resolve({"train": rows})


def test_a_file_cut_in_the_middle_is_named_when_it_is_read(vit: Path, tmp_path: Path) -> None:
    Pillow.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    rows = Dataset.from_list([{"image": str(tmp_path / "cut.png"), "label": name} for name in "ab"])
    task = make_task("image-classification").resolve({"train": rows})
    processor = task.load_tokenizer(vit)
    with pytest.raises(DataError, match=r"cut\.png is a damaged image"):
        task.collator(processor, task.load_model(vit))(task.features(rows, processor, train=True).to_list())


def test_a_processor_that_does_not_fit_the_model(vit: Path, pictures: Path, bert: Path, tmp_path: Path) -> None:
    task = make_task("image-classification").resolve(read_splits(pictures))
    model = task.load_model(vit)
    wrong = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5])
    with pytest.raises(ConfigError, match=r"this vit model does not take images as .* \(5, 1, 16, 16\)"):
        task.collator(wrong, model)
    with pytest.raises(ConfigError, match=r"does not take images .* \(5, 1, 16, 16\)"):
        task.predict(model, wrong, read_splits(pictures)["test"])
    with pytest.raises(ConfigError, match=r"no preprocessor_config\.json"):
        task.load_tokenizer(bert)
    with pytest.raises(ConfigError, match="cannot do image-classification"):
        task.load_model(bert)
    with pytest.raises(ConfigError, match="image-classification has no max_length"):
        make_task("image-classification", max_length=64).resolve(read_splits(pictures))


def test_which_column() -> None:
    rows = Dataset.from_list([{"a": [[1]], "b": "x"}])
    with pytest.raises(DataError, match=r"which column is the image\? Columns: a, b"):
        make_task("image-classification").resolve({"train": rows})


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_list([{"image": [[1]], "label": "x"}, {"image": [[2]], "label": "y"}])
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtraError, match=r"needs Pillow.*pip install 'inlay\[vision\]'"):
        make_task("image-classification").resolve({"train": rows})


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_learns_evaluates_predicts_and_merges(vit: Path, pictures: Path, tmp_path: Path) -> None:
    record = train(run_of(vit, pictures, tmp_path / "run"), progress=False)
    losses = [line["loss"] for line in read_curve(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert evaluate(record.out, str(pictures), split="test") == pytest.approx(record.metrics["test"], abs=1e-6)
    found = predict(record.out, str(pictures / "test.jsonl"), tmp_path / "predictions.jsonl")
    truth = [json.loads(line) for line in (pictures / "test.jsonl").read_text().splitlines()]
    assert [row["image"] for row in found] == [row["image"] for row in truth]
    right = sum(a["label"] == b["label"] for a, b in zip(found, truth, strict=True)) / len(truth)
    assert right == pytest.approx(record.metrics["test"]["accuracy"])
    (table,) = (table[1:] for table in tables(DOCS / "tasks.md") if table[0][0] == "Kind")
    said = next(row for row in table if "image-classification" in row[0])
    assert [f"`{name}`" for name in record.metrics["test"]] == said[2].split(", ")
    assert f"`{record.primary_metric}`" == said[3]
    # one float32 product with W + BA against one with W and one with BA: a few ulp of logits of size about 10
    assert merge(record.out, tmp_path / "merged").largest_difference < 1e-4
    plain = ViTForImageClassification.from_pretrained(tmp_path / "merged")
    assert plain.config.id2label == {0: "left", 1: "upper"}
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()


def test_a_resumed_run_is_the_same_run(vit: Path, pictures: Path, tmp_path: Path) -> None:
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2}
    whole = train(run_of(vit, pictures, tmp_path / "whole", **settings), progress=False)
    from inlay.tasks import image_classification

    calls = iter(range(8))  # the eighth batch cannot be read
    read = image_classification.Pictures.__call__

    def broken(self: Any, rows: list[dict[str, Any]]) -> Any:
        if next(calls, None) is None:
            raise TrainingError("stopped")
        return read(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_classification.Pictures, "__call__", broken)
        with pytest.raises(TrainingError, match="stopped"):
            train(run_of(vit, pictures, tmp_path / "cut", **settings), progress=False)
    again = train(run_of(vit, pictures, tmp_path / "cut", **settings), resume=True, progress=False)
    assert read_curve(tmp_path / "cut" / "metrics.jsonl") == read_curve(tmp_path / "whole" / "metrics.jsonl")
    assert again.metrics == whole.metrics


def test_a_method_of_several_tasks_is_told_which(vit: Path, pictures: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (pictures / "train.jsonl").read_text().splitlines()][:8]
    lines = "".join(json.dumps({**row, "image": str(pictures / row["image"])}) + "\n" for row in rows)
    mixture = {name: str(tmp_path / f"{name}.jsonl") for name in "ab"}
    for path in mixture.values():
        Path(path).write_text(lines, encoding="utf-8")
    run = Run.from_settings(
        {
            "model": str(vit), "task": "image-classification", "data": {"train": mixture},
            "method": {"kind": "poly", "r": 2, "n_tasks": 2, "n_skills": 2}, "out": str(tmp_path / "run"),
            "train": {"num_train_epochs": 1, "per_device_train_batch_size": 8},
        }
    )  # fmt: skip
    assert train(run, progress=False).steps == 2
