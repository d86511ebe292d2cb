"""Demonstrations: one of each class, never the query itself, the nearest of each class, the same again when loaded."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from inlay.errors import CheckpointError, ConfigError, DataError
from inlay.fewshot.base import Base
from inlay.fewshot.explaining import explained
from inlay.fewshot.learning.fitting import Recipe, fit
from inlay.fewshot.predictor import Predictor, Solution
from inlay.fewshot.prompts.demonstrations import BodyEmbedder, Demonstrations
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.mask import MaskScorer
from inlay.methods.lora import LoRA

NAMES = ("neg", "pos", "so")
TEXTS = ["bad", "awful", "terrible film", "no", "good", "great", "wonderful", "fine", "fine film", "the movie", "maybe"]
LABELS = [*["neg"] * 4, *["pos"] * 4, *["so"] * 3]
ROWS = [{"text": text} for text in TEXTS]
QUERIES = [{"text": text} for text in ("a film", "never", "good news", "sports", "a film")]
WORDS = Verbalizer({"neg": "terrible", "pos": "great", "so": "maybe"})


def circle(texts: Sequence[str]) -> torch.Tensor:
    """Unit vectors whose angle is the text's place in TEXTS: cosines fall with the distance of the places."""
    angles = torch.tensor([TEXTS.index(text) if text in TEXTS else len(text) for text in texts]) * 0.2
    return torch.stack([angles.cos(), angles.sin()], -1)


