"""Tokenizers of each kind, trained here on a few sentences of five scripts, and tiny models to go with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaTokenizer,
)

from inlay.tasks.loading import quiet

HAUSA = ["ina kwana yau", "yaya gida da aiki", "na gode sosai da sosai", "ruwa ya zo gida yau", "Ƙasa mai ɗaki"]
SWAHILI = ["habari ya asubuhi", "asante sana rafiki", "maji ya kunywa yako wapi", "ninapenda kusoma vitabu"]
OTHERS = [
    "доброе утро друзья",
    "спасибо большое",
    "καλημέρα φίλοι μου",
    "早上好 朋友 谢谢",
    "እንደምን አደርክ ወዳጄ",
    "שלום חבר יקר",
]
ENGLISH = [
    "the river runs through the valley",
    "thirty thieves thought that they thrilled the throne",
    "numbers 1984 and 42!",
]
CORPUS = (HAUSA + SWAHILI + OTHERS + ENGLISH) * 3
FAIRSEQ = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}


def unigram(size: int = 260, corpus: Sequence[str] = CORPUS) -> Any:
    """XLM-R's kind: special tokens first, the mask last."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)

    scores = dict(map(tuple, json.loads(tokenizer.to_str())["model"]["vocab"]))
    return XLMRobertaTokenizer(vocab=[(token, scores[token]) for token in vocabulary] + [("<mask>", 0.0)])


def sentencepiece_bpe(size: int = 300) -> Any:
    """Llama's kind: merges over ▁, and bytes for what it does not know; tokens have several merges."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(HAUSA + SWAHILI + ENGLISH, trainer)
    own = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    vocabulary = [*own[:3], *(f"<0x{byte:02X}>" for byte in range(256)), *own[3:]]
    known = set(own)
    merges = [(t[:at], t[at:]) for t in own[3:] for at in range(1, len(t)) if t[:at] in known and t[at:] in known]
    return LlamaTokenizer(vocab={token: row for row, token in enumerate(vocabulary)}, merges=merges)


def byte_bpe(size: int = 400, **special: str) -> Any:
    """GPT-2's and BART's kind: letters that stand for bytes, and an added token at the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = ["<s>", "<pad>", "</s>", "<unk>"] if special else []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if special:
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(special or {"eos_token": "<|endoftext|>"}))
    fast.add_tokens(["<speaker>"])
    return fast


def wordpiece(size: int = 330) -> Any:
    """BERT's kind."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=size, special_tokens=names, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), names, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def xlm_roberta() -> tuple[Any, Any]:
    """Tied, with a bias on the decoder; positions counted from the padding token; more rows than tokens."""
    tokenizer = unigram()
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer) + 7, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1,
    )  # fmt: skip
    return XLMRobertaForMaskedLM(config), tokenizer


def llama() -> tuple[Any, Any]:
    """Not tied."""
    tokenizer = sentencepiece_bpe()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def gpt2() -> tuple[Any, Any]:
    """Tied, without a bias; its end-of-text token is the last."""
    tokenizer = byte_bpe()
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=end, eos_token_id=end
    )
    return GPT2LMHeadModel(config), tokenizer


def bert() -> tuple[Any, Any]:
    """Tied, with a bias that the decoder shares with its head."""
    tokenizer = wordpiece()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    return BertForMaskedLM(config), tokenizer


def t5() -> tuple[Any, Any]:
    """Encoder and decoder share a table, and the head has its own."""
    tokenizer = wordpiece()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2, pad_token_id=0,
        eos_token_id=3, decoder_start_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), tokenizer


def bart() -> tuple[Any, Any]:
    """One table for all three, and a bias of logits that is a buffer."""
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = byte_bpe(**special)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    model.final_logits_bias.normal_()
    return model, tokenizer


HOSTS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "xlm_roberta": xlm_roberta, "llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5, "bart": bart,
}  # fmt: skip


def made(name: str) -> tuple[Any, Any]:
    """A model in eval mode with biases that are not zero, and its tokenizer."""
    torch.manual_seed(0)
    with quiet():
        model, tokenizer = HOSTS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), tokenizer
