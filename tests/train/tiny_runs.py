"""A tiny BERT with its tokenizer, on disk, and a few dozen rows that it can learn."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inlay.train import Run

FILLERS = ["the", "a", "film", "was", "very", "so", "plot", "story", "it", "is"]
SIGNS = {"negative": ["bad", "awful"], "positive": ["good", "great"]}
WORDS = [*FILLERS, *SIGNS["negative"], *SIGNS["positive"]]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT of 2 layers of 16, its masked-language-model head, and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    from inlay.tasks.loading import quiet

    folder = tmp_path_factory.mktemp("base") / "tiny-bert"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with quiet():
        BertForMaskedLM(
            BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, initializer_range=0.3, **sizes)
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train, validation and test rows {text, label}."""
    folder = tmp_path_factory.mktemp("rows")
    draw = random.Random(0)
    for split, count in (("train", 40), ("validation", 12), ("test", 12)):
        lines = []
        for row in range(count):
            label = list(SIGNS)[row % 2]
            words = [*draw.choices(FILLERS, k=draw.randint(3, 9)), draw.choice(SIGNS[label])]
            lines.append(json.dumps({"text": " ".join(words), "label": label}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def make_run(tiny_model: Path, rows: Path, tmp_path: Path) -> Callable[..., Run]:
    """A run of 15 steps in 3 epochs; `train` settings and other fields can be changed."""

    def make(out: str = "run", train: dict[str, Any] | None = None, **fields: Any) -> Run:
        settings: dict[str, Any] = {
            "model": str(tiny_model),
            "data": {"path": str(rows)},
            "method": {"kind": "lora", "r": 2},
            "max_length": 16,
            "out": str(tmp_path / out),
            "train": {"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 0.01, **(train or {})},
        }
        return Run.from_settings({**settings, **fields})

    return make
