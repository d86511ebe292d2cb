"""Tiny models with real tokenizers, on disk as a user has them, shared by all tests of tasks."""

from __future__ import annotations

import importlib.util
import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from inlay.tasks.loading import quiet

LETTERS = string.ascii_lowercase + string.digits + string.punctuation
WORDS = ["the", "film", "##ing", "##s", "good", "bad", "card", "where", "is", "my", "a", "of", "and", "to"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, letters and a few words as pieces, [CLS] … [SEP]."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {
        name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    }
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, model_input_names=names, **special)


def byte_tokenizer(*, append_eos: bool, length: int = 512, **special: str) -> PreTrainedTokenizerFast:
    """One token a byte: whatever is encoded can be decoded exactly."""
    tokens = ["<pad>", "</s>", "<s>", *BYTES]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if append_eos:
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", **special}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], model_max_length=length, **names
    )


def saved(folder: Path, build: Callable[[], Any], tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    with quiet():
        build().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def bert(models_folder: Path) -> Path:
    """BERT of 2 layers of 32 with its masked-language-model head."""
    tokenizer = wordpiece_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128,
    )  # fmt: skip
    return saved(models_folder / "bert", lambda: BertForMaskedLM(config), tokenizer)


@pytest.fixture(scope="session")
def llama(models_folder: Path) -> Path:
    """Llama of 2 layers of 32 over bytes; larger weights than usual, so that what a token sees shows in its logits."""
    tokenizer = byte_tokenizer(append_eos=False, bos_token="<s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=512, initializer_range=0.3, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    return saved(models_folder / "llama", lambda: LlamaForCausalLM(config), tokenizer)


@pytest.fixture(scope="session")
def gpt2(models_folder: Path) -> Path:
    """GPT-2 of 2 layers of 32 over bytes: absolute positions, no padding token of its own."""
    tokenizer = byte_tokenizer(append_eos=False, length=256)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=256, initializer_range=0.3,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return saved(models_folder / "gpt2", lambda: GPT2LMHeadModel(config), tokenizer)


@pytest.fixture(scope="session")
def t5(models_folder: Path) -> Path:
    """T5 of 2 + 2 layers of 32 over bytes."""
    tokenizer = byte_tokenizer(append_eos=True)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return saved(models_folder / "t5", lambda: T5ForConditionalGeneration(config), tokenizer)


@pytest.fixture(scope="session")
def tiny_llama() -> ModuleType:
    """The script examples/tiny_llama_tokenizer.py as a module."""
    path = Path(__file__).resolve().parents[2] / "examples" / "tiny_llama_tokenizer.py"
    spec = importlib.util.spec_from_file_location("tiny_llama_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def stories(models_folder: Path, shared_data: Path, tiny_llama: ModuleType) -> Path:
    """The real 260k-parameter story teller, with a tokenizer made by the example script."""
    tiny_llama.convert(shared_data / "weights" / "stories260k", models_folder / "stories")
    return models_folder / "stories"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (as JSON Lines) or text to a file."""

    def writer(name: str, content: str | bytes | Sequence[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return path

    return writer
