"""The tiny model and rows of the training tests, and two tiny models that generate, for checking what the pages say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train.tiny_runs import rows, tiny_model

__all__ = ["rows", "tiny_decoder", "tiny_model", "tiny_translator"]


@pytest.fixture(scope="session")
def tiny_decoder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 1 layer with the tiny model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(vocab_size=20, pad_token_id=0, bos_token_id=2, eos_token_id=3, **sizes)
    return _saved(LlamaForCausalLM, config, tiny_model, tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="session")
def tiny_translator(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of 1 + 1 layers with the tiny model's tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=3,
        decoder_start_token_id=0,
    )  # fmt: skip
    return _saved(T5ForConditionalGeneration, config, tiny_model, tmp_path_factory.mktemp("translator"))


def _saved(cls: type, config: object, tokenizer: Path, folder: Path) -> Path:
    from transformers import AutoTokenizer

    from inlay.tasks.loading import quiet

    torch.manual_seed(0)
    with quiet():
        cls(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder
