"""What LM-BFF's two searches try on a problem: pairs of a template and a verbalizer, found once and kept as a stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inlay.errors import ConfigError
from inlay.fewshot.base import Base
from inlay.fewshot.problem import Problem
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer, word_tokens
from inlay.fewshot.scorers.mask import MaskScorer
from inlay.fewshot.searches.label_search import Near, search_labels, vocabulary_scores, word_starts
from inlay.fewshot.searches.template_search import forms_for, search_templates
from inlay.fewshot.stages import Stages


@dataclasses.dataclass(frozen=True)
class Prompting:
    """A template and the words to answer it with."""

    template: Template
    verbalizer: Verbalizer

    def to_json(self) -> list[Any]:
        """As a stage's note keeps it."""
        return [self.template.source, {label: list(words) for label, words in self.verbalizer.words.items()}]


def given(problem: Problem) -> list[Prompting]:
    """The problem's own templates and words."""
    return [Prompting(template, problem.verbalizer) for template in problem.templates]


def found_labels(
    problem: Problem, stages: Stages, *, k: int = 100, n: int = 100, near: int | None = None, budget: int = 1_000_000
) -> list[Prompting]:
    """The n best combinations of label words, as many for each template; `near`: of the given words' neighbours."""
    each = max(1, n // len(problem.templates))

    def search(folder: Path) -> dict[str, Any]:
        found = []
        for template in problem.templates:
            verbalizers = _words(problem, template, k=k, n=each, near=near, budget=budget)
            found += [Prompting(template, verbalizer) for verbalizer in verbalizers]
        return {"prompts": [one.to_json() for one in found]}

    return _read(stages.once("search-labels", search, k=k, n=n, near=near, budget=budget))


def found_templates(
    problem: Problem, stages: Stages, generator: str, *, n: int = 100, beam: int = 100
) -> list[Prompting]:
    """The problem's own templates, then the n that the generator, a folder or hub id, writes."""

    def search(folder: Path) -> dict[str, Any]:
        writer = Base(generator, problem.base.dtype, problem.base.device)
        written = search_templates(
            writer.model("seq2seq"), writer.tokenizer, problem.train.rows,
            [problem.verbalizer.spoken(label) for label in problem.train.labels], forms_for(problem.text.columns),
            n=n, beam=beam, max_length=problem.max_length,
        )  # fmt: skip
        templates = dict.fromkeys((*problem.templates, *(one for one in written if _fits(problem, one))))
        return {"prompts": [Prompting(one, problem.verbalizer).to_json() for one in templates]}

    return _read(stages.once("search-templates", search, generator=generator, n=n, beam=beam))


def _fits(problem: Problem, template: Template) -> bool:
    """Whether the given words are words there: behind what was found they may be cut otherwise."""
    try:
        problem.mask_scorer(template)
    except ConfigError:
        return False
    return True


def _words(
    problem: Problem, template: Template, *, k: int, n: int, near: int | None, budget: int
) -> Sequence[Verbalizer]:
    tokenizer = problem.base.tokenizer
    candidates = word_starts(tokenizer, template)
    some = dict(zip(problem.labels, candidates.values(), strict=False))  # any words: the whole vocabulary is read
    scorer = MaskScorer(
        tokenizer=tokenizer, template=template, verbalizer=Verbalizer(some), max_length=problem.max_length
    )
    model = problem.base.model(scorer.auto)
    scores = vocabulary_scores(model, scorer, problem.train.rows)
    neighbours = None
    if near is not None:
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        own = {
            label: word_tokens(words[0], tokenizer, template.before_mask())[0]
            for label, words in problem.verbalizer.words.items()
        }
        neighbours = Near(head.weight.detach().cpu(), own, near)
    return search_labels(
        scores, problem.train.labels, candidates, k, n, labels=problem.labels, near=neighbours, budget=budget,
        seed=problem.seed,
    )  # fmt: skip


def _read(note: dict[str, Any]) -> list[Prompting]:
    return [Prompting(Template(source), Verbalizer(words)) for source, words in note["prompts"]]
