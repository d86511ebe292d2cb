"""What a few-shot system is given, and what every system is."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from inlay.engine.checkpoint import save
from inlay.engine.piece import Method
from inlay.errors import ConfigError
from inlay.fewshot.base import Base
from inlay.fewshot.learning.data_start import shown
from inlay.fewshot.learning.fitting import Demonstrator, Fit, Recipe, fit
from inlay.fewshot.learning.objectives import Objective
from inlay.fewshot.predictor import Predictor, Solution
from inlay.fewshot.progress import EachStep
from inlay.fewshot.prompts.soft_slots import with_slots
from inlay.fewshot.prompts.template import Row, Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.head import HeadScorer
from inlay.fewshot.scorers.mask import MaskScorer
from inlay.fewshot.scorers.multi_mask import MultiMaskScorer
from inlay.fewshot.scorers.scorer import Scorer
from inlay.fewshot.stages import Stages

ADAPTER = "adapter"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled:
    """Rows with their labels."""

    rows: Sequence[Row]
    labels: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)

    def __add__(self, other: Labelled) -> Labelled:
        return Labelled(rows=[*self.rows, *other.rows], labels=[*self.labels, *other.labels])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A few labelled rows, perhaps many unlabelled ones, a base model, and how to ask it.

    Raises ConfigError for a verbalizer that has not the labels, in whatever order.
    """

    base: Base
    labels: tuple[str, ...]
    train: Labelled
    templates: tuple[Template, ...]
    """The patterns, with masks (or, for choices, without)."""
    verbalizer: Verbalizer
    text: Template
    """What a classification head reads: the columns, without a mask."""
    methods: tuple[Method, ...]
    """The PEFT methods of an adapter."""
    recipe: Recipe
    dev: Labelled | None = None
    unlabelled: Sequence[Row] = ()
    seed: int = 0
    max_length: int = 128

    def __post_init__(self) -> None:
        # Scores come in the verbalizer's order and targets in the labels': one order for both.
        object.__setattr__(self, "verbalizer", self.verbalizer.for_labels(self.labels))

    def need_unlabelled(self, who: str) -> Sequence[Row]:
        """The unlabelled rows. Raises ConfigError where there are none."""
        if not self.unlabelled:
            raise ConfigError(f"{who} learns from unlabelled rows, and there are none: give --unlabeled FILE")
        return self.unlabelled

    def mask_scorer(self, template: Template, verbalizer: Verbalizer | None = None, **options: Any) -> Scorer:
        """A pattern's scorer: one pass where the template says how many masks, else filled in one after another."""
        fields = {"tokenizer": self.base.tokenizer, "template": template, "verbalizer": verbalizer or self.verbalizer,
                  "max_length": self.max_length, **options}  # fmt: skip
        if template.need_mask().masks is not None:
            return MaskScorer(**fields)
        return MultiMaskScorer(**fields)

    def head_scorer(self) -> HeadScorer:
        """The scorer of a classification head."""
        return HeadScorer(
            tokenizer=self.base.tokenizer, template=self.text, names=self.labels, max_length=self.max_length
        )

    def trained(
        self,
        stages: Stages,
        name: str,
        scorer: Scorer,
        data: tuple[Sequence[Row], Sequence[str] | Tensor] | None = None,
        *,
        objective: Objective | None = None,
        recipe: Recipe | None = None,
        demonstrator: Demonstrator | None = None,
        seed: int | None = None,
        methods: Sequence[Method] | None = None,
        start: str | Path | None = None,
        each_step: EachStep = lambda step, loss: None,
        depends: Mapping[str, Any] | None = None,
    ) -> Predictor:
        """A fresh adapter trained on `data` (by default the labelled rows) as a stage of the run, and kept there.

        `start`: a saved adapter whose values it has at first. Soft slots of the template are trained with it.
        `depends`: what else a stage that is there must have been made with, such as the demonstrations' settings.
        """
        rows, targets = data or (self.train.rows, self.train.labels)
        seed = self.seed if seed is None else seed
        recipe = recipe or self.recipe
        chosen = with_slots(self.methods if methods is None else methods, scorer)

        def make(folder: Path) -> dict[str, Any]:
            with (
                self.base.adapted(
                    scorer.auto, chosen, seed=seed, labels=len(self.labels), start=start,
                    prepare=functools.partial(self._shown, scorer, (rows, targets)),
                ) as model,
                stages.watch(name, recipe.steps) as watched,
            ):  # fmt: skip
                trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
                count = trained if recipe.steps else 0  # asked as it is: no training
                done: Fit = fit(
                    model, scorer, rows, targets, objective=objective, recipe=recipe, seed=seed,
                    demonstrator=demonstrator, each_step=_both(watched, each_step),
                )  # fmt: skip
                save(model, folder / ADAPTER)
            plain = objective is None and not isinstance(targets, Tensor)  # others have floors that are not 0
            if plain and (doubt := done.hardly_learned(len(self.labels))):
                stages.say(f"{name}: {doubt}")
            return {"trainable_parameters": count, "rows": len(rows), "losses": done.losses}

        stages.once(
            name, make, scorer=scorer.to_dict(), recipe=dataclasses.asdict(recipe), seed=seed,
            methods=[repr(method) for method in chosen], data=_digest(rows, targets),
            objective=repr(objective or scorer.objective()), **(depends or {}),
        )  # fmt: skip
        return Predictor(scorer=scorer, adapter=stages.folder / name / ADAPTER)

    def _shown(
        self,
        scorer: Scorer,
        data: tuple[Sequence[Row], Sequence[str] | Tensor],
        model: PreTrainedModel,
        methods: Sequence[Method],
    ) -> list[Method]:
        """The methods after a look at rows: the labelled ones, whatever an adapter learns from, where there are any.

        So an adapter that starts as another one has its places, whatever the rows, seed and recipe of its training.
        """
        seen = (self.train.rows, self.train.labels) if len(self.train) else data
        return shown(methods, model, scorer, *seen, batch_size=self.recipe.batch_size, seed=self.seed)


