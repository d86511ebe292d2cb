"""Soft slots: their vectors stand where the template says, nothing else changes, and they are trained and kept."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fewshot import toys
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertForMaskedLM, PreTrainedTokenizerFast

import inlay
from inlay.engine.adapters import adapters_of
from inlay.errors import CheckpointError, ConfigError
from inlay.fewshot.base import Base
from inlay.fewshot.learning.fitting import Recipe, fit
from inlay.fewshot.methods.soft_slots import SlotsPiece, SoftSlots
from inlay.fewshot.predictor import Predictor
from inlay.fewshot.problem import Labelled, Problem
from inlay.fewshot.prompts.soft_slots import slots_of, with_slots
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.choice import ChoiceScorer
from inlay.fewshot.scorers.mask import MaskScorer
from inlay.fewshot.scorers.multi_mask import MultiMaskScorer
from inlay.fewshot.stages import Stages
from inlay.fewshot.systems import system_class
from inlay.fewshot.systems.p_tuning import PTuning
from inlay.fewshot.systems.prompt import Prompt
from inlay.fewshot.systems.standard import Standard

ROWS = [{"text": text} for text in ("a good film", "bad film", "great", "the awful movie")]
LABELS = ["pos", "neg", "pos", "neg"]
SOFT = "{text} {soft:2} was {soft:really} {mask}"
RECIPE = Recipe(steps=3, batch_size=2, learning_rate=0.02)


def scorer_of(tokenizer: PreTrainedTokenizerFast, template: str = SOFT) -> MaskScorer:
    words = Verbalizer({"neg": "bad", "pos": "good"})
    return MaskScorer(tokenizer=tokenizer, template=Template(template), verbalizer=words)


def attached(model: Any, *methods: Any, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return inlay.attach(model, list(methods))


def vectors(model: nn.Module) -> Tensor:
    piece = next(module for module in model.modules() if isinstance(module, SlotsPiece))
    found: Tensor = piece.shared[0]()
    return found


def problem_of(folder: Path, template: str = SOFT, **fields: Any) -> Problem:
    given: dict[str, Any] = {
        "base": Base(str(folder), device="cpu"),
        "labels": ("neg", "pos"),
        "train": Labelled(rows=ROWS, labels=LABELS),
        "templates": (Template(template),),
        "verbalizer": Verbalizer({"neg": "bad", "pos": "good"}),
        "text": Template("{text}"),
        "methods": (),
        "recipe": RECIPE,
    }
    return Problem(**{**given, **fields})


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("encoder", [None, "mlp", "lstm"])
def test_the_model_sees_the_vectors_between_the_words(
    tokenizer: PreTrainedTokenizerFast, encoder: Any, padding: int
) -> None:
    # With `padding` the embedding has more rows than the tokenizer has tokens: those rows are no slots.
    model = toys.tiny_bert(len(tokenizer) + padding)
    scorer = scorer_of(tokenizer)
    batch = scorer.collate(scorer.encode(ROWS))
    slots = batch["input_ids"] >= len(tokenizer)
    assert slots.sum(1).tolist() == [3] * len(ROWS)
    table = model.get_input_embeddings().weight
    attached(model, slots_of(scorer, encoder=encoder, hidden_size=8))
    trained = vectors(model).detach()
    by_hand = table[batch["input_ids"].clamp_max(len(tokenizer) - 1)].clone()
    by_hand[slots] = trained.repeat(len(ROWS), 1)  # in the order of the template, row after row
    found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    inlay.detach(model)
    expected = model(inputs_embeds=by_hand, attention_mask=batch["attention_mask"]).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_text_without_slots_is_the_bases_to_the_bit(bert: BertForMaskedLM, tokenizer: Any) -> None:
    plain, soft = scorer_of(tokenizer, "{text} {mask}"), scorer_of(tokenizer)
    base = plain.scores(bert, ROWS)
    attached(bert, slots_of(soft))
    assert torch.equal(plain.scores(bert, ROWS), base)
    with torch.no_grad():
        before = soft.scores(bert, ROWS)
        vectors(bert).neg_()
    assert torch.equal(plain.scores(bert, ROWS), base)
    assert not torch.allclose(soft.scores(bert, ROWS), before, atol=1e-2)


def test_slots_start_as_their_words(any_tokenizer: PreTrainedTokenizerFast) -> None:
    model = toys.tiny_bert(len(any_tokenizer))
    worded = scorer_of(any_tokenizer, "{text} is really {mask}")
    soft = scorer_of(any_tokenizer, "{text} {soft:is} {soft:really} {mask}")
    expected = worded.scores(model, ROWS)
    attached(model, *with_slots([], soft))
    assert torch.allclose(soft.scores(model, ROWS), expected, atol=1e-5)


def test_slots_beside_masks_that_are_filled_one_after_another(bert: BertForMaskedLM, tokenizer: Any) -> None:
    words = Verbalizer({"neg": "bad film", "pos": "good"})
    worded, soft = (
        MultiMaskScorer(tokenizer=tokenizer, template=Template(f"{{text}} {what} {{mask*}}"), verbalizer=words)
        for what in ("is", "{soft:is}")
    )
    expected = worded.scores(bert, ROWS)
    attached(bert, slots_of(soft))
    assert torch.allclose(soft.scores(bert, ROWS), expected, atol=1e-4)


@pytest.mark.parametrize("encoder", [None, "mlp", "lstm"])
def test_saved_and_loaded_it_answers_the_same(
    bert: BertForMaskedLM, tokenizer: Any, encoder: Any, tmp_path: Path
) -> None:
    scorer = scorer_of(tokenizer)
    attached(bert, slots_of(scorer, encoder=encoder, hidden_size=8), inlay.LoRA(r=2))
    fit(bert, scorer, ROWS, LABELS, recipe=RECIPE)
    expected, trained = scorer.scores(bert, ROWS), vectors(bert).detach().clone()
    inlay.save(bert, tmp_path)
    inlay.detach(bert)
    inlay.load(bert, tmp_path)
    assert torch.equal(scorer.scores(bert, ROWS), expected)
    inlay.detach(bert)
    kept = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in kept if name.endswith("soft_slots"))
    assert torch.allclose(kept[name], trained, atol=1e-6)  # what the encoder gives: enough to answer without it
    if encoder is not None:
        (extra,) = [path for path in tmp_path.glob("*.safetensors") if path.name != "adapter_model.safetensors"]
        shutil.move(extra, tmp_path / "gone")
        with pytest.raises(CheckpointError):
            inlay.load(bert, tmp_path)


def test_the_encoder_can_be_dropped_after_training(bert: BertForMaskedLM, tokenizer: Any) -> None:
    scorer = scorer_of(tokenizer)
    attached(bert, slots_of(scorer, encoder="lstm", hidden_size=8))
    fit(bert, scorer, ROWS, LABELS, recipe=RECIPE)
    expected, trained = scorer.scores(bert, ROWS), vectors(bert).detach().clone()
    inlay.detach(bert)
    attached(bert, slots_of(scorer))
    with torch.no_grad():
        vectors(bert).copy_(trained)
    assert torch.allclose(scorer.scores(bert, ROWS), expected, atol=1e-5)


def test_gradients_reach_the_slots_alone(bert: BertForMaskedLM, tokenizer: Any) -> None:
    scorer = scorer_of(tokenizer)
    attached(bert, slots_of(scorer, encoder="mlp"))
    scorer(bert, scorer.collate(scorer.encode(ROWS))).logsumexp(-1).sum().backward()
    got = {name for name, parameter in bert.named_parameters() if parameter.grad is not None}
    assert got == {name for name, _ in bert.named_parameters() if "soft_slots" in name}
    assert got
    h = 32
    assert inlay.summary(bert).trainable_parameters == 3 * 32 + 3 * (h * h + h)  # PTuning's formula, with d = h


def test_rates_of_their_own(bert: BertForMaskedLM, tokenizer: Any) -> None:
    scorer = scorer_of(tokenizer)
    attached(bert, inlay.FullFineTuning(), slots_of(scorer))
    start = {name: parameter.detach().clone() for name, parameter in bert.named_parameters()}
    fit(bert, scorer, ROWS, LABELS, recipe=dataclasses.replace(RECIPE, weight_decay=0.0, rates={"full": 1e-8}))
    moved = {name: (parameter - start[name]).abs().max().item() for name, parameter in bert.named_parameters()}
    soft = [name for name in moved if "soft_slots" in name]
    assert min(moved[name] for name in soft) > 1e-3
    # Three steps of Adam at 1e-8, and the rounding of single precision on weights of up to about 1.
    assert max(change for name, change in moved.items() if name not in soft) < 2e-7
    with pytest.raises(ConfigError, match="did you mean 'full'"):
        fit(bert, scorer, ROWS, LABELS, recipe=dataclasses.replace(RECIPE, rates={"ful": 1e-8}))
    with pytest.raises(ConfigError, match="full=-1"):
        Recipe(rates={"full": -1})


def test_nobody_to_train_the_slots(bert: BertForMaskedLM, tokenizer: Any) -> None:
    scorer = scorer_of(tokenizer)
    attached(bert, inlay.LoRA(r=2))
    with pytest.raises(ConfigError, match="soft slots, and nothing that is attached trains them"):
        fit(bert, scorer, ROWS, LABELS, recipe=RECIPE)
    with pytest.raises(ConfigError, match="no vectors for them"):
        Predictor(scorer=scorer)
    words = Verbalizer({"neg": "bad", "pos": "good"})
    with pytest.raises(ConfigError, match="soft slots"):
        ChoiceScorer(tokenizer=tokenizer, template=Template("{text} {soft:2} it is"), verbalizer=words)


def test_prompt_trains_soft_slots_by_itself(bert_folder: Path, tmp_path: Path) -> None:
    problem = problem_of(bert_folder, methods=(inlay.LoRA(r=2),))
    solution = Prompt().solve(problem, Stages(tmp_path))
    with problem.base.holding("masked-lm", solution.predictors[0].adapter) as model:
        kinds = [method.kind for method in adapters_of(model).get("default").methods]
    assert kinds == ["lora", "soft_slots"]
    assert solution.scores(problem.base, ROWS).shape == (4, 2)


def test_p_tuning_by_itself_and_beside_others(bert_folder: Path, tmp_path: Path) -> None:
    system = PTuning(hidden_size=8)
    problem = problem_of(bert_folder)
    before = {name: tensor.clone() for name, tensor in problem.base.model("masked-lm").state_dict().items()}
    first, again = (system.solve(problem, Stages(tmp_path / place)) for place in "ab")
    note = Stages(tmp_path / "a").notes()["pattern-0"]
    assert note["trainable_parameters"] == 3 * 32 + 8 * 8 * (32 + 8 + 2) + 8 * 8 * (3 * 8 + 2) + 16 * 17 + 32 * 17
    assert torch.equal(first.scores(problem.base, ROWS), again.scores(problem.base, ROWS))
    after = problem.base.model("masked-lm").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    both = problem_of(bert_folder, methods=(inlay.LoRA(r=2),))
    assert PTuning().solve(both, Stages(tmp_path / "c")).scores(both.base, ROWS).isfinite().all()
    assert system_class("p-tuning") is PTuning
    with pytest.raises(ConfigError, match=r"soft slots, and the template .* has none"):
        system.check(problem_of(bert_folder, "{text} {mask}"))
    with pytest.raises(ConfigError, match="encoder='gru'"):
        PTuning(encoder="gru")  # type: ignore[arg-type]


def test_p_tuning_v2_is_standard_with_prefixes(bert_folder: Path, tmp_path: Path) -> None:
    n = 4
    problem = problem_of(bert_folder, methods=(inlay.PrefixTuning(num_virtual_tokens=n),))
    solution = Standard().solve(problem, Stages(tmp_path))
    scores = solution.scores(problem.base, ROWS)
    assert Stages(tmp_path).notes()["classifier"]["trainable_parameters"] >= 2 * 2 * n * 32 + 2 * 32 + 2
    with problem.base.holding("head", solution.predictors[0].adapter, 2) as model:
        for name, parameter in model.named_parameters():
            if "prefix_tuning" in name:
                parameter.data += 1.0
        moved = solution.predictors[0].scorer.scores(model, ROWS)
    assert (moved - scores).abs().max() > 1e-3  # the model does look at its prefixes


@pytest.mark.parametrize(
    "fields",
    [{"starts": ()}, {"starts": (10,)}, {"starts": (-1,)}, {"starts": (None,), "encoder": "gru"},
     {"starts": (None,), "targets": "embed"}],
)  # fmt: skip
def test_slots_that_cannot_be_meant(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SoftSlots(first=10, **fields)
