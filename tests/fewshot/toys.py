"""Tokenizers of the three families, made from a word list, and masked language models whose answers are known."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from typing_extensions import override

WORDS = [
    *(
        "good",
        "bad",
        "great",
        "terrible",
        "fine",
        "wonderful",
        "awful",
        "yes",
        "no",
        "maybe",
        "news",
        "sports",
        "world",
    ),
    *("it", "was", "a", "the", "film", "movie", "really", "all", "in", "is", "to", "be", "nothing", "ever", "never"),
]
LETTERS = string.ascii_letters + string.digits + string.punctuation


def wordpiece(words: Sequence[str] = WORDS, first: Sequence[str] = (), length: int = 512) -> PreTrainedTokenizerFast:
    """BERT's kind, upper case kept: [CLS] … [SEP]; the words of `first` have the smallest ids, from 0."""
    pieces = [*first, "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{one}" for one in LETTERS), *words]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
        [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    special: Any = {name: f"[{name[:-6].upper()}]" for name in names}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **special)


def byte_level(words: Sequence[str] = WORDS, length: int = 512, trim: bool = True) -> PreTrainedTokenizerFast:
    """RoBERTa's kind: a word after a space is one token, elsewhere bytes; its mask takes the spaces before it."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = []
    for word in words:
        held = "Ġ"
        for letter in word:
            merges.append((held, letter))
            held += letter
            tokens.append(held)
    tokens = list(dict.fromkeys([*tokens, "<mask>"]))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges)), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", vocabulary["</s>"]), ("<s>", vocabulary["<s>"]), trim_offsets=trim, add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, bos_token="<s>", eos_token="</s>", sep_token="</s>",
        cls_token="<s>", unk_token="<unk>", pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True, normalized=False),
    )  # fmt: skip


def unigram(words: Sequence[str] = WORDS, length: int = 512) -> PreTrainedTokenizerFast:
    """XLM-R's kind: SentencePiece's unigrams with ▁ for a space."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [(token, 0.0) for token in special]
    pieces += [(f"▁{word}", -2.0 - index / 100) for index, word in enumerate(words)]
    pieces += [("▁", -6.0), *((letter, -8.0) for letter in LETTERS)]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("<mask>", 0.0)], unk_id=3, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", "<s> $A </s> </s> $B </s>", [("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, bos_token="<s>", eos_token="</s>", sep_token="</s>",
        cls_token="<s>", unk_token="<unk>", pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True, normalized=False),
    )  # fmt: skip


FAMILIES: dict[str, Callable[..., PreTrainedTokenizerFast]] = {
    "wordpiece": wordpiece,
    "byte-level": byte_level,
    "byte-level, whole offsets": lambda *args, **options: byte_level(*args, trim=False, **options),
    "unigram": unigram,
}


def tiny_bert(vocabulary: int, seed: int = 0, **options: Any) -> BertForMaskedLM:
    """BERT of 2 layers of 32, in eval mode; weights so large that what a token sees shows in its logits."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=vocabulary, max_position_embeddings=512, initializer_range=0.2, **{**shape, **options}
        )
        return BertForMaskedLM(config).eval()


class _Windows(nn.Module):
    """(batch, tokens) -> (batch, tokens, 4): the id before, the id itself, the id behind, and the place."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        left, right = input_ids.roll(1, 1), input_ids.roll(-1, 1)
        places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return BaseModelOutput(last_hidden_state=torch.stack([left, input_ids, right, places], -1).float())


class PlantedLM(PreTrainedModel):
    """A masked language model that says what `answer` says of (…, 4): ids before, at, behind, and the place."""

    config_class = PretrainedConfig
    base_model_prefix = "body"

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__(PretrainedConfig())
        self.body, self.answer = _Windows(), answer
        self.scale = nn.Parameter(torch.ones(()))

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> MaskedLMOutput:  # type: ignore[override]
        windows = self.body(input_ids, attention_mask).last_hidden_state
        return MaskedLMOutput(logits=self.answer(windows.long()) * self.scale)


def everywhere(logits: Tensor) -> PlantedLM:
    """The same logits (vocabulary,) at each place, whatever stands around it."""
    return PlantedLM(lambda windows: logits.expand(*windows.shape[:-1], -1))


def by_place(vocabulary: int, seed: int = 0) -> PlantedLM:
    """Random logits for each place, whatever stands around it: the positions are independent."""
    table = torch.randn(64, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2
    return PlantedLM(lambda windows: table[windows[..., 3]])


def markov(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> PlantedLM:
    """Logits that depend on the tokens just before and just behind; a mask there says nothing."""
    draw = torch.Generator().manual_seed(seed)
    before, behind = (torch.randn(len(tokenizer), len(tokenizer), generator=draw) * 2 for _ in range(2))
    for table in (before, behind):
        table[tokenizer.mask_token_id] = 0
    return PlantedLM(lambda windows: before[windows[..., 0]] + behind[windows[..., 2]])
