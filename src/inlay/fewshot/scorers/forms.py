"""Which form of a pretrained model speaks, and how it is asked with a template.

An encoder with a masked-language-model head fills in a mask; a decoder, and an encoder with a decoder, choose.
"""

from __future__ import annotations

from typing import Any, Literal

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from inlay.errors import ConfigError
from inlay.fewshot.base import Base
from inlay.fewshot.problem import Problem
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.scorers.choice import ChoiceScorer
from inlay.fewshot.scorers.scorer import Scorer

Form = Literal["masked-lm", "causal-lm", "seq2seq"]


def form_of(base: Base) -> Form:
    """How the model speaks, by its config. Raises ConfigError when there is none."""
    try:
        config: Any = AutoConfig.from_pretrained(base.source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no config.json can be read from {base.source}: {str(error).splitlines()[0]}") from error
    if config.is_encoder_decoder:
        return "seq2seq"
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return "masked-lm" if masked else "causal-lm"


def asked(problem: Problem, template: Template, **options: Any) -> Scorer:
    """The template's scorer for this problem's model; `options` are a choice scorer's (length_norm, direction).

    Raises ConfigError for options other than the defaults where a mask is filled in.
    """
    form = form_of(problem.base)
    if form != "masked-lm":
        return ChoiceScorer(
            tokenizer=problem.base.tokenizer, template=template, verbalizer=problem.verbalizer,
            max_length=problem.max_length, auto=form, **options,
        )  # fmt: skip
    for name, plain in (("direction", "direct"), ("length_norm", 1.0)):
        if options.get(name, plain) != plain:
            raise ConfigError(
                f"{name}={options[name]!r} is for models that write, and {problem.base.source} fills in masks: "
                "leave it out, or choose a decoder or a T5-like model"
            )
    return problem.mask_scorer(template)
