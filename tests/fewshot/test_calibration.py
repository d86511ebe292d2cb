"""Offsets of calibration, against the formulas they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fewshot.writers import WORDS, Planted, gpt2, held, whole_words

from inlay.errors import ConfigError
from inlay.fewshot.base import Base
from inlay.fewshot.predictor import Predictor
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.calibration import CONTENT_FREE, calibrated, content_free, offset
from inlay.fewshot.scorers.choice import ChoiceScorer
from inlay.fewshot.scorers.mask import MaskScorer

ROWS = [{"text": text} for text in ("a b c d", "a movie", "film plot", "b", "c c")]
SHOWN = [({"text": "a"}, "pos"), ({"text": "b"}, "neg")]


def asking(folder: Path, made: Any = None) -> tuple[Predictor, Base]:
    """A decoder, random or planted, asked for one of three labels."""
    words = whole_words(["<s>", "$A"])
    made = made or gpt2(len(WORDS))
    scorer = ChoiceScorer(
        tokenizer=words, template=Template("{text} It was {mask}."),
        verbalizer=Verbalizer({"neg": "bad", "pos": "good", "so": "fine"}),
    )  # fmt: skip
    return Predictor(scorer=scorer), held(made, words, folder)


@pytest.mark.parametrize("sets", [[], [SHOWN], [SHOWN, SHOWN[::-1]]])
def test_contextual_is_the_diagonal_matrix_of_the_paper(sets: Any, tmp_path: Path) -> None:
    """q = W p / sum(W p) with W = diag(p_cf)^-1; several sets: each by itself, then the mean of the logits."""
    plain, base = asking(tmp_path)
    plain = Predictor(scorer=plain.scorer, demonstrations=sets)
    found = calibrated(plain, base, "contextual", content_free(plain.scorer.template)).scores(base, ROWS)
    logs = []
    for shown in sets or [()]:
        alone = Predictor(scorer=plain.scorer, demonstrations=[shown] if shown else ())
        p_cf = alone.scores(base, content_free(plain.scorer.template)).double().softmax(-1).mean(0)
        weighted = alone.scores(base, ROWS).double().softmax(-1) @ torch.diag(1 / p_cf)
        logs.append((weighted / weighted.sum(-1, keepdim=True)).log())
        if len(sets) < 2:
            assert torch.equal(found.argmax(-1), torch.softmax(weighted, -1).argmax(-1)), "the paper's softmax(W p)"
    torch.testing.assert_close(found.double().softmax(-1), torch.stack(logs).mean(0).softmax(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("text", CONTENT_FREE)
def test_a_calibrated_input_without_content_is_uniform(text: str, tmp_path: Path) -> None:
    plain, base = asking(tmp_path)
    rows = content_free(plain.scorer.template, [text])
    before = plain.scores(base, rows).softmax(-1)
    after = calibrated(plain, base, "contextual", rows).scores(base, rows).softmax(-1)
    assert (before - 1 / 3).abs().max() > 1e-3, "else there was nothing to calibrate"
    torch.testing.assert_close(after, torch.full((1, 3), 1 / 3))


def test_calibration_by_a_uniform_model_changes_nothing(tmp_path: Path) -> None:
    plain, base = asking(tmp_path, Planted(torch.zeros(len(WORDS), len(WORDS))))
    done = calibrated(plain, base, "contextual", content_free(plain.scorer.template))
    torch.testing.assert_close(done.scores(base, ROWS).softmax(-1), plain.scores(base, ROWS).softmax(-1))


def test_a_calibrated_batch_has_the_same_mean_for_every_label(tmp_path: Path) -> None:
    plain, base = asking(tmp_path)
    found = calibrated(plain, base, "batch", ROWS).scores(base, ROWS).mean(0)
    torch.testing.assert_close(found, found[:1].expand(3), atol=1e-6, rtol=1e-5)


def test_a_mask_is_calibrated_as_well(bert_folder: Path) -> None:
    base = Base(str(bert_folder))
    scorer = MaskScorer(
        tokenizer=base.tokenizer, template=Template("{text} it was {mask}."),
        verbalizer=Verbalizer({"neg": "bad", "pos": ["good", "great"]}),
    )  # fmt: skip
    plain = Predictor(scorer=scorer)
    rows = content_free(scorer.template, ["[MASK]"])
    assert (plain.scores(base, rows).softmax(-1) - 0.5).abs().max() > 1e-3
    torch.testing.assert_close(
        calibrated(plain, base, "contextual", rows).scores(base, rows).softmax(-1), torch.full((1, 2), 0.5)
    )


def test_what_cannot_be_calibrated_is_said(tmp_path: Path) -> None:
    plain, base = asking(tmp_path)
    with pytest.raises(ConfigError, match="contextual, batch"):
        offset(plain, base, "contxt", ROWS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least one row"):
        offset(plain, base, "batch", [])
