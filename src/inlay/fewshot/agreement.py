"""How far several runs agree about the same rows: what a reader of a content analysis asks first.

    Krippendorff's α = 1 − D_o / D_e     how often two answers to one row differ, and to any two rows; some may lack
    Cohen's κ = (p_o − p_e) / (1 − p_e)  of two runs, p_e from how often each gives each label
    Fleiss' κ                            of all runs, p_e from how often they give each label together

All are 1 where runs agree on every row, 0 where they agree as often as by chance. Krippendorff 2011, "Computing
Krippendorff's Alpha-Reliability"; Cohen 1960; Fleiss 1971.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from inlay.errors import DataError
from inlay.fewshot.run import RUN_FILE, FewShotRun
from inlay.fewshot.saved import seed_folder

Answers = Sequence[Hashable]
"""A run's label for each row, by name or number; None where it has none."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far runs agree; nan where all of them give one label alone, and chance cannot be told from agreement."""

    runs: int
    rows: int
    same: float
    """The share of rows that all runs give the same label."""
    alpha: float
    """Krippendorff's α, nominal."""
    fleiss: float
    """Fleiss' κ."""
    cohen: float
    """The mean of Cohen's κ over all pairs of runs."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: None for nan."""
        plain = dataclasses.asdict(self)
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in plain.items()
        }


def agreement(runs: Sequence[Answers]) -> Agreement:
    """All of them, for two or more runs over the same rows, each with a label for each row. DataError for others."""
    _same_rows(runs)
    pairs = list(itertools.combinations(runs, 2))
    return Agreement(
        runs=len(runs),
        rows=len(runs[0]),
        same=sum(len(set(given)) == 1 for given in zip(*runs, strict=True)) / len(runs[0]),
        alpha=krippendorff_alpha(runs),
        fleiss=fleiss_kappa(runs),
        cohen=sum(cohen_kappa(one, other) for one, other in pairs) / len(pairs),
    )


def krippendorff_alpha(runs: Sequence[Answers]) -> float:
    """α for labels without an order. Rows with fewer than two answers count nothing; None is no answer.

    D_o = Σ_rows Σ_{pairs that differ} 1 / (m − 1) / n, with m answers to the row and n in all such rows;
    D_e = Σ_{labels c ≠ k} n_c n_k / (n (n − 1)). Raises DataError where no row has two answers.
    """
    _same_rows(runs, whole=False)
    rows = [[answer for answer in given if answer is not None] for given in zip(*runs, strict=True)]
    rows = [given for given in rows if len(given) > 1]
    if not rows:
        raise DataError("no row has two answers: there is nothing to agree about")
    counts = Counter(answer for given in rows for answer in given)
    n = counts.total()
    observed = sum(_differing(Counter(given)) / (len(given) - 1) for given in rows) / n
    expected = _differing(counts) / (n * (n - 1))
    return 1 - observed / expected if expected else math.nan


def cohen_kappa(one: Answers, other: Answers) -> float:
    """κ of two runs. Raises DataError where they are not over the same rows."""
    _same_rows((one, other))
    n = len(one)
    chance = sum(count * Counter(other)[label] for label, count in Counter(one).items()) / n**2
    return _kappa(sum(a == b for a, b in zip(one, other, strict=True)) / n, chance)


def fleiss_kappa(runs: Sequence[Answers]) -> float:
    """κ of two or more runs: p_o is the mean over rows of the share of pairs of runs that agree."""
    _same_rows(runs)
    m, rows = len(runs), [Counter(given) for given in zip(*runs, strict=True)]
    observed = sum(1 - _differing(given) / (m * (m - 1)) for given in rows) / len(rows)
    counts = sum(rows, Counter[Hashable]())
    chance = sum((count / counts.total()) ** 2 for count in counts.values())
    return _kappa(observed, chance)


def agreement_of_run(folder: str | Path) -> Agreement:
    """How far the seeds of a finished few-shot run agree on its test rows.

    Raises DataError where it has one seed alone, or no test rows, or is not finished.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    run = FewShotRun.from_yaml(folder / RUN_FILE)
    places = [seed_folder(folder, seed) / "stages" / "test-scores" / "tensor.safetensors" for seed in run.seeds]
    missing = [place for place in places if not place.is_file()]
    if missing:
        raise DataError(f"{missing[0]} is missing: finish the run (--resume), with --test rows")
    return agreement([load_file(place)["tensor"].argmax(-1).tolist() for place in places])


def _differing(counts: Counter[Hashable]) -> int:
    """How many ordered pairs of answers differ."""
    return counts.total() ** 2 - sum(count**2 for count in counts.values())


def _kappa(observed: float, chance: float) -> float:
    return math.nan if math.isclose(chance, 1) else (observed - chance) / (1 - chance)


def _same_rows(runs: Sequence[Answers], whole: bool = True) -> None:
    sizes = sorted({len(run) for run in runs})
    if len(runs) < 2 or len(sizes) > 1 or sizes == [0]:
        raise DataError(f"agreement is between two runs or more over the same rows; got {len(runs)} of {sizes} rows")
    if whole and any(answer is None for run in runs for answer in run):
        raise DataError("a run has no answer to some row, which only Krippendorff's alpha allows for")
