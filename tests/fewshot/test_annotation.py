"""Labels from models: soft ones of an ensemble, and the rows that iPET draws."""

from __future__ import annotations

import time

import pytest
import torch

from inlay.errors import ConfigError, DataError
from inlay.fewshot.learning.annotation import Annotated, drawn, most_likely, soft_labels, teachers
from inlay.fewshot.learning.objectives import Distillation, Step
from inlay.fewshot.learning.seeds import derived
from inlay.fewshot.scorers.ensembles import combined


def scores(models: int = 3, rows: int = 20, labels: int = 4) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [2 * torch.randn(rows, labels, generator=draw) for _ in range(models)]


# -- an ensemble's probabilities ---------------------------------------------------------------------------------------


def test_equal_weights_are_the_mean() -> None:
    found = scores()
    mean = torch.stack(found).double().mean(0).softmax(-1).float()
    torch.testing.assert_close(soft_labels(found), mean)
    torch.testing.assert_close(soft_labels(found, [0.7] * 3), mean)
    torch.testing.assert_close(soft_labels(found, [0.0] * 3), mean)
    assert (soft_labels(found, [0.7, 0.1, 0.1]) - mean).abs().max() > 0.01


def test_weights_are_shares_and_the_order_does_not_matter() -> None:
    found, weights = scores(), [0.5, 0.25, 1.0]
    one = soft_labels(found, weights)
    order = [2, 0, 1]
    torch.testing.assert_close(soft_labels([found[i] for i in order], [weights[i] for i in order]), one)
    torch.testing.assert_close(soft_labels(found, [4 * weight for weight in weights]), one)
    torch.testing.assert_close(soft_labels(found, [0, 1, 0]), found[1].softmax(-1))


class _Says(Step):
    """A step whose scores are given."""

    def __init__(self, said: torch.Tensor, targets: torch.Tensor) -> None:
        self._scores, self.targets = said, targets


