"""Image to text: features before the text, against inputs_embeds by hand; what is refused; runs of VL-PET and LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from tasks.conftest import byte_tokenizer, saved
from transformers import BartConfig, BartForConditionalGeneration, T5ForConditionalGeneration

import inlay
from inlay.engine.registry import make_method
from inlay.errors import ConfigError, DataError, TrainingError
from inlay.tasks.data import read_splits
from inlay.tasks.loading import quiet
from inlay.tasks.task import Task, make_task
from inlay.tasks.visual import WithVisual, reading_images
from inlay.train import Run, evaluate, merge, predict, train
from inlay.train.callbacks import read_curve

N, SIZE = 3, 6
COLOURS = {"red": 0, "blue": 1}


@pytest.fixture(scope="session")
def bart(models_folder: Path) -> Path:
    """BART of 2 + 2 layers of 32 over bytes: learned positions, scaled embeddings."""
    tokenizer = byte_tokenizer(append_eos=True, length=64)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=1, bos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None, scale_embedding=True,
        init_std=0.2, dropout=0.0,
    )  # fmt: skip
    return saved(models_folder / "bart", lambda: BartForConditionalGeneration(config), tokenizer)


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that ask for a colour which only the features tell: as .npy files in training, as lists elsewhere."""
    folder, draw = tmp_path_factory.mktemp("seen"), np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 4), ("test", 4)):
        lines = []
        for row in range(count):
            name = list(COLOURS)[row % 2]
            features = draw.normal(size=(N, SIZE)).astype(np.float32)
            features[:, 0] = 3 * (1 - 2 * COLOURS[name])
            cell: Any = features.tolist()
            if split == "train":
                cell = f"{row}.npy"
                np.save(folder / cell, features)
            question = "which?" if row % 4 < 2 else "what colour?"
            lines.append(json.dumps({"features": cell, "question": question, "answer": name}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def resolved(seen: Path, **fields: Any) -> tuple[Any, dict[str, Dataset]]:
    splits = read_splits(seen)
    return make_task("image-to-text", max_length=20, max_target_length=8, **fields).resolve(splits), splits


@pytest.mark.parametrize("base", ["bart", "t5"])
def test_features_come_first_and_are_what_inputs_embeds_would_be(
    base: str, seen: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    task, splits = resolved(seen)
    assert dict(task.columns) == {"features": "features", "source": "question", "target": "answer"}
    assert (task.visual_tokens, task.visual_size) == (N, SIZE)
    assert Task.from_dict(task.to_dict()) == task
    tokenizer, model = task.load_tokenizer(folder), task.load_model(folder).eval()
    assert model.fresh_parameters == ("visual_prefix.bias", "visual_prefix.weight")
    batch = task.collator(tokenizer, model)(task.features(splits["train"], tokenizer, train=True).to_list())
    assert batch["visual"].shape == (24, N, SIZE)
    assert batch["attention_mask"].shape[1] == batch["input_ids"].shape[1] + N
    plain = type(model).__mro__[1].from_pretrained(folder).eval()
    assert type(plain) in (BartForConditionalGeneration, T5ForConditionalGeneration)
    with torch.no_grad():
        found = model(**batch)
        embedded = torch.cat(
            (model.visual_prefix(batch["visual"]), plain.get_input_embeddings()(batch["input_ids"])), dim=1
        )
        expected = plain(inputs_embeds=embedded, attention_mask=batch["attention_mask"], labels=batch["labels"])
        ids = splits["test"]
        generated = plain.generate(
            inputs_embeds=embedded, attention_mask=batch["attention_mask"], max_new_tokens=8, do_sample=False
        )
        text = {name: batch[name] for name in ("input_ids", "labels")}
        assert torch.equal(model(**text).loss, plain(**text).loss)  # without features it is what it was
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
    assert [row["generation"] for row in task.predict(model, tokenizer, splits["train"])] == texts
    assert set(task.predict(model, tokenizer, ids)[0]) == {"row", "source", "generation"}
    assert task.predict(model, tokenizer, splits["train"])[1]["features"] == "1.npy"


@pytest.mark.parametrize("name", ["Bart", "Marian", "Pegasus", "Mvp", "BlenderbotSmall"])
def test_the_text_is_read_as_its_ids_are_where_the_encoder_scales_only_these(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=40, pad_token_id=0,
        eos_token_id=1, bos_token_id=2, decoder_start_token_id=0, forced_eos_token_id=1, scale_embedding=True,
        init_std=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        base = type(transformers.AutoModelForSeq2SeqLM.from_config(config))
    model, ids = reading_images(base)(config, visual_size=SIZE).eval(), torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids[:, :3]).logits
        found = model(input_ids=ids, decoder_input_ids=ids[:, :3], visual=torch.zeros(1, 0, SIZE)).logits
        assert torch.equal(found, expected)
        encoded = model.get_encoder()(ids)
        assert model.generate(encoder_outputs=encoded, visual=torch.zeros(1, 1, SIZE), max_new_tokens=2).shape[0] == 1


def test_answers_do_not_depend_on_the_batch(seen: Path, bart: Path) -> None:
    task, splits = resolved(seen)
    tokenizer, model = task.load_tokenizer(bart), task.load_model(bart)
    rows = splits["train"]
    assert task.predict(model, tokenizer, rows) == task.predict(model, tokenizer, rows, batch_size=1)
    one, all_ = (task.evaluate(model, tokenizer, rows, batch_size=size)["loss"] for size in (1, 32))
    assert one == pytest.approx(all_, rel=1e-5)


def test_captions_need_no_question_and_each_of_several_targets_is_learned(t5: Path) -> None:
    first, second = {"features": [[0.0, 1.0]], "target": ["a", "b"]}, {"features": [[1.0, 0.0]], "target": ["c"]}
    rows = Dataset.from_list([first, second])
    task = make_task("image-to-text", prompt_template="Describe:").resolve({"train": rows})
    assert dict(task.columns) == {"features": "features", "target": "target"}
    tokenizer = task.load_tokenizer(t5)
    features = task.features(rows, tokenizer, train=True)
    assert features["visual"][:] == [[[0.0, 1.0]], [[0.0, 1.0]], [[1.0, 0.0]]]
    assert {tokenizer.decode(ids) for ids in features["input_ids"]} == {"Describe:</s>"}
    with pytest.raises(DataError, match="which column is the source"):
        make_task("image-to-text").resolve({"train": rows})


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ([[1.0, 2.0], [3.0]], r"line 2: the features \(column 'features'\) are lists of different lengths"),
        ([[1.0, 2.0]], r"line 2: .* are 1 × 2 where others are 2 × 2"),
        ([[1.0], [2.0]], r"line 2: .* are 2 × 1 where others are 2 × 2"),
        ([[1.0, 2.0], [3.0, float("nan")]], r"line 2: .* hold a number that is not finite"),
    ],
)
def test_bad_lists(write: Callable[..., Path], cell: Any, message: str) -> None:
    good = {"features": [[1.0, 2.0], [3.0, 4.0]], "source": "a", "target": "b"}
    with pytest.raises(DataError, match=message):
        make_task("image-to-text").resolve(read_splits(write("train.jsonl", [good, {**good, "features": cell}])))


def test_bad_files(write: Callable[..., Path], tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.zeros(4))
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    write("text.npy", "no array")
    for name, message in (
        ("flat.npy", r"are float64 of shape \(4,\); an array of \(features, numbers\)"),
        ("objects.npy", "which is no .npy file .*allow_pickle"),
        ("text.npy", "which is no .npy file"),
        ("gone.npy", r"is to be .*gone\.npy, and there is no such file"),
    ):
        rows = write("train.jsonl", [{"features": name, "source": "a", "target": "b"}])
        with pytest.raises(DataError, match=message):
            make_task("image-to-text").resolve(read_splits(rows))


def test_what_does_not_fit(seen: Path, bart: Path, bert: Path, gpt2: Path) -> None:
    task, _ = resolved(seen)
    long = make_task(**{**task.to_dict(), "max_length": 62})
    with pytest.raises(ConfigError, match=r"3 features and max_length=62 tokens are more than the 64 positions"):
        long.collator(long.load_tokenizer(bart), long.load_model(bart))
    for other in (bert, gpt2):
        with pytest.raises(ConfigError, match="cannot do image-to-text"):
            task.load_model(other)
    with pytest.raises(ConfigError, match="does not know its features yet"):
        make_task("image-to-text").load_model(bart)
    with pytest.raises(DataError, match=r"which column is the features\?"):
        make_task("image-to-text").resolve({"train": Dataset.from_list([{"a": "x", "b": "y"}])})


# -- runs --------------------------------------------------------------------------------------------------------------


def run_of(bart: Path, seen: Path, out: Path, method: dict[str, Any], **train_settings: Any) -> Run:
    settings = {"num_train_epochs": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01, **train_settings}
    return Run.from_settings(
        {
            "model": str(bart), "task": {"kind": "image-to-text", "max_length": 20, "max_target_length": 8},
            "data": {"path": str(seen)}, "method": method, "out": str(out), "train": settings,
        }
    )  # fmt: skip


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_curve(out / "metrics.jsonl") if "loss" in line]


