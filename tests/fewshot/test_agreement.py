"""Agreement between runs: by hand, by brute force over pairs, by scikit-learn, and on a finished run's files."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import cohen_kappa_score

from inlay.errors import DataError
from inlay.fewshot.agreement import agreement, agreement_of_run, cohen_kappa, fleiss_kappa, krippendorff_alpha
from inlay.fewshot.run import RUN_FILE, FewShotRun
from inlay.fewshot.saved import seed_folder

_ = None
# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: four observers, missing values, α = 0.743.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
]


def drawn(runs: int, rows: int, labels: int, missing: float = 0.0, seed: int = 0) -> list[list[int | None]]:
    """Answers that agree about half of the time."""
    draw = random.Random(seed)
    true = [draw.randrange(labels) for _ in range(rows)]
    return [
        [
            None if draw.random() < missing else (label if draw.random() < 0.6 else draw.randrange(labels))
            for label in true
        ]
        for _ in range(runs)
    ]


def test_the_published_example() -> None:
    assert krippendorff_alpha(OBSERVERS) == pytest.approx(0.743, abs=5e-4)


def test_alpha_by_hand() -> None:
    # Rows ab, aa, bb: 2 of 6 ordered pairs within rows differ; of the 30 among all six answers, 2 · 3 · 3 = 18.
    assert krippendorff_alpha(["aab", "bab"]) == pytest.approx(1 - (2 / 6) / (18 / 30))


@pytest.mark.parametrize("seed", range(3))
def test_alpha_by_brute_force(seed: int) -> None:
    runs = drawn(4, 30, 3, missing=0.3, seed=seed)
    rows = [[a for a in given if a is not None] for given in zip(*runs, strict=True)]
    rows = [given for given in rows if len(given) > 1]
    everything = [answer for given in rows for answer in given]
    observed = sum(sum(a != b for a, b in itertools.permutations(given, 2)) / (len(given) - 1) for given in rows) / len(
        everything
    )
    pairs = list(itertools.permutations(everything, 2))
    assert krippendorff_alpha(runs) == pytest.approx(1 - observed / (sum(a != b for a, b in pairs) / len(pairs)))


@pytest.mark.parametrize("seed", range(3))
def test_cohen_is_scikit_learns(seed: int) -> None:
    one, other = drawn(2, 40, 3, seed=seed)
    assert cohen_kappa(one, other) == pytest.approx(cohen_kappa_score(one, other))


def test_fleiss_by_hand_and_for_two_runs() -> None:
    # Three runs, rows aaa and aab: P = (1 + 1/3) / 2 = 2/3, p_a = 5/6, P_e = 26/36.
    assert fleiss_kappa(["aa", "aa", "ab"]) == pytest.approx((2 / 3 - 26 / 36) / (1 - 26 / 36))
    one, other = drawn(2, 40, 3)
    agree = sum(a == b for a, b in zip(one, other, strict=True)) / 40
    chance = sum(((one.count(label) + other.count(label)) / 80) ** 2 for label in range(3))  # Scott's π
    assert fleiss_kappa([one, other]) == pytest.approx((agree - chance) / (1 - chance))


def test_perfect_chance_and_one_label_alone() -> None:
    same = agreement([[0, 1, 2, 1]] * 3)
    assert (same.same, same.alpha, same.fleiss, same.cohen) == (1, 1, 1, 1)
    draw = random.Random(0)
    noise = agreement([[draw.randrange(2) for _ in range(4000)] for _ in range(3)])
    # The spread of κ over 4,000 rows is about 1 / √4000 = 0.016.
    assert max(map(abs, (noise.alpha, noise.fleiss, noise.cohen))) < 0.05
    alone = agreement([[1, 1], [1, 1]])
    assert math.isnan(alone.alpha)
    assert math.isnan(alone.cohen)
    assert alone.to_dict()["alpha"] is None
    assert alone.to_dict()["same"] == 1


@pytest.mark.parametrize("runs", [[[1, 2]], [[1, 2], [1]], [[], []], [[1, None], [1, 2]]])
def test_what_cannot_be_compared(runs: list[list[int | None]]) -> None:
    with pytest.raises(DataError):
        agreement(runs)
    with pytest.raises(DataError):
        krippendorff_alpha([[None, 1], [1, None]])


def test_a_finished_runs_seeds(tmp_path: Path) -> None:
    run = FewShotRun(train="x.jsonl", seeds=[1, 2])
    (tmp_path / RUN_FILE).write_text(run.to_yaml(), encoding="utf-8")
    with pytest.raises(DataError, match="--resume"):
        agreement_of_run(tmp_path)
    answers = {1: [0, 1, 1, 0], 2: [0, 1, 0, 0]}
    for seed, labels in answers.items():
        place = seed_folder(tmp_path, seed) / "stages" / "test-scores"
        place.mkdir(parents=True)
        save_file({"tensor": torch.eye(2)[labels]}, place / "tensor.safetensors")
    assert agreement_of_run(tmp_path) == agreement(list(answers.values()))
    assert agreement_of_run(tmp_path).same == 0.75
