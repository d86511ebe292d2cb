"""Templates written by a model that fills in blanks: T5, mT5, or any other with sentinel tokens.

    a <X> M(y) <Y>        <X> M(y) <Y> a        a <X> M(y) <Y> b          a, b: columns; M(y): the label's word

T5 was pretrained to say what stood at <X> and at <Y>. One text for each, t = (t_1, …, t_m), is decoded for all examples
together: a beam search over

    Σ_j Σ_{(x, y)} log p(t_j | t_1 … t_{j−1}, form(x, y))                       combine="logprob_sum" (the paper)
    Σ_j log softmax( mean_{(x, y)} logits(· | t_1 … t_{j−1}, form(x, y)) )      combine="logit_mean" (its code)

The latter is a normalised geometric mean: the same order within a step, another between texts. A template is the form
with the two texts in it and the mask in place of the word.

Gao et al. 2021, "Making Pre-trained Language Models Better Few-shot Learners", arXiv:2012.15723, section 5.2.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from inlay.errors import ConfigError, DataError
from inlay.fewshot.prompts.template import Row, Template
from inlay.tasks.batches import evaluating, pad_id

Combine = Literal["logprob_sum", "logit_mean"]
NUMBERS = 2**26
"""Logits, and states that they are computed from, at once."""
_STOPS = re.compile(r"[.。．]{2}|…")


@dataclasses.dataclass(frozen=True)
class Form:
    """What stands before the first blank and after the second, as templates say it; one of them may be empty."""

    before: str
    after: str = ""

    def texts(self, row: Row) -> tuple[str, str]:
        """Both sides for one example."""
        before, after = (str(Template(side).render(row)) if side else "" for side in (self.before, self.after))
        return before, after

    def template(self, first: str, second: str) -> Template:
        """The form with the blanks filled in; a space stands before the mask, so that a word of its own fits there."""
        first, second = (text.replace("{", "{{").replace("}", "}}") for text in (first, second))
        head = (self.before + first).strip()
        tail = second.rstrip() + (f" {self.after}" if self.after else "")
        return Template(f"{head} {{mask}}{tail}" if head else f"{{mask}}{tail}")


def forms_for(columns: Sequence[str]) -> tuple[Form, ...]:
    """The paper's forms for one column or a pair. Raises ConfigError for more, whose forms have to be given."""
    if len(columns) == 1:
        return Form(f"{{{columns[0]}}}"), Form("", f"{{{columns[0]}}}")
    if len(columns) == 2:
        return (Form(f"{{{columns[0]}|strip_punctuation}}", f"{{{columns[1]}|lower_first}}"),)
    raise ConfigError(f"templates are searched for one column or two, and there are {len(columns)}: say which forms")