def test_a_run_with_vl_pet_learns_to_look(bart: Path, seen: Path, tmp_path: Path) -> None:
    method = {"kind": "vl_pet", "variant": "middleX", "r": 8, "decoder_r": 8}
    settings = {"num_train_epochs": 16, "learning_rate": 0.02, "lr_scheduler_type": "constant"}
    record = train(run_of(bart, seen, tmp_path / "run", method, **settings), progress=False)
    found = losses(tmp_path / "run")
    assert sum(found[-4:]) < 0.5 * sum(found[:4])
    assert evaluate(record.out, str(seen), split="test") == pytest.approx(record.metrics["test"], abs=1e-6)
    answers = predict(record.out, str(seen / "train.jsonl"), tmp_path / "p.jsonl")
    assert [row["features"] for row in answers] == [f"{row}.npy" for row in range(24)]
    right = sum(row["generation"] == list(COLOURS)[index % 2] for index, row in enumerate(answers))
    assert right >= 20  # the question alone does not tell: 12 by chance
    assert any("visual_prefix.weight" in name for name in load_file(tmp_path / "run/adapter/adapter_model.safetensors"))


def test_a_lora_run_merges_into_a_folder_that_reads_images(bart: Path, seen: Path, tmp_path: Path) -> None:
    record = train(run_of(bart, seen, tmp_path / "run", {"kind": "lora", "r": 4}), progress=False)
    # one float32 product with W + BA against one with W and one with BA: a few ulp of logits of size about 10
    assert merge(record.out, tmp_path / "merged").largest_difference < 1e-4
    task, splits = resolved(seen)
    whole = task.load_model(tmp_path / "merged")
    assert whole.fresh_parameters == ()
    expected = [row["generation"] for row in predict(record.out, str(seen), split="test")]
    found = task.predict(whole, task.load_tokenizer(tmp_path / "merged"), splits["test"])
    assert [row["generation"] for row in found] == expected
    with quiet():
        BartForConditionalGeneration.from_pretrained(tmp_path / "merged")  # the language model by itself


