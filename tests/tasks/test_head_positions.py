"""A head at chosen positions gives the same scores as one at all of them, also behind soft prompts."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

import inlay
from inlay.tasks.head_positions import can_choose, head_at, logits_at

SIZES = {"vocab_size": 50, "max_position_embeddings": 40}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, **SIZES}
MODELS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**BERT)),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, **SIZES)
    ),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny masked language model."""
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@pytest.mark.parametrize("prompts", [False, True])
def test_the_scores_and_the_loss_are_those_of_the_whole_head(model: PreTrainedModel, prompts: bool) -> None:
    if prompts:
        inlay.attach(model, inlay.PromptTuning(num_virtual_tokens=3))
    torch.manual_seed(1)
    ids = torch.randint(5, 50, (3, 9))
    attention = torch.ones_like(ids)
    attention[1, 6:] = 0
    chosen = (torch.rand(3, 9) < 0.4) & attention.bool()
    labels = ids.masked_fill(~chosen, -100)
    whole = model(input_ids=ids, attention_mask=attention, labels=labels)
    with head_at(model, chosen):
        found = model(input_ids=ids, attention_mask=attention, labels=ids[chosen][:, None])
    assert can_choose(model)
    assert found.logits.shape == (int(chosen.sum()), 1, 50)
    torch.testing.assert_close(
        found.logits[:, 0], whole.logits[:, -9:][chosen], rtol=0, atol=1e-6
    )  # another matmul shape
    torch.testing.assert_close(found.loss, whole.loss, rtol=1e-6, atol=0)
    assert not model.base_model._forward_hooks


def test_an_ensemble_of_prompts_is_asked_at_all_places(model: PreTrainedModel) -> None:
    inlay.attach(model, inlay.PromptTuning(num_virtual_tokens=3, ensemble=2))
    ids = torch.arange(5, 23).view(2, 9)
    chosen = ids % 4 == 0
    found = logits_at(model, chosen, input_ids=ids)
    assert not can_choose(model)
    torch.testing.assert_close(found, model(input_ids=ids).logits[:, -9:][chosen])
