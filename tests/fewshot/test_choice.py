"""Choices scored by models that write: planted distributions, and tiny random models read in every possible way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fewshot.writers import WORDS, Planted, bart, byte_pieces, gpt2, gpt_neo, llama, mistral, opt, t5, whole_words
from transformers import PreTrainedTokenizerFast

import inlay
from inlay.errors import ConfigError, DataError
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.choice import ChoiceScorer
from inlay.fewshot.scorers.continuations import causal_log_probs, reads_prompt_once, seq2seq_log_probs
from inlay.fewshot.scorers.kinds import scorer_from_dict

ROWS = [{"text": text} for text in ("a b c d", "a movie", "film plot a e d c b a", "b")]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """Whole words, a beginning and no end."""
    return whole_words(["<s>", "$A"])


@pytest.fixture(scope="module")
def ended() -> PreTrainedTokenizerFast:
    """Whole words and an end, as T5's."""
    return whole_words(["$A", "</s>"])


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    return byte_pieces()


def scorer(tokenizer: PreTrainedTokenizerFast, template: str = "{text} It was {mask}.", **options: Any) -> ChoiceScorer:
    given = options.pop("words", {"neg": "bad", "pos": "really good"})
    return ChoiceScorer(tokenizer=tokenizer, template=Template(template), verbalizer=Verbalizer(given), **options)


def test_the_score_is_the_planted_log_probability(words: PreTrainedTokenizerFast) -> None:
    table = torch.randn(len(WORDS), len(WORDS), generator=torch.Generator().manual_seed(0))
    log, at = table.log_softmax(-1), WORDS.index
    one, two = log[at("was"), at("bad")], log[at("was"), at("really")] + log[at("really"), at("good")]
    model: Any = Planted(table)
    for norm in (0.0, 0.5, 1.0):
        found = scorer(words, length_norm=norm).scores(model, ROWS)
        expected = torch.stack([one, two / 2**norm]).detach().expand(len(ROWS), 2)
        torch.testing.assert_close(found, expected)


def test_a_token_that_all_choices_repeat_changes_the_sum_but_not_the_mean(words: PreTrainedTokenizerFast) -> None:
    """Where every token is as likely as every other, a choice's sum grows with its length and its mean does not."""
    model: Any = Planted(torch.zeros(len(WORDS), len(WORDS)))
    short = {"neg": "bad", "pos": "good"}
    long = {"neg": "bad bad", "pos": "good good"}
    mean = [scorer(words, words=given).scores(model, ROWS) for given in (short, long)]
    total = [scorer(words, words=given, length_norm=0.0).scores(model, ROWS) for given in (short, long)]
    torch.testing.assert_close(mean[0], mean[1])
    torch.testing.assert_close(2 * total[0], total[1])


def test_the_prompt_is_what_stands_before_the_mask(words: PreTrainedTokenizerFast) -> None:
    shown = scorer(words).encode([ROWS[0]], [[({"text": "e"}, "pos")]])[0]
    assert words.decode(shown.ids) == "<s> e It was really good . a b c d It was"
    plain = scorer(words, "{text} It was").encode([ROWS[0]])[0]
    assert plain.ids == scorer(words).encode([ROWS[0]])[0].ids
    ended = scorer(whole_words(["<s>", "$A", "</s>"])).encode([ROWS[0]])[0]
    assert ended.ids == plain.ids, "an end-of-text token behind a prompt ends it"


def test_pieces_of_words_are_cut_as_in_the_whole_text(pieces: PreTrainedTokenizerFast) -> None:
    made = scorer(pieces, words={"neg": "terrible", "pos": "great"})
    prompt = made.encode([{"text": "the movie"}])[0].ids
    for word, ids in zip(("terrible", "great"), made.choices, strict=True):
        assert [*prompt, *ids] == pieces(f"the movie It was {word}")["input_ids"]
    assert len(made.choices[0]) > 1
    lines = scorer(pieces, "{text}\nIt was:\n{mask}", words={"neg": "bad", "pos": "good"})
    assert pieces.decode(lines.encode([{"text": "a"}])[0].ids) == "a\nIt was:\n"
    assert pieces.decode(lines.choices[0]) == "bad"