def test_a_resumed_run_is_the_same_run(bart: Path, seen: Path, tmp_path: Path) -> None:
    method = {"kind": "vl_pet", "variant": "small", "r": 4, "decoder_r": 4}
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    whole = train(run_of(bart, seen, tmp_path / "whole", method, **settings), progress=False)
    calls, made = iter(range(7)), WithVisual.__call__

    def broken(self: Any, rows: list[dict[str, Any]]) -> Any:
        if next(calls, None) is None:
            raise TrainingError("stopped")
        return made(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WithVisual, "__call__", broken)
        with pytest.raises(TrainingError, match="stopped"):
            train(run_of(bart, seen, tmp_path / "cut", method, **settings), progress=False)
    again = train(run_of(bart, seen, tmp_path / "cut", method, **settings), resume=True, progress=False)
    assert read_curve(tmp_path / "cut" / "metrics.jsonl") == read_curve(tmp_path / "whole" / "metrics.jsonl")
    assert again.metrics == whole.metrics


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning", "bitfit"])
def test_other_methods_learn_beside_the_projection(kind: str, bart: Path, seen: Path) -> None:
    task, splits = resolved(seen)
    tokenizer, model = task.load_tokenizer(bart), task.load_model(bart).eval()
    batch = task.collator(tokenizer, model)(task.features(splits["train"], tokenizer, train=True).to_list()[:2])
    inlay.attach(model, make_method(kind), modules_to_save=["visual_prefix"])
    model(**batch).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert any("visual_prefix" in name for name in trained)
    assert any("visual_prefix" not in name for name in trained)
    rest = {name: tensor for name, tensor in batch.items() if name != "labels"}
    assert model.generate(**rest, max_new_tokens=3).shape == (2, 4)
