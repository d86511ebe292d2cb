"""A run over several languages: their mixture, resumed and trimmed; and four real ones, where the data is there."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import inlay
from inlay.errors import ConfigError
from inlay.tasks.loading import load_tokenizer
from inlay.train import Run, evaluate, train, trim
from inlay.train.prepare import rows_of


@pytest.fixture
def languages(rows: Path, tmp_path: Path) -> dict[str, str]:
    """Two sources, of 40 rows and of 4."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join((rows / "train.jsonl").read_text().splitlines(keepends=True)[:4]))
    return {"many": str(rows / "train.jsonl"), "few": str(few)}


def test_a_mixture_in_a_run(
    make_run: Callable[..., Run], languages: dict[str, str], rows: Path, tmp_path: Path
) -> None:
    validation = {name: str(rows / "validation.jsonl") for name in languages}
    data = {"train": languages, "validation": validation, "temperature": 2}
    masked = {"task": "masked-lm", "columns": {"text": "text"}, "train": {"num_train_epochs": 1}}
    run = make_run(data=data, **masked)
    found = rows_of(run)
    assert {split: len(found[split]) for split in found} == {"train": 40 + 13, "validation": 24}  # 4 · √10 / 1
    record = train(run, progress=False)
    stored = Run.from_yaml(tmp_path / "run" / "run.yaml")
    assert stored.data == run.data
    assert record.rows == {"train": 53, "validation": 24}
    assert evaluate(tmp_path / "run", split="validation") == record.metrics["validation"]


def test_bad_mixtures(make_run: Callable[..., Run], languages: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.temperature=0: a number above 0"):
        make_run(data={"train": languages, "temperature": 0})
    with pytest.raises(ConfigError, match=r"data\.temperature mixes several sources"):
        make_run(data={"train": "a.jsonl", "temperature": 2})
    with pytest.raises(ConfigError, match=r"data\.train must be a path"):
        make_run(data={"train": {}})


def test_trim_writes_a_plain_folder(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "the film was good"}\n{"text": "a good plot"}\n')
    done = trim(str(tiny_model), [str(data)], tmp_path / "small")
    assert (done.tokens_before, done.tokens, done.share) == (19, 5 + 6, 1.0)
    assert load_tokenizer(done.out).tokenize("the awful film") == ["the", "[UNK]", "film"]
    with pytest.raises(ConfigError, match="is there already"):
        trim(str(tiny_model), [str(data)], tmp_path / "small")
    with pytest.raises(ConfigError, match="needs texts, or scripts"):
        trim(str(tiny_model), [], tmp_path / "none")
    assert not (tmp_path / "none").exists()


SETS = {"hausa": "hau", "swahili": "swa", "yoruba": "yor", "pidgin": "pcm"}


def afrisenti(folder: Path, code: str, count: int) -> list[str]:
    """The first texts of a language (tweets, CC BY 4.0)."""
    (path,) = (folder / "text_classification" / f"afrisenti_{code}").glob("train.*")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line)["text"] for line in raw.decode().split("\n")[:count]]


def test_four_african_languages(shared_data: Path, tmp_path: Path) -> None:
    """A tokenizer of all four, trimmed to one; a mixture of all four, and a loss that falls on each."""
    from tasks.trimmed_hosts import unigram
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    texts = {name: afrisenti(shared_data, code, 40) for name, code in SETS.items()}
    tokenizer: Any = unigram(600, [text for rows in texts.values() for text in rows])
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=140, pad_token_id=1, type_vocab_size=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = XLMRobertaForMaskedLM(config)
    for name, rows in texts.items():
        assert tokenizer.unk_token_id not in tokenizer(rows[0])["input_ids"], name
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    paths = {}
    for number, (name, rows) in enumerate(texts.items()):
        paths[name] = str(tmp_path / f"{name}.jsonl")
        kept = rows[: 40 >> number]  # 40, 20, 10 and 5 rows
        Path(paths[name]).write_text("".join(json.dumps({"text": text}) + "\n" for text in kept))
    small = inlay.trim_vocabulary(model, tokenizer, texts["hausa"] + texts["pidgin"])
    assert len(small.kept) < 0.8 * len(tokenizer)
    for text in texts["hausa"] + texts["pidgin"]:
        assert small.renumber(tokenizer(text)["input_ids"]) == small.tokenizer(text)["input_ids"]
    # The tokenizer's training differs from run to run, and so do the rows' tokens: enough steps for any of them.
    run = Run(
        model=str(tmp_path / "base"), task="masked-lm", data={"train": paths, "temperature": 3.3},  # type: ignore[arg-type]
        method="full", train={"max_steps": 400, "learning_rate": 5e-3, "per_device_train_batch_size": 8}, max_length=48,
        out=str(tmp_path / "run"),
    )  # fmt: skip
    lines = rows_of(run)["train"]["text"]
    assert len(lines) > 40 + 20 + 10 + 5
    assert set(lines) >= set(texts["hausa"])
    train(run, progress=False)
    after = {name: evaluate(tmp_path / "run", path)["loss"] for name, path in paths.items()}
    uniform = torch.tensor(float(len(tokenizer))).log().item()
    assert max(after.values()) < uniform - 0.5, after
