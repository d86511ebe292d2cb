"""A few-shot run as one frozen dataclass: what YAML, flags and Python all make. Costs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from inlay.engine.field_types import check_fields
from inlay.errors import ConfigError, did_you_mean
from inlay.tasks.quantised import check_load
from inlay.train import settings as read

RUN_FILE = "fewshot.yaml"
SEEDS = (13, 21, 42, 87, 100)
"""The splits that LM-BFF made the custom (Gao et al. 2021, arXiv:2012.15723); a sixth is 101, and so on."""
ALIASES = {
    **read.ALIASES,
    "template": "templates",
    "pattern": "templates",
    "patterns": "templates",
    "unlabeled": "unlabelled",
    "seed": "seeds",
    "train_file": "train",
    "test_file": "test",
    "groups": "group_column",
}
ALIASES = {name: field for name, field in ALIASES.items() if field not in ("task", "columns")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotRun:
    """What to learn from few labels, and how. Raises ConfigError for a setting that cannot be used."""

    train: str
    """The labelled rows: a file, or a folder or hub id with train and test splits."""
    method: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"kind": "prompt"})
    """The system's `kind` (standard, prompt, pet, …) and its own settings; a plain name will do."""
    templates: Sequence[str] = ()
    """The patterns, such as "{text} It was {mask}."."""
    verbalizer: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    """Label -> word or words; by default each label's own name."""
    find_words: int | None = None
    """So many words for each label are found for every split (PETAL's search) instead of given."""
    text: str | None = None
    """What a classification head reads, "{premise}{sep}{hypothesis}"; by default the templates' columns in order."""
    label: str | None = None
    """The column of the labels; guessed when None."""
    unlabelled: str | None = None
    """Rows without labels; by default the training rows that were not drawn, without their labels."""
    unlabelled_rows: int = 2000
    """How many of them to use at most."""
    test: str | None = None
    """The rows to measure on."""
    shots: int | None = None
    """How many labelled rows to draw, per class or in total; None: all there are; 0: none (zero-shot)."""
    per: str = "class"
    """Whether shots are counted per "class" or in "total"."""
    dev: int | str | None = None
    """Rows to choose by, per class or in total as shots are; "same": as many; None: as the system needs."""
    group_column: str | None = None
    """The column of what a row belongs to (an article, a speaker): no group stands on two sides of a split."""
    seeds: Sequence[int] = SEEDS[:1]
    """One split and training for each; a number means so many of them."""
    model: str | None = None
    """The base model, a folder or hub id; None: the embedded MiniLM."""
    peft: Sequence[Mapping[str, Any]] | None = None
    """The PEFT methods of every adapter (`inlay methods`), "full" for all parameters; None: the system's choice."""
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """How an adapter is trained: steps, batch_size, learning_rate, …; what is left out is the system's choice."""
    max_length: int = 128
    """Tokens of an example at most."""
    baseline: bool = True
    """Whether in-context learning is measured beside, on some of the test rows."""
    dtype: str = "float32"
    """Of the base model's weights."""
    load: str = "auto"
    """How the base is held: auto (as saved), 4bit (NF4, as in QLoRA) or 8bit; then dtype is what it computes in."""
    out: str = ""
    """The folder to leave everything in; by default runs/fewshot-<method>."""

    def __post_init__(self) -> None:
        method, peft = _with_kind(self.method, "method"), self.peft
        listed = peft if isinstance(peft, list | tuple) else [peft]
        templates = (self.templates,) if isinstance(self.templates, str) else self.templates
        fixed: dict[str, Any] = {
            **{name: str(value) for name, value in vars(self).items() if isinstance(value, Path)},
            "method": method,
            "templates": templates,
            "seeds": _seeds(self.seeds),
            "peft": None if peft is None else [_with_kind(entry, "peft") for entry in listed],
            "out": str(self.out or f"runs/fewshot-{method['kind']}"),
        }
        check_fields(FewShotRun, {**vars(self), **fixed}, "the run")
        fixed["templates"] = tuple(templates)
        fixed["verbalizer"] = {str(label): words for label, words in self.verbalizer.items()}
        for name, value in fixed.items():
            object.__setattr__(self, name, value)
        for name, low in (("shots", 0), ("find_words", 1), ("unlabelled_rows", 1), ("max_length", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name}={value!r}: a whole number of at least {low} is needed")
        if self.find_words is not None and self.verbalizer:
            raise ConfigError("find_words looks for the labels' words, and the verbalizer gives them: leave one out")
        if self.per not in ("class", "total"):
            raise ConfigError(f"per={self.per!r}: shots are counted per class or in total")
        check_load(self.load)
        if self.dtype not in (dtypes := ["float32", "bfloat16", "float16"]):
            raise ConfigError(f"dtype must be one of {', '.join(dtypes)}; got {self.dtype!r}")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], where: str = "the run") -> FewShotRun:
        """A run from plain settings, as YAML has them. Raises ConfigError naming the key."""
        settings = read.renamed(settings, ALIASES, where)
        names = [field.name for field in dataclasses.fields(cls)]
        for key in settings:
            if key not in names:
                raise ConfigError(
                    f"{where} has no setting {key!r}{did_you_mean(str(key), [*names, *ALIASES])}; it has: "
                    f"{', '.join(names)}"
                )
        if not settings.get("train"):
            raise ConfigError(
                f"{where} names no labelled rows: add `train:` to the file, or --train FILE (with shots: 0 its "
                "labels are only named, not learned from)"
            )
        return cls(**{key: value for key, value in settings.items() if value is not None})

    @classmethod
    def from_yaml(
        cls, path: str | Path | None, flags: Mapping[str, Any] | None = None, sets: Iterable[str] = ()
    ) -> FewShotRun:
        """A run from a YAML file (or none), then the flags that are given, then `a.b=value` overrides."""
        settings = read.renamed(read.read_yaml(path), ALIASES, str(path)) if path is not None else {}
        settings.update({key: value for key, value in (flags or {}).items() if value not in (None, [], {}, ())})
        if isinstance(settings.get("method"), str):
            settings["method"] = {"kind": settings["method"]}
        for assignment in sets:
            read.put(settings, assignment)
        return cls.from_settings(settings, str(path) if path is not None else "the run")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested settings that make this run again."""
        plain = dataclasses.asdict(self)
        plain["templates"], plain["seeds"] = list(self.templates), list(self.seeds)
        plain["verbalizer"] = {
            label: words if isinstance(words, str) else list(words) for label, words in self.verbalizer.items()
        }
        return {key: value for key, value in plain.items() if value is not None and value not in ({}, [])}

    def to_yaml(self) -> str:
        """The same as YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)


def _with_kind(entry: Any, setting: str) -> dict[str, Any]:
    """A method's settings, from a mapping or a plain name. Raises ConfigError for what is neither."""
    fields = {"kind": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
    if not isinstance(fields.get("kind"), str):
        raise ConfigError(f"{setting} must be a name, or a mapping with `kind:`; got {entry!r}")
    return fields


def _seeds(given: Any) -> tuple[int, ...]:
    """The seeds, from a list of them or from their number."""
    if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
        return tuple((*SEEDS, *range(101, 101 + given))[:given])
    if isinstance(given, list | tuple) and given and all(isinstance(s, int) and s >= 0 for s in given):
        if len(set(given)) < len(given):
            raise ConfigError(f"seeds={list(given)}: the same seed twice would be the same run twice")
        return tuple(given)
    raise ConfigError(f"seeds={given!r}: a number of them, or a list such as [13, 21], is needed")


def is_few_shot(folder: str | Path) -> bool:
    """Whether a few-shot run was made in the folder."""
    return (Path(folder) / RUN_FILE).is_file()
