"""`fewshot(run)`: the same few-shot system on several splits, measured, kept, and taken up where it was stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from inlay.engine.field_types import check_fields
from inlay.engine.registry import make_method
from inlay.errors import ConfigError, DataError, InlayError, TrainingError
from inlay.fewshot.agreement import agreement_of_run
from inlay.fewshot.base import Base
from inlay.fewshot.baseline import NAME, in_context
from inlay.fewshot.embedded import embedded_model
from inlay.fewshot.flops import cost
from inlay.fewshot.groups import Groups
from inlay.fewshot.learning.fitting import Recipe
from inlay.fewshot.problem import Labelled, Problem, System
from inlay.fewshot.progress import EachStep, Progress, unwatched
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.report import Report, SeedResult
from inlay.fewshot.run import RUN_FILE, FewShotRun
from inlay.fewshot.saved import SOLUTION_FILE, no_label, seed_folder
from inlay.fewshot.splits import Split, few_shot_split
from inlay.fewshot.stages import Stages
from inlay.fewshot.systems import system_class
from inlay.tasks import columns as named_columns
from inlay.tasks.class_metrics import single_label_scores
from inlay.tasks.data import read_splits, source_name
from inlay.tasks.labels import check_known, label_name, sort_labels
from inlay.train.arguments import default_learning_rate
from inlay.train.files import write_json, write_text
from inlay.train.record import duration
from inlay.train.settings import known_only

COSTED = 8
"""Rows on which the cost of an answer is counted."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """A run with its rows read and everything checked that can be before training."""

    run: FewShotRun
    system: System
    base: Base
    labels: tuple[str, ...]
    label: str
    """The column of the labels."""
    train: Dataset
    unlabelled: Dataset | None
    test: Dataset | None
    templates: tuple[Template, ...]
    verbalizer: Verbalizer
    text: Template
    recipe: Recipe
    groups: Groups | None

    def problem(self, split: Split, seed: int) -> Problem:
        """The problem of one seed."""
        rows = self.train.to_list()
        named = [label_name(row[self.label]) for row in rows]

        def labelled(numbers: Sequence[int]) -> Labelled:
            return Labelled(rows=[rows[index] for index in numbers], labels=[named[index] for index in numbers])

        unlabelled = self.unlabelled.to_list() if self.unlabelled is not None else [rows[i] for i in split.rest]
        if self.groups is not None:
            unlabelled = self.groups.without(unlabelled, split)
        order = torch.randperm(len(unlabelled), generator=torch.Generator().manual_seed(seed)).tolist()
        return Problem(
            base=self.base,
            labels=self.labels,
            train=labelled(split.train),
            dev=labelled(split.dev) if split.dev else None,
            unlabelled=[_hidden(unlabelled[index], self.label) for index in order[: self.run.unlabelled_rows]],
            templates=self.templates,
            verbalizer=self.verbalizer,
            text=self.text,
            methods=tuple(_methods(self.run, self.system)),
            recipe=self.recipe,
            seed=seed,
            max_length=self.run.max_length,
        )


def fewshot(
    run: FewShotRun,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
    progress: bool = False,
) -> Report:
    """Run a few-shot system once for each seed. Left in `run.out`: fewshot.yaml, a folder for each seed with its
    stages and solution, record.json, README.md and, of several measured seeds, seeds.svg.

    `resume` goes on behind the last stage that was finished; `overwrite` replaces an earlier run. `progress` shows
    stages and steps on standard error; `say` is told of the stages instead. Raises ConfigError and DataError before
    anything is trained for what cannot work, TrainingError when a loss is no number.
    """
    shown = Progress()
    say = say or (shown.say if progress else lambda line: None)
    out = Path(run.out)
    _check_room(run, out, resume, overwrite)
    ready = prepare(run)
    splits = {seed: _split(ready, seed) for seed in run.seeds}
    if overwrite and not resume and out.is_dir():
        shutil.rmtree(out)  # now that nothing that can be checked keeps the new run from starting
    write_text(out / RUN_FILE, run.to_yaml())
    results = []
    with _nothing_left_of_no_start(out, resume):
        for number, seed in enumerate(run.seeds):
            begun, which = time.monotonic(), f"seed {seed} ({number + 1} of {len(run.seeds)})"
            say(which)
            stages = Stages(
                seed_folder(out, seed) / "stages",
                lambda line: say(f"  {line}"),
                functools.partial(_watched, shown, which) if progress else unwatched,
            )
            results.append(_solved(ready, splits[seed], seed, out, stages))
            figures = ", ".join(f"{name} {value:.4f}" for name, value in results[-1].test.items())
            took = duration(time.monotonic() - begun)
            say(f"seed {seed}: {figures or 'no labelled test rows to measure on'}  {took}")
    report = Report.of(run, ready.labels, results, _agreement(ready, out))
    report.write(out)
    return report


def prepare(run: FewShotRun) -> Ready:
    """Read the rows and make everything of the run that can be wrong. Trains nothing."""
    kind = run.method["kind"]
    fields = {name: value for name, value in run.method.items() if name != "kind"}
    chosen = system_class(kind)
    known = [field.name for field in dataclasses.fields(chosen)]  # type: ignore[arg-type]
    known_only(fields, known, f"method {kind}")
    check_fields(chosen, fields, f"method {kind}")
    system = chosen(**fields)
    templates = tuple(Template(source) for source in run.templates)
    splits = dict(read_splits(run.train))
    if run.test is not None:
        splits["test"] = _one(run.test)
    unlabelled = _one(run.unlabelled) if run.unlabelled is not None else None
    train = splits.get("train")
    if train is None:
        raise DataError(f"{run.train} has no rows to train on: give --train FILE")
    label = run.label or named_columns.named(train, named_columns.LABEL)
    if label is None or label not in train.column_names:
        raise no_label(train, label)
    labels, verbalizer = _labels(run, train, label)
    text = Template(run.text) if run.text is not None else _text(templates, train, label)
    for rows in (train, splits.get("test"), unlabelled):
        for template in (*templates, text) if rows is not None else ():
            template.check(rows)
    _check_labels(splits.get("test"), labels, label)
    if system.asks and not templates:
        raise ConfigError(
            f"{kind} asks the model by templates, and there are none: give --template '{{text}} …{{mask}}'"
        )
    source = str(embedded_model()) if run.model is None else run.model
    ready = Ready(
        run=run, system=system, base=Base(source, run.dtype, load=run.load), labels=labels, label=label, train=train,
        unlabelled=unlabelled, test=splits.get("test"), templates=templates, verbalizer=verbalizer, text=text,
        recipe=_recipe(run, system), groups=_groups(run, system, train, splits.get("test")),
    )  # fmt: skip
    if run.find_words is None:
        system.check(ready.problem(Split((), (), (), 0, 0, run.per), 0))
    else:  # the words are not there yet
        for template in templates:
            template.need_mask()
    return ready


@contextlib.contextmanager
def _nothing_left_of_no_start(out: Path, resume: bool) -> Iterator[None]:
    """Where rows or settings turn out to fail before a stage is finished, the run never began, and its folder goes."""
    try:
        yield
    except InlayError as error:
        if not (resume or isinstance(error, TrainingError) or Stages(out).notes()):
            shutil.rmtree(out, ignore_errors=True)
        raise


def _agreement(ready: Ready, out: Path) -> Mapping[str, Any] | None:
    """How far the seeds agree on the test rows, where there are several seeds, and test rows."""
    return agreement_of_run(out).to_dict() if ready.test is not None and len(ready.run.seeds) > 1 else None


def _watched(shown: Progress, which: str, name: str, steps: int) -> AbstractContextManager[EachStep]:
    return shown.watch(f"{which}, {name}", steps)


def _solved(ready: Ready, split: Split, seed: int, out: Path, stages: Stages) -> SeedResult:
    """One seed: the system's stages, its solution written, its test scores."""
    folder = seed_folder(out, seed)
    problem = ready.problem(split, seed)
    words = None if ready.run.find_words is None else _found_words(problem, ready.run.find_words, stages)
    if words is not None:
        problem = dataclasses.replace(problem, verbalizer=Verbalizer(words))
        stages.say("; ".join(f"{label}: {', '.join(listed)}" for label, listed in words.items()))
    solution = ready.system.solve(problem, stages)
    write_json(folder / SOLUTION_FILE, {**solution.to_dict(folder), "labels": list(ready.labels)})
    test: dict[str, float] = {}
    baseline = None
    if ready.test is not None:
        rows = ready.test.to_list()
        scores = stages.tensor("test-scores", lambda: solution.scores(ready.base, rows), rows=len(rows))
        if ready.label in ready.test.column_names:
            true = np.array([ready.labels.index(label_name(row[ready.label])) for row in rows])
            test = single_label_scores(scores.argmax(-1).numpy(), true)
            if ready.run.baseline and ready.system.kind != "icl":
                baseline = in_context(problem, rows, true, stages, COSTED)
    some = (ready.test if ready.test is not None else ready.train).to_list()[:COSTED]
    price = stages.once("cost", lambda folder: dataclasses.asdict(cost(solution, ready.base, some)))
    notes = {name: note for name, note in stages.notes().items() if not name.startswith(f"{NAME}/")}
    return SeedResult(
        seed=seed,
        split={**split.to_dict(), **({"groups": ready.groups.to_dict(split)} if ready.groups is not None else {})},
        test=test,
        words=words,
        seconds=round(sum(note["seconds"] for note in notes.values()), 3),
        trainable_parameters=max((note.get("trainable_parameters", 0) for note in notes.values()), default=0),
        flops=price["flops"],
        tokens=price["tokens"],
        adapters=sum("trainable_parameters" in note for note in notes.values()),
        stages={name: note["seconds"] for name, note in notes.items()},
        baseline=baseline,
    )


