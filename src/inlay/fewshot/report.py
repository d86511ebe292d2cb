"""What came of a few-shot run: a figure for each seed, their mean and standard deviation, and what it cost."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from inlay.fewshot.baseline import Baseline
from inlay.fewshot.chart import seeds_chart
from inlay.fewshot.run import FewShotRun
from inlay.train.files import write_json, write_text
from inlay.train.record import CARD_FILE, RECORD_FILE, device_name, duration, peak_memory_bytes, versions

SEEDS_CHART = "seeds.svg"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedResult:
    """One seed of a run."""

    seed: int
    split: Mapping[str, Any]
    """Which rows were drawn, and their hash."""
    test: Mapping[str, float]
    """The metrics on the test rows; none where there are none."""
    seconds: float
    """Wall-clock time of its stages; a resumed run adds up."""
    trainable_parameters: int
    """Of its largest adapter."""
    adapters: int
    """How many were trained."""
    words: Mapping[str, Sequence[str]] | None
    """The labels' words, where they were found and not given."""
    flops: float
    """Floating-point operations of one answer, the mean over some rows."""
    tokens: float
    """Tokens that are read for one answer."""
    stages: Mapping[str, float]
    """Seconds of each stage."""
    baseline: Baseline | None = None
    """What in-context learning by the untrained base says, with its cost."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A run in numbers, as record.json holds it."""

    run: Mapping[str, Any]
    labels: Sequence[str]
    mean: Mapping[str, float]
    """Of each metric over the seeds."""
    deviation: Mapping[str, float]
    """Standard deviation over the seeds (n − 1); 0 for one seed."""
    seeds: Sequence[SeedResult]
    agreement: Mapping[str, Any] | None
    """How far the seeds' predictions of the test rows agree (`agreement.py`); None for one seed, or no test rows."""
    peak_memory_bytes: int
    device: str
    versions: Mapping[str, str]

    @classmethod
    def of(
        cls,
        run: FewShotRun,
        labels: Sequence[str],
        seeds: Sequence[SeedResult],
        agreement: Mapping[str, Any] | None = None,
    ) -> Report:
        """Summed up."""
        points = {name: [result.test[name] for result in seeds] for name in (seeds[0].test if seeds else {})}
        return cls(
            run=run.to_dict(),
            labels=list(labels),
            mean={name: statistics.fmean(values) for name, values in points.items()},
            deviation={name: statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in points.items()},
            seeds=list(seeds),
            agreement=agreement,
            peak_memory_bytes=peak_memory_bytes(),
            device=device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            versions=versions(),
        )

    def __str__(self) -> str:
        lines = [
            f"{name:<12} {value:.4f} ± {self.deviation[name]:.4f}   "
            + " ".join(f"{result.test[name]:.4f}" for result in self.seeds)
            for name, value in self.mean.items()
        ]
        if self.agreement is not None:
            lines.append(f"agreement    {_agreement(self.agreement)}")
        first = self.seeds[0]
        trained = f"{first.adapters} adapter{'s' * (first.adapters > 1)} a seed, of at most"
        numbers = first.trainable_parameters  # none where the model is asked as it is
        lines += [
            f"trained      {trained} {numbers:,} numbers" if numbers else "trained      nothing",
            f"an answer    {first.flops / 1e6:,.1f} MFLOPs, {first.tokens:.0f} tokens read",
            f"took         {duration(sum(result.seconds for result in self.seeds))}, on {self.device}",
        ]
        if (groups := first.split.get("groups")) is not None:
            sides = (("train", len(groups["train"])), ("dev", len(groups["dev"])), ("test", groups["test"]))
            shown = ", ".join(f"{count:,} in {side}" for side, count in sides if count)
            lines.insert(-1, f"groups       by {groups['column']}: {shown}, none on two sides (seed {first.seed})")
        lines += self._baseline()
        return "\n".join(lines)

    def _baseline(self) -> list[str]:
        """In-context learning beside, as a line: the mean of each metric over the seeds that have it, and the cost."""
        found = [result.baseline for result in self.seeds if result.baseline is not None]
        if not found:
            return []
        means = ", ".join(f"{name} {statistics.fmean(one.test[name] for one in found):.4f}" for name in found[0].test)
        spent = f"{statistics.fmean(one.flops for one in found) / 1e6:,.1f} MFLOPs an answer"
        return [f"in context   {means}; {spent}, untrained (on {found[0].rows:,} of the test rows)"]

    def write(self, out: Path) -> None:
        """record.json, README.md and, where there are figures of several seeds, seeds.svg in the run's folder."""
        write_json(out / RECORD_FILE, dataclasses.asdict(self))
        several = len(self.seeds) > 1 and bool(self.mean)
        if several:
            figures = {name: [result.test[name] for result in self.seeds] for name in self.mean}
            title = f"{out.name}: each seed, mean ± standard deviation"
            write_text(out / SEEDS_CHART, seeds_chart([result.seed for result in self.seeds], figures, title))
        else:
            (out / SEEDS_CHART).unlink(missing_ok=True)  # of an earlier end of the run, with more seeds
        picture = f"\n![Each seed's figures]({SEEDS_CHART})\n" if several else ""
        words = (
            f"# Few-shot run: {self.run['method']['kind']}\n\n```\n{self}\n```\n\n"
            f"Labels: {', '.join(self.labels)}. Mean ± standard deviation over the splits ({len(self.seeds)}), then "
            f"each split's own.\n{picture}\n    inlay predict {out} --data FILE\n    inlay explain {out} --data FILE\n"
        )
        write_text(out / CARD_FILE, words)


def _agreement(found: Mapping[str, Any]) -> str:
    """`Krippendorff's α 0.8123, mean Cohen's κ 0.8120; 2 seeds give 91.2% of 872 test rows one label`."""
    alpha, cohen = (
        "undefined (one label alone)" if found[name] is None else f"{found[name]:.4f}" for name in ("alpha", "cohen")
    )
    share = f"{found['runs']} seeds give {found['same']:.1%} of {found['rows']:,} test rows one label"
    return f"Krippendorff's α {alpha}, mean Cohen's κ {cohen}; {share}"