def demonstrations(**fields: object) -> Demonstrations:
    given = {"rows": ROWS, "labels": LABELS, "names": NAMES, "columns": ("text",), **fields}
    return Demonstrations(**given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def base(bert_folder: Path) -> Base:
    return Base(str(bert_folder), device="cpu")


def scorer(tokenizer: PreTrainedTokenizerFast) -> MaskScorer:
    template = Template("{text} It was {mask}.")
    return MaskScorer(tokenizer=tokenizer, template=template, verbalizer=WORDS, max_length=120)


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_one_of_each_class_in_order_and_never_the_query(keep: float, base: Base) -> None:
    draw = demonstrations(keep=keep, embed=circle).demonstrator(base)
    seen: dict[int, set[str]] = {number: set() for number in range(len(ROWS))}
    for step in range(60):
        found = draw(range(len(ROWS)), torch.Generator().manual_seed(step))
        for number, shown in enumerate(found):
            assert [label for _, label in shown] == list(NAMES)
            assert all(LABELS[TEXTS.index(row["text"])] == label for row, label in shown)
            assert TEXTS[number] not in [row["text"] for row, _ in shown]
            seen[number] |= {row["text"] for row, _ in shown}
    for number, label in enumerate(LABELS):  # all that may be drawn is drawn: 60 draws of at most 4 rows a class
        counts = [len([1 for other in LABELS if other == name]) - (name == label) for name in NAMES]
        assert len(seen[number]) == sum(math.ceil(keep * count) for count in counts)


def test_the_same_generator_draws_the_same_and_another_draws_anew(base: Base) -> None:
    draw = demonstrations().demonstrator(base)
    first, again, other = (draw(range(11), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_random_order_is_of_the_same_labels(base: Base) -> None:
    sets = demonstrations(order="random", sets=40).fixed()
    orders = {tuple(label for _, label in shown) for shown in sets}
    assert all(sorted(order) == sorted(NAMES) for order in orders)
    assert len(orders) == 6  # 40 draws of 6 orders miss one with a chance below 1 %, and the seed is fixed


@pytest.mark.parametrize("keep", [0.1, 0.34, 0.5, 2 / 3, 0.99, 1.0])
def test_the_filter_keeps_the_nearest_rounded_up(keep: float) -> None:
    made = demonstrations(keep=keep, embed=circle)
    likeness = circle([TEXTS[5]])[0] @ circle(TEXTS).T
    for without in (None, 5):
        for name, kept in zip(NAMES, made.nearest(likeness, without=without), strict=True):
            pool = [n for n, label in enumerate(LABELS) if label == name and n != without]
            assert len(kept) == math.ceil(round(keep * len(pool), 9))
            left = [n for n in pool if n not in kept]
            assert all(abs(near - 5) <= abs(far - 5) for near in kept for far in left)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_equally_near_rows_are_told_apart_by_their_place_and_not_by_rounding(keep: float) -> None:
    made = demonstrations(keep=keep, embed=circle)
    draw = torch.Generator().manual_seed(0)
    for query in range(len(TEXTS)):  # the rows on both sides of it are equally near
        likeness = circle([TEXTS[query]])[0].double() @ circle(TEXTS).double().T
        expected = made.nearest(likeness)
        for _ in range(20):
            assert made.nearest(likeness + 2e-7 * torch.randn(len(TEXTS), generator=draw)) == expected
            # as another order of summing, or another batch, would make it


def test_inference_sets_depend_on_the_query_alone(base: Base) -> None:
    made = demonstrations(keep=0.5, embed=circle, sets=8)
    together = made.shown(base, QUERIES)
    assert len(together) == 8
    for number, query in enumerate(QUERIES):
        alone = made.shown(base, [query])
        assert [one_set[0] for one_set in alone] == [one_set[number] for one_set in together]
    assert [shown[0] for shown in together] == [shown[4] for shown in together]  # the same text
    assert dataclasses.replace(made, seed=1).shown(base, QUERIES) != together
    shared = demonstrations(sets=8)
    assert shared.shown(base, QUERIES) == [[one_set] * 5 for one_set in shared.fixed()]


def test_scores_are_the_mean_over_the_sets_and_of_one_set_no_mean(base: Base) -> None:
    asked = scorer(base.tokenizer)  # type: ignore[arg-type]
    for keep in (1.0, 0.5):
        made = demonstrations(keep=keep, sets=5)
        each = [
            asked.scores(base.model("masked-lm"), QUERIES, demonstrations=one_set)
            for one_set in made.shown(base, QUERIES)
        ]
        found = Predictor(scorer=asked, demonstrations=made).scores(base, QUERIES)
        torch.testing.assert_close(found, torch.stack(each).mean(0))
        assert torch.stack(each).std(0).max() > 0.01
        one = dataclasses.replace(made, sets=1)
        alone = asked.scores(base.model("masked-lm"), QUERIES, demonstrations=one.shown(base, QUERIES)[0])
        assert torch.equal(Predictor(scorer=asked, demonstrations=one).scores(base, QUERIES), alone)


def test_a_predictor_with_a_filter_is_the_same_when_read_again(base: Base, tmp_path: Path) -> None:
    asked = scorer(base.tokenizer)  # type: ignore[arg-type]
    made = demonstrations(keep=0.5, sets=3, order="random", seed=7)
    predictor = Predictor(scorer=asked, demonstrations=made)
    fields = json.loads(json.dumps(predictor.to_dict(tmp_path)))
    again = Predictor.from_dict(fields, tmp_path, base)
    assert torch.equal(again.scores(base, QUERIES), predictor.scores(base, QUERIES))
    assert again.to_dict(tmp_path) == fields
    prompts = [one.prompt for one in explained(base, Solution(predictors=[again]), QUERIES)]
    assert all(sum(word in prompt for word in ("terrible", "great", "maybe")) == 3 for prompt in prompts)
    with pytest.raises(CheckpointError, match="embedder of your own"):
        Predictor(scorer=asked, demonstrations=demonstrations(keep=0.5, embed=circle)).to_dict(tmp_path)


def test_no_demonstration_brings_a_second_mask(any_tokenizer: PreTrainedTokenizerFast, base: Base) -> None:
    for source in ("{text} It was {mask}.", "a {mask}: {text}", "{demos} {text} {mask}"):
        template = Template(source)
        asked = MaskScorer(tokenizer=any_tokenizer, template=template, verbalizer=WORDS, max_length=200)
        for encoded in asked.encode(QUERIES, demonstrations(sets=1).shown(base, QUERIES)[0]):
            assert encoded.demonstrations == 3
            assert encoded.ids.count(any_tokenizer.mask_token_id) == 1  # type: ignore[arg-type]


def test_the_bodys_vectors_are_means_without_padding_and_without_the_adapter(base: Base) -> None:
    embed = BodyEmbedder(base)
    model = base.model("masked-lm")
    alone = []
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([base.tokenizer(text)["input_ids"]])
            alone.append(model.base_model(ids)[0][0].mean(0))
    torch.testing.assert_close(embed(TEXTS), torch.stack(alone), atol=1e-5, rtol=1e-5)
    assert embed([]).shape == (0, 32)
    plain = embed(TEXTS)
    with base.adapted("masked-lm", [LoRA(r=2)], seed=0) as adapted:
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(1))
        assert torch.equal(embed(TEXTS), plain)


def test_training_with_demonstrations_is_the_same_again(base: Base) -> None:
    asked = scorer(base.tokenizer)  # type: ignore[arg-type]
    losses = []
    for made in (demonstrations(keep=0.5), demonstrations(keep=0.5), demonstrations()):
        with base.adapted("masked-lm", [LoRA(r=4)], seed=0) as model:
            done = fit(
                model, asked, ROWS, LABELS, recipe=Recipe(steps=2, batch_size=2),
                demonstrator=made.demonstrator(base),
            )  # fmt: skip
        losses.append(done.losses)
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_what_cannot_be_shown_is_an_error(base: Base) -> None:
    with pytest.raises(DataError, match="'so' has no row"):
        demonstrations(rows=ROWS[:8], labels=LABELS[:8])
    with pytest.raises(DataError, match="'so' has one row alone"):
        demonstrations(rows=ROWS[:9], labels=LABELS[:9]).demonstrator(base)
    for wrong in ({"keep": 0}, {"keep": 1.5}, {"sets": 0}, {"order": "up"}, {"keep": 0.5, "columns": ()}):
        with pytest.raises(ConfigError):
            demonstrations(**wrong)