def distilled(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> tuple[float, torch.Tensor]:
    """The loss and its gradient."""
    said = student.clone().requires_grad_()
    loss = Distillation(temperature)(_Says(said, teacher.softmax(-1)))
    loss.backward()  # type: ignore[no-untyped-call]
    assert said.grad is not None
    return loss.item(), said.grad


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_a_student_that_agrees_has_nothing_to_learn(temperature: float) -> None:
    """Scores equal but for a constant of each row: loss 0 and gradient 0, up to float32's rounding."""
    teacher = combined(scores())
    loss, gradient = distilled(teacher + torch.arange(20.0)[:, None], teacher, temperature)
    assert abs(loss) < 1e-5
    assert gradient.abs().max() < 1e-6
    loss, gradient = distilled(teacher.flip(-1), teacher, temperature)
    assert loss > 0.1
    assert gradient.abs().max() > 1e-3


def test_temperature_keeps_the_gradients_scale() -> None:
    """T² · gradient of KL at T tends to (z_s − z_t, centred) / labels for large T: the norms' ratio settles."""
    student, teacher = scores(2)
    norms = {t: distilled(student, teacher, t)[1].norm().item() for t in (1.0, 20.0, 40.0)}
    difference = student - teacher
    limit = (difference - difference.mean(-1, keepdim=True)).norm().item() / 4 / 20
    assert norms[40.0] == pytest.approx(limit, rel=0.05)
    assert norms[20.0] / norms[40.0] == pytest.approx(1, rel=0.05)
    assert 0.2 < norms[1.0] / norms[40.0] < 5


# -- who teaches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "share", "expected"), [(12, 0.25, 3), (9, 0.25, 2), (2, 0.25, 1), (5, 1.0, 4)])
def test_a_share_of_the_others_teaches(count: int, share: float, expected: int) -> None:
    names = [f"model {number}" for number in range(count)]
    seen = set()
    for own in range(count):
        for seed in range(30):
            chosen = teachers(names, own, share, seed)
            assert len(chosen) == len(set(chosen)) == expected
            assert own not in chosen
            seen |= set(chosen)
    assert seen == set(range(count)), "everyone is asked sometimes"
    assert teachers(names, 0, share, 5) == teachers(names, 0, share, 5)


def test_who_teaches_does_not_depend_on_the_order_of_the_models() -> None:
    names = list("abcdefgh")
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    shuffled = [names[i] for i in order]
    for own in range(8):
        one = [names[i] for i in teachers(names, own, 0.4, 3)]
        assert one == [shuffled[i] for i in teachers(shuffled, shuffled.index(names[own]), 0.4, 3)]


def test_a_model_alone_has_no_teacher() -> None:
    with pytest.raises(ConfigError, match="two at least"):
        teachers(["only"], 0, 0.25, 0)


# -- rows for the next generation --------------------------------------------------------------------------------------


def test_so_many_of_each_label_without_replacement() -> None:
    probabilities = combined(scores(rows=400)).softmax(-1)
    counts = [5, 0, 40, 11]
    found = drawn(probabilities, counts, seed=1)
    assert [found.labels.count(label) for label in range(4)] == counts
    assert len(set(found.rows)) == sum(counts)
    assert torch.equal(probabilities[list(found.rows)].argmax(-1), torch.tensor(found.labels))
    assert found == drawn(probabilities, counts, seed=1) != drawn(probabilities, counts, seed=2)
    assert Annotated.from_tensor(found.to_tensor()) == found
    assert Annotated.from_tensor(drawn(probabilities, [0] * 4, 0).to_tensor()) == Annotated((), ())


def test_all_of_a_label_when_all_are_wanted() -> None:
    probabilities = combined(scores(rows=50)).softmax(-1)
    counts = torch.bincount(probabilities.argmax(-1), minlength=4).tolist()
    assert sorted(drawn(probabilities, counts, 0).rows) == list(range(50))


def test_confidence_is_the_chance_to_be_drawn() -> None:
    """Rows of confidence .9 and .6, one drawn: the first with 3 in 5. 2,000 draws; 4 standard deviations are .044."""
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    first = sum(drawn(probabilities, [1, 0], seed).rows == (0,) for seed in range(2000))
    assert first / 2000 == pytest.approx(0.6, abs=0.044)


def test_a_label_given_too_rarely_is_an_error_at_once() -> None:
    probabilities = torch.tensor([[0.9, 0.1, 0.0]] * 30 + [[0.2, 0.8, 0.0]] * 3)
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"4 rows of the label 'b' .* to 3 of 33 unlabelled rows"):
        drawn(probabilities, [4, 4, 0], 0, ["a", "b", "c"])
    with pytest.raises(DataError, match=r"1 rows of the label 'c' .* to 0 of 33"):
        drawn(probabilities, [1, 1, 1], 0, ["a", "b", "c"])
    assert time.monotonic() - begun < 5, "said, not looked for without end"
    assert len(drawn(probabilities, [30, 3, 0], 0).rows) == 33


def test_the_likeliest_of_each_label() -> None:
    probabilities = torch.tensor([[0.9, 0.05, 0.05], [0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.7, 0.1, 0.2]])
    found = most_likely(probabilities, 2)
    by_label = {
        label: {row for row, own in zip(found.rows, found.labels, strict=True) if own == label} for label in range(3)
    }
    assert by_label == {0: {0, 3}, 1: {1, 2}, 2: {2, 3}}, "though label 0 is the likeliest everywhere; ties: the first"
    with pytest.raises(DataError, match="there are 4 unlabelled rows"):
        most_likely(probabilities, 5)


def test_derived_seeds_tell_parts_apart() -> None:
    found = {derived(seed, name, number) for seed in range(10) for name in "abc" for number in range(10)}
    assert len(found) == 300
    assert all(0 <= seed < 2**31 for seed in found)
    assert derived(3, "a", 1) == derived(3, "a", 1) != derived(3, "a1")
