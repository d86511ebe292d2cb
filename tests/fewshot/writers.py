"""Models that write, for the tests of choices: tiny random ones, and some whose distributions are planted."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from inlay.fewshot.base import Base

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "[MASK]", *"abcde", "good", "great", "bad", "fine", "terrible", "really"]
WORDS += ["It", "was", "movie", "film", "plot", ":", "?", ".", "N", "/", "A"]


def whole_words(frame: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, framed as in ["<s>", "$A"]."""
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = [(word, WORDS.index(word)) for word in frame if word != "$A"]
    made.post_processor = processors.TemplateProcessing(" ".join(frame), None, specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        mask_token="[MASK]",
    )  # fmt: skip


def byte_pieces() -> PreTrainedTokenizerFast:
    """A byte-level BPE without special tokens around a text, as GPT-2's; "terrible" is several tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    made.train_from_iterator(["the movie was great . It was good", "It was bad"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


def llama(vocabulary: int) -> Any:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=128, initializer_range=0.5,
    )).eval()  # fmt: skip


def gpt2(vocabulary: int) -> Any:
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=128, initializer_range=0.5,
    )).eval()  # fmt: skip


def mistral(vocabulary: int) -> Any:
    torch.manual_seed(1)
    return MistralForCausalLM(MistralConfig(
        vocab_size=vocabulary, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=128, sliding_window=3, initializer_range=0.5,
    )).eval()  # fmt: skip


def opt(vocabulary: int) -> Any:
    """A decoder whose head stands on a part of its body, and whose places are counted from the mask."""
    torch.manual_seed(1)
    return OPTForCausalLM(OPTConfig(
        vocab_size=vocabulary, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24,
        max_position_embeddings=128, word_embed_proj_dim=16, init_std=0.5,
    )).eval()  # fmt: skip


def gpt_neo(vocabulary: int) -> Any:
    """A decoder that sees three tokens back in every other layer, under a name of its own in the config."""
    torch.manual_seed(1)
    return GPTNeoForCausalLM(GPTNeoConfig(
        vocab_size=vocabulary, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        window_size=3, max_position_embeddings=128, initializer_range=0.5, bos_token_id=1, eos_token_id=2,
    )).eval()  # fmt: skip


def t5(vocabulary: int) -> Any:
    torch.manual_seed(1)
    return T5ForConditionalGeneration(T5Config(
        vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, dropout_rate=0.0,
    )).eval()  # fmt: skip


def bart(vocabulary: int) -> Any:
    torch.manual_seed(1)
    return BartForConditionalGeneration(BartConfig(
        vocab_size=vocabulary, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64,
        decoder_start_token_id=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, init_std=0.5,
    )).eval()  # fmt: skip


class Planted(nn.Module):
    """A decoder whose next token depends on the last token alone: log p(w | v) is a table's row, normalised."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.model = _Body()
        self.config = PretrainedConfig()

    @property
    def base_model(self) -> nn.Module:
        return self.model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        states = self.model(input_ids).last_hidden_state
        return SimpleNamespace(logits=self.table[states])


class _Body(nn.Module):
    def forward(self, input_ids: Tensor) -> Any:
        return _Output(last_hidden_state=input_ids)


class _Output(dict):  # type: ignore[type-arg]
    def __getitem__(self, key: Any) -> Any:
        return next(iter(self.values())) if key == 0 else super().__getitem__(key)

    @property
    def last_hidden_state(self) -> Tensor:
        return self["last_hidden_state"]


class _Copier(nn.Module):
    """The token that last followed the same three tokens, else the first token: what a copying model would say."""

    def forward(self, input_ids: Tensor) -> Any:
        said = torch.zeros_like(input_ids)
        for row, ids in enumerate(input_ids.tolist()):
            seen: dict[tuple[int, ...], int] = {}
            for at in range(2, len(ids)):
                here = tuple(ids[at - 2 : at + 1])
                said[row, at] = seen.get(here, 0)
                if at + 1 < len(ids):
                    seen[here] = ids[at + 1]
        return _Output(last_hidden_state=said)


class Copying(Planted):
    """A decoder that copies what followed the same words before, at odds of e⁵ to 1."""

    def __init__(self) -> None:
        super().__init__(5 * torch.eye(len(WORDS)))
        self.model = _Copier()


@dataclasses.dataclass(frozen=True)
class Held(Base):
    """A base whose model is given; `source` holds a config that says what it is."""

    made: Any = None
    words: Any = None

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        return self.words

    @contextlib.contextmanager
    def holding(self, auto: str, adapter: str | Path | None, labels: int = 0) -> Iterator[Any]:
        yield self.made


def held(made: Any, words: PreTrainedTokenizerFast, folder: Path) -> Held:
    """A base of a planted decoder."""
    GPT2Config(n_embd=4, n_layer=1, n_head=1).save_pretrained(folder)
    return Held(str(folder), made=made, words=words)