def test_an_empty_prompt_begins_with_the_begin_token(pieces: PreTrainedTokenizerFast) -> None:
    found = scorer(pieces, "{text} {mask}").encode([{"text": ""}])[0]
    assert found.ids == [pieces.eos_token_id]


@pytest.mark.parametrize("build", [llama, opt, mistral])
@pytest.mark.parametrize("direction", ["direct", "channel", "pmi"])
def test_a_batch_is_a_loop_over_rows_and_choices(build: Any, direction: Any, words: PreTrainedTokenizerFast) -> None:
    """Padding, batching and a shared prompt change nothing: float32 rounding is what is left."""
    template = "It was {mask}. {text}" if direction == "channel" else "{text} It was {mask}."
    model, made = build(len(WORDS)), scorer(words, template, direction=direction, length_norm=0.0)
    together, alone = made.scores(model, ROWS), made.scores(model, ROWS, batch_size=1)
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)

    def log_p(text: str, start: str) -> float:
        """By hand: the whole text in one pass, the tokens behind `start`."""
        ids, begun = torch.tensor(words(text)["input_ids"]), len(words(start)["input_ids"])
        with torch.no_grad():
            log = model(ids[None]).logits[0].log_softmax(-1)
        return log[torch.arange(begun - 1, len(ids) - 1), ids[begun:]].sum().item()

    for row, scores in zip(ROWS, together, strict=True):
        text = row["text"]
        if direction == "channel":
            expected = [log_p(f"It was {word}. {text}", f"It was {word}.") for word in ("bad", "really good")]
        else:
            expected = [log_p(f"{text} It was {word}", f"{text} It was") for word in ("bad", "really good")]
        if direction == "pmi":
            null = [log_p(f" It was {word}", " It was") for word in ("bad", "really good")]
            expected = [one - other for one, other in zip(expected, null, strict=True)]
        torch.testing.assert_close(scores, torch.tensor(expected), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "once"), [(llama, True), (gpt2, True), (opt, True), (mistral, False), (gpt_neo, False)]
)
def test_a_shared_prompt_changes_neither_scores_nor_gradients(
    build: Any, once: bool, words: PreTrainedTokenizerFast
) -> None:
    model, made = build(len(WORDS)), scorer(words, words={"neg": ["bad", "a b c"], "pos": "really good"})
    assert reads_prompt_once(model) is once, "a sliding window sees another part of the prompt at each place"
    batch = made.collate(made.encode(ROWS))
    given = [batch[name] for name in ("input_ids", "attention_mask", "choice_ids", "choice_mask")]
    found = []
    for share in (True, False) if once else (False, None):
        model.zero_grad()
        log = causal_log_probs(model, *given, share=share)
        log.sum().backward()
        found.append((log.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=2e-4, rtol=1e-3)


def test_adapters_on_weights_share_a_prompt_and_those_on_calls_do_not(words: PreTrainedTokenizerFast) -> None:
    model, made = llama(len(WORDS)), scorer(words)
    batch = made.collate(made.encode(ROWS))
    given = [batch[name] for name in ("input_ids", "attention_mask", "choice_ids", "choice_mask")]
    for method, shared in ((inlay.IA3(), True), (inlay.PromptTuning(num_virtual_tokens=3), False)):
        inlay.attach(model, method)
        assert reads_prompt_once(model) is shared
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
            several, single = made.scores(model, ROWS), [made.scores(model, [row]) for row in ROWS]
            apart = made.beta(causal_log_probs(model, *given, share=False), given[-1])
        torch.testing.assert_close(several, torch.cat(single), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(several, apart, atol=1e-4, rtol=1e-4)
        inlay.detach(model)


@pytest.mark.parametrize("build", [t5, bart])
def test_one_encoder_pass_serves_all_choices_and_the_end_counts(build: Any, ended: PreTrainedTokenizerFast) -> None:
    model, made = build(len(WORDS)), scorer(ended, auto="seq2seq", length_norm=0.0)
    calls = []
    model.get_encoder().register_forward_hook(lambda *_: calls.append(1))
    found = made.scores(model, ROWS)
    assert len(calls) == 1
    for row, scores in zip(ROWS, found, strict=True):
        ids = torch.tensor([ended(f"{row['text']} It was")["input_ids"]])
        for word, score in zip(("bad", "really good"), scores, strict=True):
            labels = torch.tensor([ended(word)["input_ids"]])
            assert labels[0, -1] == ended.eos_token_id
            with torch.no_grad():
                loss = model(input_ids=ids, labels=labels).loss  # the mean over the answer and its end
            torch.testing.assert_close(score, -loss * labels.shape[1], atol=2e-5, rtol=1e-5)
    batch = made.collate(made.encode(ROWS))
    given = [batch[name] for name in ("input_ids", "attention_mask", "choice_ids", "choice_mask")]
    torch.testing.assert_close(seq2seq_log_probs(model, *given, share=True),
                               seq2seq_log_probs(model, *given, share=False), atol=2e-5, rtol=1e-5)  # fmt: skip


def test_an_encoder_and_decoder_can_be_asked_for_the_example(ended: PreTrainedTokenizerFast) -> None:
    model, made = t5(len(WORDS)), scorer(ended, "It was {mask}. {text}", auto="seq2seq", direction="channel")
    found = made.scores(model, ROWS)
    torch.testing.assert_close(found, torch.cat([made.scores(model, [row]) for row in ROWS]), atol=2e-5, rtol=1e-5)
    ids = torch.tensor([ended("It was bad.")["input_ids"]])
    labels = torch.tensor([ended(ROWS[0]["text"])["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(found[0, 0], -model(input_ids=ids, labels=labels).loss, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("direction", ["direct", "pmi"])
def test_the_order_of_the_choices_is_the_order_of_the_scores(direction: Any, words: PreTrainedTokenizerFast) -> None:
    model = gpt2(len(WORDS))
    given = {"neg": ["bad", "terrible"], "pos": "really good", "so": "fine"}
    one = scorer(words, words=given, direction=direction).scores(model, ROWS)
    turned = scorer(words, words=dict(reversed(given.items())), direction=direction).scores(model, ROWS)
    torch.testing.assert_close(one, turned.flip(-1), atol=1e-5, rtol=1e-5)


def test_a_label_is_as_likely_as_its_likeliest_word(words: PreTrainedTokenizerFast) -> None:
    model = gpt2(len(WORDS))
    several = scorer(words, words={"neg": ["bad", "a b"], "pos": "good"}).scores(model, ROWS)
    each = [scorer(words, words={"neg": word, "pos": "good"}).scores(model, ROWS) for word in ("bad", "a b")]
    torch.testing.assert_close(several[:, 0], torch.maximum(each[0][:, 0], each[1][:, 0]), atol=1e-5, rtol=1e-5)


def test_channel_with_one_label_says_the_same_whatever_its_word_divides_by(words: PreTrainedTokenizerFast) -> None:
    """One label: its probability is one for every row; and a label's score is the example's, not the answer's."""
    made = scorer(words, "It was {mask}. {text}", words={"pos": "good"}, direction="channel")
    assert torch.equal(made.scores(gpt2(len(WORDS)), ROWS).softmax(-1), torch.ones(len(ROWS), 1))
    table = torch.zeros(len(WORDS), len(WORDS))
    planted: Any = Planted(table)
    torch.testing.assert_close(
        scorer(words, "It was {mask}. {text}", direction="channel").scores(planted, ROWS),
        torch.full((len(ROWS), 2), -math.log(len(WORDS))),
    )


@pytest.mark.parametrize("direction", ["direct", "channel", "pmi"])
def test_demonstrations_go_whole_until_prompt_and_answer_fit(direction: Any, words: PreTrainedTokenizerFast) -> None:
    template = "It was {mask}. {text}" if direction == "channel" else "{text} It was {mask}."
    shown = [({"text": "a a a"}, "pos"), ({"text": "b b b"}, "neg"), ({"text": "c c c"}, "pos")]
    counts = []
    for length in range(9, 41):
        made = scorer(words, template, direction=direction, max_length=length)
        row: Any = made.encode([ROWS[0]], [shown])[0]
        counts.append(row.demonstrations)
        for prompt, choices in row.pairs:
            assert all(len(prompt) + len(choice) <= length for choice in choices)
            text = words.decode(prompt)
            assert [f"{x} {x} {x}" in text for x in "abc"] == [at < row.demonstrations for at in range(3)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 3)


@pytest.mark.parametrize(("text", "shown"), [("a b c d e " * 9, []), ("b c d", [({"text": "a a"}, "pos")])])
def test_as_much_of_the_example_is_asked_for_behind_every_answer(
    text: str, shown: Any, words: PreTrainedTokenizerFast
) -> None:
    """channel: a text that is cut shorter would be likelier, and a long answer leaves it less room."""
    given = {"neg": "bad", "pos": "really really really good"}
    table: Any = Planted(torch.zeros(len(WORDS), len(WORDS)))  # all words are alike to it
    seen = set()
    for length in range(10, 30):
        made = scorer(
            words, "It was {mask}. {text}", words=given, direction="channel", max_length=length, length_norm=0.0
        )
        row: Any = made.encode([{"text": text}], [shown])[0]
        (example,) = {choices[0] for _, choices in row.pairs}
        assert max(len(prompt) for prompt, _ in row.pairs) + len(example) <= length
        seen.add((len(example), row.demonstrations))
        assert len({"a a" in words.decode(prompt) for prompt, _ in row.pairs}) == 1
        scores = made.scores(table, [{"text": text}], demonstrations=[shown])
        assert scores[0, 0] == scores[0, 1]
    assert len(seen) == (20 if not shown else 3)  # the demonstration and all of it; without; less of it


def test_each_row_is_compared_with_its_own_demonstrations_alone(words: PreTrainedTokenizerFast) -> None:
    """pmi: what an empty example says depends on what is shown before it."""
    model, made = gpt2(len(WORDS)), scorer(words, direction="pmi")
    shown = [[({"text": "a"}, "pos")], [({"text": "b"}, "neg")], [], [({"text": "a"}, "pos")]]
    together = made.scores(model, ROWS, demonstrations=shown)
    alone = [made.scores(model, [row], demonstrations=[own]) for row, own in zip(ROWS, shown, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-5)
    batch = made.collate(made.encode(ROWS, shown))
    assert len(batch["null_input_ids"]) == 3, "equal ones are asked once"


def test_what_is_saved_asks_the_same(words: PreTrainedTokenizerFast) -> None:
    made = scorer(words, direction="pmi", length_norm=0.5, max_length=64)
    again = scorer_from_dict(made.to_dict(), words)
    model = gpt2(len(WORDS))
    assert torch.equal(made.scores(model, ROWS), again.scores(model, ROWS))


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("{mask} was {text}", {}, "put the mask last"),
        ("{text} It was {mask}. {demos}", {}, "put the mask last"),
        ("{text} It was {mask}.", {"direction": "channel"}, "put the mask before the columns"),
        ("{text} {soft:2} {mask}", {}, "soft slots"),
        ("{text} {mask} {mask}", {}, "answers once"),
        ("{text} It was {mask}.", {"direction": "backwards"}, "direct, channel, pmi"),
        ("{text} It was {mask}.", {"words": {"neg": "unheard", "pos": "good"}}, "does not know"),
        ("{text} It was {mask}.", {"max_length": 2}, "raise max_length"),
    ],
)
def test_what_cannot_be_asked_is_said_at_once(
    template: str, options: Any, message: str, words: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match=message):
        scorer(words, template, **options).encode(ROWS)


def test_a_demonstration_of_a_label_that_nobody_knows(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="the label 'post'; did you mean 'pos'"):
        scorer(words).encode(ROWS[:1], [[({"text": "a"}, "post")]])
