"""One base model serves all turns: what an adapter trains is gone with it, and the base is what it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fewshot import toys
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

import inlay
from inlay.errors import ConfigError
from inlay.fewshot.base import Base
from inlay.fewshot.learning.fitting import Recipe, fit
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.head import HeadScorer
from inlay.fewshot.scorers.mask import MaskScorer
from inlay.methods.lora import LoRA

ROWS, LABELS = [{"text": "good film"}, {"text": "bad"}], ["pos", "neg"]
RECIPE = Recipe(steps=2, batch_size=2, learning_rate=0.05)
METHODS = [LoRA(r=2)]


@pytest.fixture
def base(bert_folder: Path) -> Base:
    return Base(str(bert_folder), device="cpu")


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def mask_scorer(base: Base) -> MaskScorer:
    words = Verbalizer({"neg": "no", "pos": "yes"})
    return MaskScorer(tokenizer=base.tokenizer, template=Template("{text} is {mask}"), verbalizer=words)


def head_scorer(base: Base) -> HeadScorer:
    return HeadScorer(tokenizer=base.tokenizer, template=Template("{text}"), names=("neg", "pos"))


def test_each_form_is_loaded_once(base: Base) -> None:
    assert base.model("masked-lm") is base.model("masked-lm")
    assert base.model("head", 2) is not base.model("head", 3)
    assert not base.model("masked-lm").training
    with pytest.raises(ConfigError, match="did you mean 'masked-lm'"):
        base.model("masked_lm")


def test_the_base_has_the_same_bits_after_its_turns(base: Base, tmp_path: Path) -> None:
    model, scorer = base.model("masked-lm"), mask_scorer(base)
    before, grads = bits(model), [p.requires_grad for p in model.parameters()]
    scores = scorer.scores(model, ROWS)
    for seed in range(2):
        with base.adapted("masked-lm", METHODS, seed=seed) as held:
            fit(held, scorer, ROWS, LABELS, recipe=RECIPE)
            trained = scorer.scores(held, ROWS)
            inlay.save(held, tmp_path / str(seed))
        assert not torch.equal(trained, scores)
        assert same(bits(model), before)
        with base.holding("masked-lm", tmp_path / str(seed)) as held:
            assert torch.equal(scorer.scores(held, ROWS), trained)
        assert same(bits(model), before)
    assert [p.requires_grad for p in model.parameters()] == grads
    assert torch.equal(scorer.scores(model, ROWS), scores)


def test_an_error_within_a_turn_takes_the_adapter_out_too(base: Base) -> None:
    before = bits(base.model("masked-lm"))
    with pytest.raises(RuntimeError, match="stop"), base.adapted("masked-lm", METHODS, seed=0):
        raise RuntimeError("stop")
    assert same(bits(base.model("masked-lm")), before)
    with base.adapted("masked-lm", METHODS, seed=0):
        pass


def test_adapters_and_fresh_heads_come_from_the_seed(base: Base) -> None:
    scorer = head_scorer(base)

    def start(seed: int, noise: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        torch.manual_seed(noise)
        with base.adapted("head", METHODS, seed=seed, labels=2) as model:
            trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            found = scorer.scores(model, ROWS)
            fit(model, scorer, ROWS, LABELS, recipe=RECIPE)
        return trained, found

    (first, scores), (again, rescored), (other, otherwise) = start(1, 0), start(1, 7), start(2, 0)
    assert any("classifier" in name for name in first)
    assert same(first, again)
    assert torch.equal(scores, rescored)
    assert not same(first, other)
    assert not torch.equal(scores, otherwise)


def test_a_fresh_head_does_not_depend_on_the_order_of_turns(bert_folder: Path) -> None:
    found = []
    for seeds in ((1, 2), (2, 1)):
        base, by_seed = Base(str(bert_folder), device="cpu"), {}
        for seed in seeds:
            with base.adapted("head", METHODS, seed=seed, labels=2) as model:
                by_seed[seed] = head_scorer(base).scores(model, ROWS)
        found.append(by_seed)
    assert all(torch.equal(found[0][seed], found[1][seed]) for seed in (1, 2))


def test_a_saved_fresh_head_is_the_same_in_another_base(base: Base, bert_folder: Path, tmp_path: Path) -> None:
    scorer = head_scorer(base)
    with base.adapted("head", METHODS, seed=4, labels=2) as model:
        fit(model, scorer, ROWS, LABELS, recipe=RECIPE)
        trained = scorer.scores(model, ROWS)
        inlay.save(model, tmp_path / "head")
    other = Base(str(bert_folder), device="cpu")
    with other.holding("head", tmp_path / "head", 2) as model:
        assert torch.equal(scorer.scores(model, ROWS), trained)


def test_random_states_outside_stay(base: Base) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    with base.adapted("head", METHODS, seed=1, labels=2):
        pass
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_text_is_cut_to_the_models_places_where_its_tokenizer_says_nothing_of_them(kind: str, tmp_path: Path) -> None:
    """RoBERTa has as many places as its table has rows behind the padding's."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "bert":
        tokenizer = toys.wordpiece(length=10**30)
        model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes))
    else:
        tokenizer = toys.byte_level(length=10**30)
        shape = {"max_position_embeddings": 34, "pad_token_id": 1, "type_vocab_size": 1}
        model = RobertaForMaskedLM(RobertaConfig(vocab_size=len(tokenizer), **shape, **sizes))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = Base(str(tmp_path), device="cpu")
    scorer = mask_scorer(base)
    with base.holding("masked-lm", None) as held:
        assert scorer.scores(held, [{"text": "a film " * 90}]).isfinite().all()
    (encoded,) = scorer.encode([{"text": "a film " * 90}])
    assert len(encoded) == 32
