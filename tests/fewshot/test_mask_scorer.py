"""The mask scorer's scores are the labels' words' logits at the masks, however rows are put into batches."""

from __future__ import annotations

import random

import pytest
import torch
from fewshot import toys
from transformers import BertForMaskedLM, PreTrainedTokenizerFast

from inlay.errors import ConfigError
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.kinds import scorer_from_dict
from inlay.fewshot.scorers.mask import MaskScorer

WORDS = Verbalizer({"neg": ["terrible", "bad", "awful"], "pos": "great", "so": ["fine", "maybe"]})


def rows(count: int = 9) -> list[dict[str, str]]:
    draw = random.Random(0)
    return [{"text": " ".join(draw.choices(toys.WORDS, k=draw.randint(1, 20)))} for _ in range(count)]


def scorer(tokenizer: PreTrainedTokenizerFast, source: str = "{text} It was {mask}.", **fields: object) -> MaskScorer:
    given = {"template": Template(source), "verbalizer": WORDS, **fields}
    return MaskScorer(tokenizer=tokenizer, **given)  # type: ignore[arg-type]


def brute_force(model: BertForMaskedLM, made: MaskScorer) -> torch.Tensor:
    """One row at a time, all logits at all places."""
    found = []
    for encoded in made.encode(rows()):
        logits = model(input_ids=torch.tensor([encoded.ids])).logits[0]
        words = made.verbalizer.tokens(made.tokenizer, made.template)
        found.append([
            sum(sum(logits[at, token] for at, token in zip(encoded.masks, ids, strict=True)) for ids in listed)
            / len(listed)
            for listed in words.values()
        ])  # fmt: skip
    return torch.tensor(found)


def test_equals_brute_force_with_several_words(bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    made = scorer(tokenizer)
    with torch.no_grad():
        expected = brute_force(bert, made)
    assert expected.std() > 0.1
    torch.testing.assert_close(made.scores(bert, rows()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("source", ["{text} It was {mask*2}.", "{mask}: {text} ({mask})"])
def test_equals_brute_force_with_several_masks(
    source: str, bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    words = Verbalizer({"neg": ["not good", "so bad"], "pos": "really great"})
    split = toys.wordpiece(["not", "so", *toys.WORDS])
    model = toys.tiny_bert(len(split))
    made = scorer(split, source, verbalizer=words)
    with torch.no_grad():
        expected = brute_force(model, made)
    torch.testing.assert_close(made.scores(model, rows()), expected, atol=1e-5, rtol=1e-5)


def test_batching_and_padding_change_nothing(bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    made = scorer(tokenizer)
    alone = made.scores(bert, rows(), batch_size=1)
    for batch_size in (2, 5, 64):
        torch.testing.assert_close(made.scores(bert, rows(), batch_size=batch_size), alone, atol=1e-5, rtol=1e-5)
    assert made.scores(bert, []).shape == (0, 3)


def test_every_family_reads_its_planted_answer(any_tokenizer: PreTrainedTokenizerFast) -> None:
    made = scorer(any_tokenizer)
    logits = torch.full((len(any_tokenizer),), -9.0)
    for word, value in {"terrible": 3.0, "bad": 1.0, "awful": -1.0, "great": 2.0, "fine": 0.5, "maybe": 0.0}.items():
        logits[Verbalizer({"x": word}).tokens(any_tokenizer, made.template)["x"][0][0]] = value
    found = made.scores(toys.everywhere(logits), [{"text": "a"}])
    torch.testing.assert_close(found, torch.tensor([[1.0, 2.0, 0.25]]))


def test_scores_have_gradients_and_scoring_leaves_the_model_as_it_was(
    bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    made = scorer(tokenizer)
    bert.train()
    bert.bert.encoder.eval()
    flags = [module.training for module in bert.modules()]
    made.scores(bert, rows())
    assert [module.training for module in bert.modules()] == flags
    made(bert, made.collate(made.encode(rows()))).sum().backward()
    assert bert.bert.embeddings.word_embeddings.weight.grad is not None


def test_demonstrations_are_filled_in_with_the_labels_first_word(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = scorer(tokenizer).encode([{"text": "a"}], [[({"text": "b"}, "neg"), ({"text": "c"}, "pos")]])[0]
    text = tokenizer.decode(encoded.ids)
    assert text.index("terrible") < text.index("great")
    assert (encoded.demonstrations, len(encoded.masks)) == (2, 1)


def test_a_users_mask_token_does_not_disturb_the_batch(
    bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    made = scorer(tokenizer)
    tricky = [{"text": "a [MASK] b [MASK]"}, {"text": "film"}]
    together = made.scores(bert, tricky)
    torch.testing.assert_close(together[1:], made.scores(bert, tricky[1:]), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_asked_is_an_error_at_once(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="has no"):
        scorer(tokenizer, "{text}")
    with pytest.raises(ConfigError, match="MultiMaskScorer"):
        scorer(tokenizer, "{text} {mask*}")
    with pytest.raises(ConfigError, match="tokens to this tokenizer"):
        scorer(tokenizer, verbalizer=Verbalizer({"a": "goodly", "b": "bad"}))


def test_its_description_is_the_same_scorer(bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    made = scorer(tokenizer, max_length=24, demonstration_tokens=5)
    again = scorer_from_dict(made.to_dict(), tokenizer)
    assert again.to_dict() == made.to_dict()
    assert torch.equal(again.scores(bert, rows()), made.scores(bert, rows()))