def _found_words(problem: Problem, count: int, stages: Stages) -> dict[str, list[str]]:
    """The words of each label that PETAL's search finds on the labelled rows."""
    from inlay.fewshot.searches.word_search import find_words

    def look(folder: Path) -> dict[str, Any]:
        found = find_words(
            problem.base, problem.templates, problem.train.rows, problem.train.labels, problem.unlabelled,
            per_label=count, max_length=problem.max_length,
        )  # fmt: skip
        return {"words": {label: list(found.words[label]) for label in problem.labels}}

    words: dict[str, list[str]] = stages.once("words", look, count=count)["words"]
    return words


def _split(ready: Ready, seed: int) -> Split:
    """The rows of a seed. Raises DataError where there are fewer than shots."""
    named = [label_name(value) for value in ready.train[ready.label]]
    run, dev = ready.run, ready.run.dev if ready.run.dev is not None else ready.system.dev
    groups = ready.groups.train if ready.groups is not None else None
    apart = ready.groups.test if ready.groups is not None else frozenset[str]()
    free = [index for index in range(len(named)) if groups is None or groups[index] not in apart]
    if not free:
        raise DataError(
            f"every row of {source_name(ready.train)} has the {run.group_column} of a test row: nothing is left to draw"
        )
    if run.shots is None:
        order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed)).tolist()
        return Split(tuple(free[place] for place in order), (), (), seed, len(free), "total")
    if run.shots == 0:
        return Split((), (), tuple(free), seed, 0, run.per)
    return few_shot_split(named, run.shots, per=run.per, dev=dev, seed=seed, groups=groups, apart=apart)  # type: ignore[arg-type]


