"""Verbalizers: which words of the model's own vocabulary stand for which label.

    v: label -> one word or several;  a label's score is the mean over its words

A word is cut into tokens where it stands in the template, so that a space before it counts in the tokenizers where it
does, whatever their family. Words that do not exist in the vocabulary, that come to several tokens where one is asked
for, or that two labels share are errors which name the word and its pieces.

Schick & Schütze 2021, arXiv:2001.07676.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from inlay.errors import ConfigError, DataError, did_you_mean
from inlay.fewshot.prompts.template import Template


@dataclasses.dataclass(frozen=True)
class Verbalizer:
    """Label -> words. A plain string is one word (or one answer of several)."""

    words: Mapping[str, Sequence[str]]

    def __post_init__(self) -> None:
        if not isinstance(self.words, Mapping) or not self.words:
            raise ConfigError(f"a verbalizer is a mapping such as {{'neg': 'terrible'}}, got {self.words!r}")
        plain: dict[str, tuple[str, ...]] = {}
        for label, given in self.words.items():
            listed = tuple(given) if isinstance(given, list | tuple) else (given,)
            if not listed or not all(isinstance(word, str) and word.strip() for word in listed):
                got = f", got {given!r}" if given else ""
                raise ConfigError(f"the label {label!r} has no word: give it one as text, such as {label}=good{got}")
            plain[str(label)] = tuple(dict.fromkeys(word.strip() for word in listed))
        object.__setattr__(self, "words", plain)
        owners: dict[str, str] = {}
        for label, listed in plain.items():
            for word in listed:
                if owners.setdefault(word, label) != label:
                    raise ConfigError(f"the word {word!r} stands for both {owners[word]!r} and {label!r}")

    @classmethod
    def parse(cls, assignments: Iterable[str]) -> Verbalizer:
        """From `label=word` or `label=word,word`, as the command line has them."""
        words: dict[str, tuple[str, ...]] = {}
        for entry in assignments:
            label, equals, listed = entry.partition("=")
            if not equals or not label.strip():
                raise ConfigError(f"--verbalizer takes LABEL=WORD, such as neg=terrible; got {entry!r}")
            if label.strip() in words:
                raise ConfigError(f"--verbalizer gives the label {label.strip()!r} twice; write {label}=word,word")
            words[label.strip()] = tuple(word for word in listed.split(",") if word.strip())
        return cls(words)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the scores."""
        return tuple(self.words)

    def spoken(self, label: str) -> str:
        """What a demonstration of the label says: its first word. Raises DataError for a label that has none."""
        if label not in self.words:
            raise DataError(
                f"a demonstration has the label {label!r}{did_you_mean(label, self.words)}; the labels are: "
                f"{', '.join(self.words)}"
            )
        return self.words[label][0]

    def for_labels(self, labels: Sequence[str]) -> Verbalizer:
        """The same in the order of `labels`. ConfigError for a label without a word or a word without a label."""
        missing = [label for label in labels if label not in self.words]
        if missing:
            near = did_you_mean(missing[0], [label for label in self.words if label not in labels])
            raise ConfigError(
                f"the label {missing[0]!r} has no word{near}: the verbalizer has {', '.join(self.words)}, "
                f"the data {', '.join(labels)}"
            )
        beside = [label for label in self.words if label not in labels]
        if beside:
            raise ConfigError(
                f"the verbalizer has a word for {beside[0]!r}, which is no label of the data "
                f"({', '.join(labels)}){did_you_mean(beside[0], labels)}"
            )
        return Verbalizer({label: self.words[label] for label in labels})

    def remapped(self, words: Mapping[str, str | Sequence[str]]) -> Verbalizer:
        """With other words for some labels."""
        return Verbalizer({**self.words, **words})

    def tokens(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> dict[str, list[tuple[int, ...]]]:
        """Each label's words as token ids, cut as they are cut at the template's mask.

        Raises ConfigError for unknown words, words of more (or, for {mask*2}, fewer) tokens than masks, and words of
        two labels that are the same tokens.
        """
        before, width = template.before_mask(), template.masks
        every = [word for listed in self.words.values() for word in listed]
        cut = dict(zip(every, tokens_behind(every, tokenizer, before), strict=True))
        found = {label: [_known(word, cut[word], tokenizer) for word in listed] for label, listed in self.words.items()}
        owners: dict[tuple[int, ...], tuple[str, str]] = {}
        for label, listed in self.words.items():
            for word, ids in zip(listed, found[label], strict=True):
                pieces = tokenizer.convert_ids_to_tokens(list(ids))
                if width is not None and len(ids) != width:
                    advice = (
                        "choose a word that is one token, or write {mask*} for as many masks as the words need"
                        if width == 1
                        else f"choose words of {width} tokens, or write {{mask*}} for as many masks as the words need"
                    )
                    raise ConfigError(
                        f"{word!r} (for the label {label!r}) is {len(ids)} token{'s' * (len(ids) != 1)} to this "
                        f"tokenizer, {pieces}, and {template.source!r} has {width} mask{'s' * (width != 1)}: {advice}"
                    )
                other, owner = owners.setdefault(ids, (word, label))
                if owner != label:
                    raise ConfigError(
                        f"{other!r} (for {owner!r}) and {word!r} (for {label!r}) are the same tokens to this "
                        f"tokenizer, {pieces}: choose words that it can tell apart"
                    )
        # Words that are the same to this tokenizer, as Good and good where it knows no capitals, count once.
        return {label: list(dict.fromkeys(listed)) for label, listed in found.items()}


def word_tokens(word: str, tokenizer: PreTrainedTokenizerBase, before: str = "a ") -> tuple[int, ...]:
    """A word's token ids behind some text (`tokens_behind`). Raises ConfigError when the tokenizer does not know it."""
    return _known(word, tokens_behind([word], tokenizer, before)[0], tokenizer)


def _known(word: str, ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    if not ids or tokenizer.unk_token_id in ids:
        raise ConfigError(f"this tokenizer does not know the word {word!r}: choose another")
    return ids


def tokens_behind(words: Sequence[str], tokenizer: PreTrainedTokenizerBase, before: str) -> list[tuple[int, ...]]:
    """Each word's token ids behind some text: what the whole has more than the text without its last spaces.

    So a space is part of the word where the tokenizer's words begin with one. A word that would melt into the text
    is taken by itself.
    """

    def ids_of(texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return found

    stem = ids_of([before.rstrip(" ")])[0]
    wholes = ids_of([before + word for word in words])
    melted = [number for number, whole in enumerate(wholes) if whole[: len(stem)] != stem]
    by_themselves = dict(zip(melted, ids_of([words[number] for number in melted]), strict=True))
    return [tuple(by_themselves.get(number, whole[len(stem) :])) for number, whole in enumerate(wholes)]