@dataclasses.dataclass(frozen=True)
class Blanks:
    """What was found for the two blanks, as tokens, and its score."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    score: float


@dataclasses.dataclass(frozen=True)
class _Hypothesis:
    """The tokens so far: of one blank, or of both."""

    parts: tuple[tuple[int, ...], ...] = ((),)
    score: float = 0.0
    done: bool = False

    def count(self) -> int:
        return sum(len(part) for part in self.parts)


def search_templates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    words: Sequence[str],
    forms: Sequence[Form],
    *,
    n: int = 100,
    beam: int = 100,
    max_tokens: int = 20,
    max_length: int = 128,
    combine: Combine = "logprob_sum",
) -> list[Template]:
    """At most n templates, the best of each form in turn; `words`: each row's label word.

    `max_tokens` in both blanks together, `max_length` of what the encoder reads. Raises ConfigError for a tokenizer
    without sentinels, DataError when there are no rows.
    """
    if not rows:
        raise DataError("templates are written around labelled rows, and there are none: give at least one")
    filler = Filler(model, tokenizer, max_tokens, max_length, combine)
    by_form = []
    for form in forms:
        examples = [(*form.texts(row), word) for row, word in zip(rows, words, strict=True)]
        by_form.append([filler.template(form, blanks) for blanks in filler.search(examples, beam)])
    mixed = itertools.chain.from_iterable(itertools.zip_longest(*by_form))
    return list(dict.fromkeys(template for template in mixed if template is not None))[:n]


class Filler:
    """Fills two blanks for all examples at once. Examples are (text before, text after, the word between the blanks).

    Tokens that are no text, lone spaces, line ends and full stops in a row are never said.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int = 20,
        max_length: int = 128,
        combine: Combine = "logprob_sum",
    ) -> None:
        if combine not in ("logprob_sum", "logit_mean"):
            raise ConfigError(f"combine={combine!r}: either logprob_sum or logit_mean")
        self.model, self.tokenizer, self.combine = model, tokenizer, combine
        self.max_tokens, self.max_length = max_tokens, max_length
        self.sentinels = sentinels(tokenizer)
        start = getattr(model.config, "decoder_start_token_id", None)
        self.start: int = pad_id(tokenizer) if start is None else start

    @functools.cached_property
    def texts(self) -> dict[int, str]:
        """The tokens that may be said, and how they are spelled."""
        known = self.tokenizer
        special = {*known.all_special_ids, *(token for token in _sentinel_ids(known).values())}
        ids = [token for token in range(len(known)) if token not in special]
        spelled = known.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
        return {
            token: text.strip()
            for token, text in zip(ids, spelled, strict=True)
            if text.strip() and "\n" not in text and not _STOPS.search(text)
        }

    def template(self, form: Form, blanks: Blanks) -> Template | None:
        """The form with the blanks filled in; None where the tokens do not make readable text."""
        first, second = self._words(blanks.first), self._words(blanks.second)
        if "\ufffd" in first + second or _STOPS.search(first) or _STOPS.search(second):
            return None
        return form.template(first, second)

    def _words(self, ids: Sequence[int]) -> str:
        """Tokens as they are spelled behind a word, with the space before them where there is one."""
        stem: list[int] = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        alone, whole = (
            str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)) for tokens in (stem, [*stem, *ids])
        )
        return whole.removeprefix(alone)

    def inputs(self, before: str, after: str, word: str) -> list[int]:
        """What the encoder reads: before <X> word <Y> after, the longer text cut at its end where it is too long."""
        read = [list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (before, word, after)]
        told = [[token for token in ids if token not in self.sentinels] for ids in read]
        end = self.tokenizer.eos_token_id
        room = self.max_length - len(told[1]) - 2 - (end is not None)
        while len(told[0]) + len(told[2]) > max(room, 0):
            (told[0] if len(told[0]) > len(told[2]) else told[2]).pop()
        whole = [*told[0], self.sentinels[0], *told[1], self.sentinels[1], *told[2]]
        return whole if end is None else [*whole, int(end)]

    def search(self, examples: Sequence[tuple[str, str, str]], beam: int = 100) -> list[Blanks]:
        """The likeliest texts for both blanks, best first, at most `beam`."""
        with evaluating(self.model):
            encoded = self._encoded([self.inputs(*example) for example in examples])
            hypotheses = [_Hypothesis()]
            while not all(one.done for one in hypotheses):
                open_ones = [one for one in hypotheses if not one.done]
                grown = [one for one in hypotheses if one.done]
                for one, scores in zip(open_ones, self._next(open_ones, encoded), strict=True):
                    grown += self._continued(one, scores, beam)
                hypotheses = sorted(grown, key=lambda one: (-one.score, one.parts))[:beam]
        return [Blanks(one.parts[0], one.parts[1], one.score) for one in hypotheses]

    def _encoded(self, inputs: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The encoder's states (examples, tokens, hidden) and the mask (examples, tokens)."""
        longest, device = max(map(len, inputs)), next(self.model.parameters()).device
        ids = torch.full((len(inputs), longest), pad_id(self.tokenizer))
        mask = torch.zeros_like(ids)
        for number, row in enumerate(inputs):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        encoder: Any = self.model.get_encoder()
        states: Tensor = encoder(input_ids=ids.to(device), attention_mask=mask.to(device))[0]
        return states, mask.to(device)

    def _next(self, hypotheses: Sequence[_Hypothesis], encoded: tuple[Tensor, Tensor]) -> Tensor:
        """The combined scores of each hypothesis' next token, (hypotheses, vocabulary); all are of one length."""
        states, mask = encoded
        said = torch.tensor([self._decoder_ids(one) for one in hypotheses], device=states.device)
        vocabulary = getattr(self.model.config, "vocab_size", None) or len(self.tokenizer)
        at_once = max(1, NUMBERS // (len(states) * (said.shape[1] * vocabulary + states[0].numel())))
        found = []
        for start in range(0, len(said), at_once):
            chunk = said[start : start + at_once]
            logits: Tensor = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states.repeat(len(chunk), 1, 1)),
                attention_mask=mask.repeat(len(chunk), 1),
                decoder_input_ids=chunk.repeat_interleave(len(states), 0),
                use_cache=False,
            ).logits
            each = logits[:, -1].double().reshape(len(chunk), len(states), -1)
            sums = self.combine == "logprob_sum"
            found.append((each.log_softmax(-1).sum(1) if sums else each.mean(1).log_softmax(-1)).cpu())
        return torch.cat(found)

    def _decoder_ids(self, one: _Hypothesis) -> list[int]:
        later = [token for part in one.parts[1:] for token in (self.sentinels[1], *part)]
        return [self.start, self.sentinels[0], *one.parts[0], *later]

    def _continued(self, one: _Hypothesis, scores: Tensor, beam: int) -> list[_Hypothesis]:
        """The hypothesis with its next token, or its part ended; at most `beam` likeliest tokens."""
        *others, part = one.parts
        if others:
            ends = [self.sentinels[2], *([] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id])]
            best = float(max(scores[end] for end in ends))
            grown = [_Hypothesis(one.parts, one.score + best, done=True)]
        else:
            grown = [_Hypothesis((part, ()), one.score + float(scores[self.sentinels[1]]))]
        if one.count() < self.max_tokens:
            stop = bool(part) and self.texts[part[-1]].endswith((".", "。", "．"))
            allowed = self._after_stop if stop else self._sayable
            best_scores, places = scores[allowed].topk(min(beam, len(allowed)))
            grown += [
                _Hypothesis((*others, (*part, token)), one.score + score)
                for token, score in zip(allowed[places].tolist(), best_scores.tolist(), strict=True)
            ]
        return grown

    @functools.cached_property
    def _sayable(self) -> Tensor:
        return torch.tensor(sorted(self.texts), dtype=torch.int64)

    @functools.cached_property
    def _after_stop(self) -> Tensor:
        """What may be said behind a full stop."""
        said = (token for token, text in self.texts.items() if not text.startswith((".", "。", "．")))
        return torch.tensor(sorted(said), dtype=torch.int64)


def sentinels(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """The tokens <X>, <Y>, <Z>. Raises ConfigError when the tokenizer has none."""
    found = _sentinel_ids(tokenizer)
    if not {0, 1, 2} <= set(found):
        raise ConfigError(
            f"templates are written by a model that fills in blanks, such as T5: {type(tokenizer).__name__} has no "
            "tokens <extra_id_0>, <extra_id_1>, <extra_id_2>"
        )
    return found[0], found[1], found[2]


def _sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """Number -> token of each sentinel; mT5's begin with its sign for a space."""
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    named = ((re.search(r"<extra_id_(\d+)>$", token), token_id) for token, token_id in vocabulary.items())
    return {int(match[1]): token_id for match, token_id in named if match is not None}