def _groups(run: FewShotRun, system: System, train: Dataset, test: Dataset | None) -> Groups | None:
    """The rows' groups. Raises ConfigError where there is one side of rows alone."""
    if run.group_column is None:
        return None
    chosen_by = (run.dev if run.dev is not None else system.dev) if run.shots else 0
    if test is None and not chosen_by:
        raise ConfigError(
            f"--group-column {run.group_column} keeps rows apart, and there are training rows alone: give --test FILE, "
            "or rows to choose by (shots, and dev=N)"
        )
    return Groups.read(run.group_column, train, test)


def _labels(run: FewShotRun, train: Dataset, label: str) -> tuple[tuple[str, ...], Verbalizer]:
    found = sort_labels(label_name(value) for value in named_columns.values(train, label, "label"))
    if len(found) < 2:
        raise DataError(f"{source_name(train)} has one label alone, {found[0]!r}: at least two are needed")
    verbalizer = Verbalizer(run.verbalizer) if run.verbalizer else Verbalizer({name: name for name in found})
    order = tuple(name for name in verbalizer.labels if name in found) if run.verbalizer else found
    order = (*order, *(name for name in found if name not in order))
    return order, verbalizer.for_labels(order)


def _check_labels(rows: Dataset | None, labels: tuple[str, ...], label: str) -> None:
    if rows is not None and label in rows.column_names:
        found = [[label_name(value)] for value in named_columns.values(rows, label, "label")]
        check_known(found, labels, rows, "test", from_train=True)


