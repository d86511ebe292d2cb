"""Tokenizers and tiny models of the few-shot tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from fewshot import toys
from transformers import BertForMaskedLM, PreTrainedTokenizerFast


@pytest.fixture(scope="session", params=list(toys.FAMILIES))
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """A tokenizer of each family in turn."""
    return toys.FAMILIES[request.param]()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """BERT's kind."""
    return toys.wordpiece()


@pytest.fixture
def bert(tokenizer: PreTrainedTokenizerFast) -> BertForMaskedLM:
    """A tiny random masked language model of that tokenizer, fresh for each test."""
    return toys.tiny_bert(len(tokenizer))


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The same on disk, as a base model."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    toys.tiny_bert(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
