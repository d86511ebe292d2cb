"""What came of a few-shot run: a figure for each seed, their mean and standard deviation, and what it cost."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from inlay.fewshot.run import FewShotRun
from inlay.train.files import write_json, write_text
from inlay.train.record import CARD_FILE, RECORD_FILE, device_name, duration, peak_memory_bytes, versions


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
    peak_memory_bytes: int
    device: str
    versions: Mapping[str, str]

    @classmethod
    def of(cls, run: FewShotRun, labels: Sequence[str], seeds: Sequence[SeedResult]) -> Report:
        """Summed up."""
        points = {name: [result.test[name] for result in seeds] for name in (seeds[0].test if seeds else {})}
        return cls(
            run=run.to_dict(),
            labels=list(labels),
            mean={name: statistics.fmean(values) for name, values in points.items()},
            deviation={name: statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in points.items()},
            seeds=list(seeds),
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
        first = self.seeds[0]
        plural = "s" if first.adapters != 1 else ""
        lines += [
            f"trained      {first.adapters} adapter{plural} a seed, of at most {first.trainable_parameters:,} numbers",
            f"an answer    {first.flops / 1e6:,.1f} MFLOPs, {first.tokens:.0f} tokens read",
            f"took         {duration(sum(result.seconds for result in self.seeds))}, on {self.device}",
        ]
        return "\n".join(lines)

    def write(self, out: Path) -> None:
        """record.json and README.md in the run's folder."""
        write_json(out / RECORD_FILE, dataclasses.asdict(self))
        words = (
            f"# Few-shot run: {self.run['method']['kind']}\n\n```\n{self}\n```\n\n"
            f"Labels: {', '.join(self.labels)}. Mean ± standard deviation over {len(self.seeds)} splits, then each "
            f"split's own figure.\n\n    inlay predict {out} --data FILE\n    inlay explain {out} --data FILE\n"
        )
        write_text(out / CARD_FILE, words)