def _text(templates: Sequence[Template], train: Dataset, label: str) -> Template:
    """What a head reads where nothing is said: the templates' columns in order, or the one column of text."""
    columns = list(dict.fromkeys(column for template in templates for column in template.columns))
    if not columns:
        columns = [named_columns.guess_text(train, without=[label])]
    return Template("{sep}".join(f"{{{column}}}" for column in columns))


def _methods(run: FewShotRun, system: System) -> list[Any]:
    entries = run.peft if run.peft is not None else system.peft
    return [make_method(entry["kind"], {k: v for k, v in entry.items() if k != "kind"}) for entry in entries]


def _recipe(run: FewShotRun, system: System) -> Recipe:
    known = [field.name for field in dataclasses.fields(Recipe)]
    known_only(run.recipe, known, "recipe")
    methods = _methods(run, system)
    rate = {"learning_rate": default_learning_rate(methods)} if methods else {}
    own = dict(system.recipe) if run.peft is None else {k: v for k, v in system.recipe.items() if k != "learning_rate"}
    return Recipe(**{**rate, **own, **run.recipe})


def _one(path: str) -> Dataset:
    """The rows of a file. Raises DataError where there are none."""
    splits = read_splits(path)
    return next(splits[name] for name in ("test", "train", "validation") if name in splits)


def _hidden(row: Mapping[str, Any], label: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != label}


def _check_room(run: FewShotRun, out: Path, resume: bool, overwrite: bool) -> None:
    """Raise ConfigError where a new run would mix with something else, or an earlier one that is not to be replaced."""
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if out.is_file():
        raise ConfigError(f"--out {out} is a file; it has to be a folder")
    if resume:
        if RUN_FILE not in there:
            raise TrainingError(f"there is no few-shot run in {out} to resume: leave --resume out to start one")
        stored = FewShotRun.from_yaml(out / RUN_FILE).to_dict()
        changed = [
            key for key, value in run.to_dict().items() if key not in ("out", "seeds") and stored.get(key) != value
        ]
        if changed:
            raise ConfigError(
                f"--resume goes on with the run in {out}, where {changed[0]} is {stored.get(changed[0])!r}: leave the "
                "setting out, or start a new run with another --out"
            )
        return
    if there and RUN_FILE not in there:
        raise ConfigError(f"{out} holds {', '.join(there[:5])}, which no few-shot run left there: choose another --out")
    if there and not overwrite:
        raise ConfigError(
            f"{out} already holds a few-shot run: choose another --out, --overwrite to replace it, or --resume to go on"
        )
