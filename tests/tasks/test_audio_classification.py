"""Audio classification: WAV of every width, rates, what is refused, and runs on tones and on spoken digits."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

from inlay.errors import ConfigError, DataError
from inlay.tasks.data import read_splits
from inlay.tasks.loading import quiet
from inlay.tasks.sounds import resampled, samples_of
from inlay.tasks.task import Task, make_task
from inlay.train import Run, evaluate, merge, predict, train
from inlay.train.callbacks import read_curve

RATE = 2000


@pytest.fixture(scope="session")
def wav2vec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wav2vec 2.0 of 2 layers of 32 at 2 kHz, that reads an attention mask."""
    folder = tmp_path_factory.mktemp("wav2vec")
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16, 16),
        conv_kernel=(10, 8), conv_stride=(5, 4), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer", classifier_proj_size=16, apply_spec_augment=False, layerdrop=0.0,
        hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, do_stable_layer_norm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with quiet():
        Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True).save_pretrained(folder)
    return folder


def put(path: Path, samples: np.ndarray, rate: int = RATE, width: int = 2) -> None:
    """Write samples of -1 to 1, (n,) or (n, channels), as a WAV file."""
    whole = np.round(samples * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    if width == 1:
        whole += 128
    raw = whole.reshape(-1, 1).astype("<i8").view(np.uint8)[:, :width]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw.tobytes())


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """High and low tones of a fifth to a third of a second, at twice the model's rate."""
    folder, draw = tmp_path_factory.mktemp("tones"), np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 6), ("test", 6)):
        lines = []
        for row in range(count):
            time = np.arange(draw.integers(800, 1400)) / (2 * RATE)
            put(folder / f"{split}{row}.wav", 0.5 * np.sin(2 * np.pi * (60, 400)[row % 2] * time), 2 * RATE)
            lines.append(json.dumps({"audio": f"{split}{row}.wav", "label": ["low", "high"][row % 2]}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_every_width(tmp_path: Path, width: int) -> None:
    samples = np.array([[-1.0, 1.0], [0.5, 0.5], [-0.25, 0.75], [0.0, -1.0]])
    put(tmp_path / "a.wav", samples, width=width)
    found = samples_of(str(tmp_path / "a.wav"), RATE, seconds=1)
    assert found.dtype == np.float32
    assert np.allclose(found, samples.mean(1), atol=2.0 ** (2 - 8 * width))  # a step or two of the width
    assert np.allclose(samples_of(str(tmp_path / "a.wav"), RATE, seconds=2 / RATE), found[:2])


def test_another_rate_is_the_same_tone() -> None:
    time = np.arange(800)
    slow, fast = np.sin(2 * np.pi * 20 * time / 800), np.sin(2 * np.pi * 20 * np.arange(1600) / 1600)
    assert np.allclose(resampled(slow, 8000, 16000), fast, atol=1e-6)
    assert np.allclose(resampled(fast, 16000, 8000), slow, atol=1e-6)
    assert resampled(slow, 8000, 8000).tolist() == slow.astype(np.float32).tolist()


def test_the_highest_tone_of_the_slower_rate_keeps_its_loudness() -> None:
    highest = np.tile([1.0, -1.0], 8)  # half its rate, which stands once in a spectrum
    twice = resampled(highest, 8000, 16000)
    assert np.allclose(twice, np.tile([1.0, 0.0, -1.0, 0.0], 8), atol=1e-6)
    assert np.allclose(resampled(twice, 16000, 8000), highest, atol=1e-6)


def test_files_bytes_and_samples_are_the_same_sound(wav2vec: Path, tones: Path) -> None:
    splits = read_splits(tones)
    task = make_task("audio-classification").resolve(splits)
    assert (dict(task.columns), task.labels) == ({"audio": "audio", "label": "label"}, ("high", "low"))
    assert Task.from_dict(task.to_dict()) == task
    extractor, model = task.load_tokenizer(wav2vec), task.load_model(wav2vec)
    collate, rows = task.collator(extractor, model), splits["test"]
    batch = collate(task.features(rows, extractor, train=False).to_list())
    assert batch["labels"].tolist() == [1, 0, 1, 0, 1, 0]
    files = [tones / name for name in rows["audio"][:]]
    others = [
        [{"bytes": path.read_bytes(), "path": None} for path in files],
        [samples_of(str(path), RATE, seconds=9).tolist() for path in files],
    ]
    for cells in others:
        same = Dataset.from_dict({"audio": cells})
        assert torch.equal(collate(task.features(same, extractor, train=False).to_list())["input_values"],
                           batch["input_values"])  # fmt: skip
    whole = task.predict(model, extractor, rows)
    assert [row["audio"] for row in whole] == rows["audio"][:]
    for one, other in zip(task.predict(model, extractor, rows, batch_size=1), whole, strict=True):
        # the mask hides padding; sums over more columns round differently
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
    short = make_task(**{**task.to_dict(), "max_seconds": 0.1})
    cut = short.collator(extractor, model)(short.features(rows, extractor, train=False).to_list())
    assert cut["input_values"].shape == (6, RATE // 10)


def test_what_is_refused(write: Callable[..., Path], tones: Path, bert: Path, tmp_path: Path) -> None:
    write("text.wav", "no sound")
    put(tmp_path / "none.wav", np.zeros(0))
    put(tmp_path / "ok.wav", np.zeros(9))
    for cell, message in (
        ("text.wav", r"line 2: .*text\.wav is no WAV file of plain \(PCM\) samples"),
        ("none.wav", r"line 2: .*none\.wav is a recording without samples"),
        ("k.wav", r"line 2: the audio \(column 'audio'\) is to be .*k\.wav, and there is no such file.*'ok\.wav'"),
    ):
        path = write("train.jsonl", [{"audio": "ok.wav", "label": "a"}, {"audio": cell, "label": "b"}])
        with pytest.raises(DataError, match=message):
            make_task("audio-classification").resolve(read_splits(path))
    rows = Dataset.from_list([{"audio": [], "label": "a"}, {"audio": [0.5], "label": "b"}])
    with pytest.raises(DataError, match="row 0: its samples are no list of numbers"):
        make_task("audio-classification").resolve({"train": rows})
    task = make_task("audio-classification").resolve(read_splits(tones))
    with pytest.raises(ConfigError, match=r"no preprocessor_config\.json"):
        task.load_tokenizer(bert)
    with pytest.raises(ConfigError, match=r"set task\.max_seconds"):
        make_task("audio-classification", max_length=64).resolve(read_splits(tones))
    for seconds in (0.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="max_seconds must be more than 0"):
            make_task("audio-classification", max_seconds=seconds)


def test_a_model_of_spectrograms_and_one_of_another_size(tones: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = ASTConfig(max_length=32, num_mel_bins=16, **sizes)
    with quiet():
        ASTForAudioClassification(config).save_pretrained(tmp_path / "ast")
    ASTFeatureExtractor(max_length=32, num_mel_bins=16, sampling_rate=RATE).save_pretrained(tmp_path / "ast")
    splits = read_splits(tones)
    task = make_task("audio-classification").resolve(splits)
    extractor, model = task.load_tokenizer(tmp_path / "ast"), task.load_model(tmp_path / "ast")
    assert 0 <= task.evaluate(model, extractor, splits["test"])["accuracy"] <= 1
    wrong = ASTFeatureExtractor(max_length=64, num_mel_bins=16, sampling_rate=RATE)
    with pytest.raises(ConfigError, match=r"does not take sounds as its feature extractor makes them \(input_values"):
        task.collator(wrong, model)


def run_of(model: Path, data: Path, out: Path, **train_settings: Any) -> Run:
    settings = {"num_train_epochs": 4, "per_device_train_batch_size": 6, "learning_rate": 0.01, **train_settings}
    return Run.from_settings(
        {
            "model": str(model), "task": "audio-classification", "data": {"path": str(data)},
            "method": {"kind": "lora", "r": 4}, "out": str(out), "train": settings,
        }
    )  # fmt: skip


def test_a_run_learns_evaluates_predicts_and_merges(wav2vec: Path, tones: Path, tmp_path: Path) -> None:
    record = train(run_of(wav2vec, tones, tmp_path / "run"), progress=False)
    losses = [line["loss"] for line in read_curve(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert evaluate(record.out, str(tones), split="test") == pytest.approx(record.metrics["test"], abs=1e-6)
    assert [row["audio"] for row in predict(record.out, str(tones), split="test")] == [f"test{i}.wav" for i in range(6)]
    # one float32 product with W + BA against one with W and one with BA
    assert merge(record.out, tmp_path / "merged").largest_difference < 1e-4
    again = train(run_of(wav2vec, tones, tmp_path / "again"), progress=False)
    assert again.metrics == record.metrics


def test_spoken_digits(wav2vec: Path, shared_data: Path) -> None:
    splits = read_splits(shared_data / "speech" / "fsdd")
    task = make_task("audio-classification").resolve(splits)
    assert task.labels == tuple("0123456789")
    extractor, model = task.load_tokenizer(wav2vec), task.load_model(wav2vec)
    rows = splits["test"].select(range(4))
    assert set(task.evaluate(model, extractor, rows)) == {"loss", "accuracy", "macro_f1", "mcc"}
