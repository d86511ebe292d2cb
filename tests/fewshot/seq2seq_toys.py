"""A tokenizer of T5's kind, and a sequence-to-sequence model whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast


def t5_tokenizer(words: Sequence[str] = ("It", "was", "great", "bad", "a"), sign: str = "") -> PreTrainedTokenizerFast:
    """T5's kind; `sign` stands before its sentinels, as it does in mT5."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in words)]
    pieces += [(".", -3.0), ("..", -9.0), ("▁", -6.0), *((f"{sign}<extra_id_{n}>", -30.0) for n in (3, 2, 1, 0))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


class Planted(nn.Module):
    """A seq2seq whose next token depends on the example, the place and the last two tokens, by random tables."""

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.tables = nn.ParameterList(
            nn.Parameter(torch.randn(size, 16, generator=draw)) for size in (vocabulary, vocabulary, vocabulary, 32)
        )
        self.out = nn.Parameter(torch.randn(16, vocabulary, generator=draw) * 0.7)
        self.config = SimpleNamespace(decoder_start_token_id=0, vocab_size=vocabulary)
        self.calls = 0

    def get_encoder(self) -> Any:
        return lambda input_ids, attention_mask: (self.tables[0][input_ids] * attention_mask[..., None],)

    def forward(self, encoder_outputs: Any, attention_mask: Tensor, decoder_input_ids: Tensor, **_: Any) -> Any:
        self.calls += 1
        seen = encoder_outputs.last_hidden_state.sum(1, keepdim=True) / attention_mask.sum(-1)[:, None, None]
        last, before = decoder_input_ids, decoder_input_ids.roll(1, 1)
        places = torch.arange(last.shape[1])
        state = self.tables[1][last] + self.tables[2][before] + self.tables[3][places] + 2 * seen
        return SimpleNamespace(logits=state.tanh() @ self.out)
