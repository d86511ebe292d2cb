"""T-Few: its losses against their formulas, and whole trainings of tiny models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fewshot.writers import WORDS, Planted, gpt2, t5, whole_words
from torch import Tensor

import inlay
from inlay.errors import ConfigError
from inlay.fewshot import FewShotRun, evaluate, fewshot
from inlay.fewshot.base import Base
from inlay.fewshot.learning.choice_objectives import LengthNormalised, TargetNLL, Unlikelihood
from inlay.fewshot.learning.fitting import Recipe, fit
from inlay.fewshot.learning.objectives import CrossEntropy, Step
from inlay.fewshot.problem import Labelled, Problem
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.choice import ChoiceScorer
from inlay.fewshot.scorers.drawn import DrawnScorer
from inlay.fewshot.stages import Stages
from inlay.fewshot.systems import system_class
from inlay.fewshot.systems.t_few import TFew
from inlay.methods.ia3 import IA3

ROWS = [{"text": text} for text in ("a b", "c d e", "movie", "film")]
NAMES = ["neg", "pos", "so", "neg"]
TEMPLATES = tuple(Template(source) for source in ("{text} It was {mask}.", "movie : {text} ? {mask}"))
VERBALIZER = Verbalizer({"neg": "bad", "pos": "really good", "so": ["fine", "a b"]})


def scorer(template: Template = TEMPLATES[0], auto: Any = "causal-lm", verbalizer: Verbalizer = VERBALIZER) -> Any:
    words = whole_words(["$A", "</s>"] if auto == "seq2seq" else ["<s>", "$A"])
    return ChoiceScorer(tokenizer=words, template=template, verbalizer=verbalizer, auto=auto)


def step(model: Any, made: Any, targets: Any = (0, 1, 2, 0)) -> Step:
    encoded = made.encode(ROWS)
    batch = made.collate(encoded)
    return Step(model, made, encoded, batch, torch.as_tensor(targets), torch.Generator().manual_seed(0))


def certain(favoured: dict[str, str]) -> Any:
    """A decoder that is all but sure of what follows some words, and says all words alike behind the others."""
    table = torch.zeros(len(WORDS), len(WORDS))
    for word, follower in favoured.items():
        table[WORDS.index(word), WORDS.index(follower)] = 1e4
    return Planted(table)


def test_the_three_losses_are_the_formulas() -> None:
    model, made = gpt2(len(WORDS)), scorer()
    here = step(model, made)
    log = made.token_log_probs(model, here.batch).tolist()
    widths, owner = [1, 2, 1, 2], [0, 1, 2, 2]
    right_words, targets = {0: 0, 1: 1, 2: 2}, [0, 1, 2, 0]
    right = [log[row][right_words[label]][t] for row, label in enumerate(targets)
             for t in range(widths[right_words[label]])]  # fmt: skip
    wrong = [log[row][word][t] for row, label in enumerate(targets) for word in range(4) if owner[word] != label
             for t in range(widths[word])]  # fmt: skip
    assert TargetNLL()(here).item() == pytest.approx(-sum(right) / len(right), rel=1e-5)
    unlikely = -sum(math.log(1 - math.exp(value) + 0.01) for value in wrong) / len(wrong)
    assert Unlikelihood()(here).item() == pytest.approx(unlikely, rel=1e-4)
    torch.testing.assert_close(LengthNormalised()(here), CrossEntropy()(here))


def test_the_losses_share_one_pass() -> None:
    model, made = gpt2(len(WORDS)), scorer(verbalizer=Verbalizer({"neg": "bad", "pos": "good"}))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    (TargetNLL() + LengthNormalised() + Unlikelihood())(step(model, made, (0, 1, 1, 0))).backward()
    assert len(calls) == 1


def test_unlikelihood_stays_within_its_bounds() -> None:
    """Wrong tokens that cannot be: −log 1.01, all but 0. Wrong tokens that must be: −log 0.01, and its gradient."""
    made = scorer(verbalizer=Verbalizer({"neg": "bad", "pos": "good", "so": "fine"}))
    never = Unlikelihood()(step(certain({"was": "."}), made, (0, 0, 0, 0)))
    assert never.item() == pytest.approx(-math.log(1.01), rel=1e-5)
    two = scorer(verbalizer=Verbalizer({"neg": "bad", "pos": "good"}))
    model = certain({"was": "good"})
    sure = Unlikelihood()(step(model, two, (0, 0, 0, 0)))
    assert sure.item() == pytest.approx(-math.log(0.01), rel=1e-4)
    sure.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(model.table.grad).all()


def test_equal_choices_cost_the_logarithm_of_their_number() -> None:
    model: Any = Planted(torch.zeros(len(WORDS), len(WORDS)))
    assert LengthNormalised()(step(model, scorer())).item() == pytest.approx(math.log(3), rel=1e-5)


def test_losses_over_choices_need_choices_and_labels() -> None:
    soft = step(gpt2(len(WORDS)), scorer(), torch.full((4, 3), 1 / 3))
    for loss in (TargetNLL(), LengthNormalised(), Unlikelihood()):
        with pytest.raises(ConfigError, match="one label a row"):
            loss(soft)
        turned = ChoiceScorer(
            tokenizer=whole_words(["<s>", "$A"]), template=Template("It was {mask}. {text}"), verbalizer=VERBALIZER,
            direction="channel",
        )  # fmt: skip
        with pytest.raises(ConfigError, match="direction='direct'"):
            loss(step(gpt2(len(WORDS)), turned))


def test_templates_are_drawn_for_each_example_by_the_generator_alone() -> None:
    made = DrawnScorer.of([scorer(template) for template in TEMPLATES])
    encoded = made.encode(ROWS * 10)
    draws = [made.draw(encoded, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    ids = [[row.ids for row in one] for one in draws]
    assert ids[0] == ids[1] != ids[2]
    ways = [[scorer(template).encode([row])[0].ids for template in TEMPLATES] for row in ROWS * 10]
    taken = [both.index(own) for both, own in zip(ways, ids[0], strict=True)]
    assert {0, 1} == set(taken)
    model = gpt2(len(WORDS))
    torch.testing.assert_close(
        made.scores(model, ROWS),
        torch.stack([scorer(template).scores(model, ROWS) for template in TEMPLATES]).mean(0),
        atol=1e-5, rtol=1e-5,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="at least one"):
        DrawnScorer.of([])
    with pytest.raises(ConfigError, match=r"several length_norm: 1\.0, 0\.5"):
        DrawnScorer.of(
            [scorer(), ChoiceScorer.from_dict({**scorer().to_dict(), "length_norm": 0.5}, scorer().tokenizer)]
        )


def _folder(folder: Path, build: Callable[[int], Any]) -> Base:
    build(len(WORDS)).save_pretrained(folder)
    whole_words(["$A", "</s>"] if build is t5 else ["<s>", "$A"]).save_pretrained(folder)
    return Base(str(folder), device="cpu")


def _problem(base: Base, **changes: Any) -> Problem:
    given: dict[str, Any] = {
        "base": base, "labels": ("neg", "pos", "so"), "train": Labelled(rows=ROWS, labels=NAMES),
        "templates": TEMPLATES, "verbalizer": VERBALIZER, "text": Template("{text}"), "methods": (IA3(),),
        "recipe": Recipe(**{**TFew.recipe, "steps": 12, "learning_rate": 0.1}), "max_length": 32,
    }  # fmt: skip
    return Problem(**{**given, **changes})


@pytest.mark.parametrize("build", [t5, gpt2])
def test_a_training_makes_the_loss_small_and_is_the_same_again(build: Any, tmp_path: Path) -> None:
    base = _folder(tmp_path / "model", build)
    found: list[Tensor] = []
    for run in ("one", "two"):
        solution = TFew().solve(_problem(base), Stages(tmp_path / run))
        found.append(solution.scores(base, ROWS))
        losses = json.loads((tmp_path / run / "choices" / "stage.json").read_text())["losses"]
    assert torch.equal(*found)
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert len(solution.predictors) == len(TEMPLATES)
    each = [predictor.scores(base, ROWS) for predictor in solution.predictors]
    torch.testing.assert_close(found[0], torch.stack(each).mean(0))


def test_adafactor_is_transformers_with_a_fixed_rate() -> None:
    """One step: each tensor moves by rate · max(1e-3, its rms) · update of rms at most 1."""
    model, made = gpt2(len(WORDS)), scorer()
    inlay.attach(model, inlay.LoRA(r=2))  # half of its tensors start at 0: their scale is the least there is
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    recipe = Recipe(steps=1, batch_size=4, learning_rate=3e-3, warmup=0.0, weight_decay=0.0, optimizer="adafactor")
    fit(model, made, ROWS, NAMES, recipe=recipe, objective=TargetNLL())
    for name, parameter in trained.items():
        moved = (parameter.detach() - before[name]).square().mean().sqrt()
        most = 3e-3 * max(1e-3, before[name].square().mean().sqrt().item())
        assert moved <= most * 1.001, name
    assert any((parameter.detach() - before[name]).abs().max() > 0 for name, parameter in trained.items())
    with pytest.raises(ConfigError, match="adamw, adafactor"):
        Recipe(optimizer="sgd")


def test_it_is_for_models_that_write(bert_folder: Path, tmp_path: Path) -> None:
    assert system_class("t-few") is TFew
    masked = _problem(Base(str(bert_folder)), verbalizer=Verbalizer({"neg": "bad", "pos": "good", "so": "fine"}),
                      templates=(Template("{text} was {mask}."),))  # fmt: skip
    with pytest.raises(ConfigError, match="choose a decoder or a T5-like model"):
        TFew().check(masked)
    TFew().check(_problem(_folder(tmp_path / "model", t5)))
    with pytest.raises(ConfigError, match="eps"):
        TFew(eps=0)


@pytest.mark.parametrize("method", [{"kind": "icl", "k": 1, "calibration": "contextual"}, {"kind": "t-few"}])
def test_a_whole_run_of_a_model_that_writes_is_measured_and_used_again(method: Any, tmp_path: Path) -> None:
    _folder(tmp_path / "model", t5)
    rows = [{**row, "label": name} for row, name in zip(ROWS * 2, NAMES * 2, strict=True)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = FewShotRun.from_settings({
        "train": str(data), "test": str(data), "model": str(tmp_path / "model"), "method": method, "shots": 1,
        "templates": [template.source for template in TEMPLATES], "out": str(tmp_path / "out"), "max_length": 32,
        "verbalizer": {"neg": ["bad"], "pos": ["really good"], "so": ["fine"]}, "recipe": {"steps": 2},
    })  # fmt: skip
    report = fewshot(run, say=lambda line: None)
    again = evaluate(run.out, data)
    assert 0 <= report.seeds[0].test["accuracy"] <= 1
    assert again["accuracy"] == report.seeds[0].test["accuracy"]
