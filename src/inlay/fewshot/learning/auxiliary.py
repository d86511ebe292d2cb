"""Masked language modelling beside the labels, so that a few rows do not make the model forget its language.

    loss = (1 − a) · CrossEntropy + a · MLM(P(u)),   a = 1e-4        u: unlabelled rows, put into the same pattern P

Schick & Schütze 2021, arXiv:2001.07676, section 3.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from inlay.errors import ConfigError, DataError
from inlay.fewshot.learning.objectives import Objective, Step
from inlay.fewshot.prompts.template import Row
from inlay.fewshot.scorers.scorer import MODEL_INPUTS, Batch, on
from inlay.tasks.head_positions import head_at


@dataclasses.dataclass(frozen=True)
class AuxiliaryMaskedLM(Objective):
    """The mean cross-entropy of hidden tokens of unlabelled rows, `ratio` of them for each labelled row of the step.

    Each token is chosen with `probability`, one in each row at least; 80% of the chosen become the mask token, 10% a
    random one, 10% stay (Devlin et al. 2019, arXiv:1810.04805). Never chosen: padding, special tokens, soft slots, and
    the pattern's own mask, which stands for a label that is not known. Everything is drawn from the step's generator.
    """

    rows: Sequence[Row] = dataclasses.field(repr=False)
    ratio: int = 3
    probability: float = 0.15

    def __post_init__(self) -> None:
        if not self.rows:
            raise ConfigError("the auxiliary masked language model reads unlabelled rows, and there are none")
        if not isinstance(self.ratio, int) or isinstance(self.ratio, bool) or self.ratio < 1:
            raise ConfigError(
                f"ratio={self.ratio!r}: a whole number of unlabelled rows for each labelled one is needed"
            )
        if not 0 < self.probability <= 1:
            raise ConfigError(f"probability={self.probability!r}: the share of hidden tokens lies above 0 and up to 1")

    @override
    def __call__(self, step: Step) -> Tensor:
        if step.scorer.auto != "masked-lm":
            raise ConfigError(f"an auxiliary masked language model needs one, and this model is a {step.scorer.auto}")
        batch, chosen, labels = self.hidden(step)
        device = step.batch["input_ids"].device
        with head_at(step.model, chosen.to(device)):
            logits = step.model(**on(device, {name: batch[name] for name in MODEL_INPUTS})).logits[:, 0]
        return functional.cross_entropy(logits.float(), labels.to(device))

    def hidden(self, step: Step) -> tuple[Batch, Tensor, Tensor]:
        """A step's unlabelled batch with hidden tokens, which tokens are to be guessed, and what they were.

        The batch, the chosen (rows, tokens), their ids (n,). Raises DataError when no row has a token to choose.
        """
        tokenizer, generator = step.scorer.tokenizer, step.generator
        count = min(self.ratio * len(step.encoded), len(self.rows))
        drawn = torch.randperm(len(self.rows), generator=generator)[:count].tolist()
        batch = step.scorer.collate(step.scorer.encode([self.rows[index] for index in drawn]))
        ids = batch["input_ids"]
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))  # the pattern's mask is one of them
        barred = special | (ids >= len(tokenizer)) | (batch["attention_mask"] == 0)
        dice = torch.rand(ids.shape, generator=generator).masked_fill(barred, 2.0)
        lowest = torch.zeros_like(barred).scatter(1, dice.argmin(1, keepdim=True), True)
        chosen = ((dice < self.probability) | lowest) & ~barred
        if not chosen.any():
            raise DataError("the unlabelled rows hold no words to hide: leave empty rows out")
        fate = torch.rand(ids.shape, generator=generator)
        random = torch.randint(len(tokenizer), ids.shape, generator=generator)
        shown = torch.where(chosen & (fate < 0.8), torch.tensor(tokenizer.mask_token_id), ids)
        return {**batch, "input_ids": torch.where(chosen & (fate >= 0.9), random, shown)}, chosen, ids[chosen]