def _both(first: EachStep, second: EachStep) -> EachStep:
    """Tells the one, then the other."""

    def told(step: int, loss: float) -> None:
        first(step, loss)
        second(step, loss)

    return told


def _digest(rows: Sequence[Row], targets: Sequence[str] | Tensor) -> str:
    """A hash of the rows and of labels by name; probabilities come from stages before, which tell of changes."""
    named = None if isinstance(targets, Tensor) else list(targets)
    return hashlib.sha256(json.dumps([list(map(dict, rows)), named], default=str).encode()).hexdigest()[:16]


class System(abc.ABC):
    """A way to learn from few labels. Subclasses are frozen dataclasses in `systems/`, one file each."""

    kind: ClassVar[str]
    paper: ClassVar[str]
    asks: ClassVar[bool] = True
    """Whether it needs templates."""
    dev: ClassVar[int | str] = 0
    """How many rows to choose by it needs where the run says nothing ("same": as many as there are shots)."""
    peft: ClassVar[Sequence[Mapping[str, Any]]] = ({"kind": "lora", "r": 8, "targets": "attention,ffn"},)
    """The PEFT methods of an adapter where the run says nothing."""
    recipe: ClassVar[Mapping[str, Any]] = {}
    """What of `Recipe` it has otherwise, where the run says nothing."""

    def check(self, problem: Problem) -> None:
        """Raise ConfigError, before anything is trained, for what cannot work; `problem` has no labelled rows yet."""
        for template in problem.templates if self.asks else ():
            problem.mask_scorer(template)

    @abc.abstractmethod
    def solve(self, problem: Problem, stages: Stages) -> Solution:
        """Learn. Everything that takes long is a stage."""
