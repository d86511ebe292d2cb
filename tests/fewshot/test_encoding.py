"""Examples as token ids: whatever the texts and their lengths are, template text and masks stay, and all of it fits."""

from __future__ import annotations

import itertools
import random

import pytest
from transformers import PreTrainedTokenizerFast

from inlay.errors import ConfigError
from inlay.fewshot.prompts.encoding import Encoded, Encoder
from inlay.fewshot.prompts.template import Template

ALPHABET = [*"abcxyz  ..!(é好\n", "good", " movie", " terrible", "    ", "[MASK]", "<mask>", "[SEP]", "</s>", " it was"]
TEMPLATES = [
    "{a} It was {mask}.",
    "{mask}: {a} {b}",
    "{a}{mask}{b}",
    "{a}. (all in all) {b:keep}{sep}Yes? {mask*2}!",
]


def random_text(draw: random.Random, most: int) -> str:
    return "".join(draw.choice(ALPHABET) for _ in range(draw.randint(0, most)))


def spelled(text: str, tokenizer: PreTrainedTokenizerFast, masks: str = "[mask]") -> str:
    return text.replace(masks, str(tokenizer.mask_token)).replace("[sep]", str(tokenizer.sep_token))


def fixed_tokens(template: Template, tokenizer: PreTrainedTokenizerFast, row: dict[str, str]) -> int:
    """Tokens of the template without the columns that may be cut."""
    bare = {part.text: row[part.text] if not part.cut else "" for part in template.parts if part.kind == "field"}
    return len(Encoder(template, tokenizer, 512)([template.render(bare)])[0])


def check(encoded: Encoded, template: Template, tokenizer: PreTrainedTokenizerFast, row: dict[str, str]) -> None:
    """Its masks are the template's own, and the template's letters are all there, in their order."""
    assert len(encoded.masks) == template.masks
    assert all(encoded.ids[place] == tokenizer.mask_token_id for place in encoded.masks)
    bare = [piece.text for piece in template.render(dict.fromkeys(row, "")).before if piece.kind == "text"]
    left = tokenizer.decode(encoded.ids, clean_up_tokenization_spaces=False).replace(" ", "").replace("##", "")
    at = 0
    for text in bare:
        found = left.find(text.replace(" ", ""), at)
        assert found >= 0, (text, left)
        at = found + len(text.replace(" ", ""))


@pytest.mark.parametrize("source", TEMPLATES)
def test_whatever_the_text_it_fits_and_keeps_template_and_masks(
    source: str, any_tokenizer: PreTrainedTokenizerFast
) -> None:
    draw, template = random.Random(source), Template(source)
    for _ in range(60):
        row = {"a": random_text(draw, 60), "b": random_text(draw, 8 if ":keep" in source else 60)}
        fixed = fixed_tokens(template, any_tokenizer, row) + 3  # a column's first letter may join the template's text
        length = draw.randint(fixed, fixed + 40)
        encoded = Encoder(template, any_tokenizer, length)([template.render(row)])[0]
        assert len(encoded) <= length
        check(encoded, template, any_tokenizer, row)
        whole = Encoder(template, any_tokenizer, 512)([template.render(row)])[0]
        assert encoded.cut == max(len(whole) - length, 0)
        assert len(encoded) == min(len(whole), length)


@pytest.mark.parametrize("source", TEMPLATES)
def test_what_fits_is_what_the_tokenizer_makes_of_the_whole_string(
    source: str, any_tokenizer: PreTrainedTokenizerFast
) -> None:
    draw, template = random.Random(source), Template(source)
    encoder = Encoder(template, any_tokenizer, 512)
    rows = [{"a": random_text(draw, 20), "b": random_text(draw, 20)} for _ in range(30)]
    demos = [({"a": random_text(draw, 9), "b": random_text(draw, 9)}, "good"), ({"a": "x", "b": "y"}, "bad")]
    rendered = [template.render(row, demonstrations=demos) for row in rows]
    for one, encoded in zip(rendered, encoder(rendered), strict=True):
        text = "".join(
            {"mask": any_tokenizer.mask_token, "sep": any_tokenizer.sep_token}.get(piece.kind, piece.text)
            for piece in [*one.before, *(piece for demo in one.demonstrations for piece in demo), *one.after]
        )
        assert encoded.ids == any_tokenizer(text)["input_ids"]
        assert (encoded.cut, encoded.demonstrations) == (0, 2)


def test_a_mask_token_in_a_users_text_is_text(any_tokenizer: PreTrainedTokenizerFast) -> None:
    template, mask = Template("{text} It was {mask}."), str(any_tokenizer.mask_token)
    encoder = Encoder(template, any_tokenizer, 64)
    plain, tricky = encoder([template.render({"text": text}) for text in ("so so", f"so {mask} {mask}")])
    assert len(plain.masks) == len(tricky.masks) == 1
    assert tricky.masks[0] == max(
        place for place, token in enumerate(tricky.ids) if token == any_tokenizer.mask_token_id
    )


def test_a_mask_that_takes_the_spaces_before_it_is_still_the_mask(any_tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template("{text}{mask}")  # twenty of the user's spaces become part of some tokenizers' mask
    encoded = Encoder(template, any_tokenizer, 12)([template.render({"text": "no" + " " * 20})])[0]
    assert [encoded.ids[place] for place in encoded.masks] == [any_tokenizer.mask_token_id]


def test_a_text_of_nothing_but_spaces_is_cut_like_any_other(any_tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template("{text}. It was {mask}.")
    encoded = Encoder(template, any_tokenizer, 20)([template.render({"text": "   " * 50})])[0]
    assert len(encoded) <= 20
    assert len(encoded.masks) == 1


def test_the_longest_column_loses_its_end_first(any_tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template("{a} / {b} / {mask}")
    row = {"a": " ".join("bcdfghijkl"), "b": " ".join("mnopq")}
    whole = Encoder(template, any_tokenizer, 512)([template.render(row)])[0]
    known = any_tokenizer.convert_ids_to_tokens(whole.ids)

    def letters(length: int) -> tuple[str, str]:
        ids = Encoder(template, any_tokenizer, length)([template.render(row)])[0].ids
        text = any_tokenizer.decode(ids, skip_special_tokens=True).replace("▁", " ")
        first, second, _ = text.split("/")
        return tuple("".join(ch for ch in part if ch.isalpha()) for part in (first, second))  # type: ignore[return-value]

    counts = [letters(len(known) - gone) for gone in range(9)]
    assert counts[0] == ("bcdfghijkl", "mnopq")
    for (a, b), (shorter_a, shorter_b) in itertools.pairwise(counts):
        assert a.startswith(shorter_a)
        assert b.startswith(shorter_b)
    assert all(b == "mnopq" for a, b in counts if len(a) > 5)
    assert abs(len(counts[-1][0]) - len(counts[-1][1])) <= 1


def test_demonstrations_go_whole_and_from_the_last_before_anything_is_cut(
    any_tokenizer: PreTrainedTokenizerFast,
) -> None:
    template = Template("{text} It was {mask}.")
    demos = [({"text": f"{letter} " * 6}, "good") for letter in "bcx"]
    row = {"text": "z " * 8}
    lengths = [
        len(Encoder(template, any_tokenizer, 512)([template.render(row, demonstrations=demos[:n])])[0])
        for n in range(4)
    ]
    for length in range(lengths[0] - 3, lengths[3] + 1):
        encoded = Encoder(template, any_tokenizer, length)([template.render(row, demonstrations=demos)])[0]
        fits = max((n for n in range(4) if lengths[n] <= length), default=0)
        assert encoded.demonstrations == fits
        assert encoded.cut == max(lengths[0] - length, 0)
        text = any_tokenizer.decode(encoded.ids)
        assert [letter in text for letter in "bcx"] == [n < fits for n in range(3)]
        assert len(encoded.masks) == 1


def test_columns_of_demonstrations_are_kept_to_their_length(tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template("{text} It was {mask}.")
    encoder = Encoder(template, tokenizer, 128, demonstration_tokens=2)
    demos = [({"text": "b c d f"}, "good")]
    encoded = encoder([template.render({"text": "x y z x"}, demonstrations=demos)])[0]
    assert tokenizer.convert_ids_to_tokens(encoded.ids)[1:-1] == (
        ["x", "y", "z", "x", "I", "##t", "was", "[MASK]", ".", "b", "c", "I", "##t", "was", "good", "."]
    )


def test_a_long_example_leaves_short_demonstrations_their_room(any_tokenizer: PreTrainedTokenizerFast) -> None:
    """With demonstrations of limited length the example gives way first, down to half; then they go."""
    template = Template("{text} It was {mask}.")
    demos = [({"text": f"{letter} " * 40}, "good") for letter in "bc"]
    short, long = ({"text": "z " * count} for count in (2, 200))
    together = Encoder(template, any_tokenizer, 512, 4)([template.render(short, demonstrations=demos)])[0]
    alone = Encoder(template, any_tokenizer, 512)([template.render(short)])[0]
    needed = len(together) - len(alone)  # the demonstrations'
    for length in range(2 * needed - 12, 2 * needed + 12, 3):
        found = Encoder(template, any_tokenizer, length, 4)([template.render(long, demonstrations=demos)])[0]
        assert len(found) <= length
        assert len(found.masks) == 1
        if needed <= length - length // 2:
            assert found.demonstrations == 2
            assert len(found) == length, "nothing goes that has room"
        else:
            assert found.demonstrations < 2
    whole = Encoder(template, any_tokenizer, 512, 4)([template.render(long, demonstrations=demos)])[0]
    assert (whole.demonstrations, whole.cut) == (2, 0)
    bare = Encoder(template, any_tokenizer, 64, 4)([template.render(long)])[0]
    assert len(bare) == 64, "alone it has all the room"


def test_soft_slots_have_numbered_places(tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template("{soft:2}{text}{soft:good news} {mask}")
    encoder = Encoder(template, tokenizer, 64)
    assert encoder.soft_words == [[None, None], [tokenizer.convert_tokens_to_ids(word) for word in ("good", "news")]]
    encoded = encoder([template.render({"text": "b c"})])[0]
    assert encoded.slots == ((1, 0), (2, 1), (5, 2), (6, 3))
    assert encoded.masks == (7,)


def test_what_cannot_fit_is_an_error_with_its_numbers(any_tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template("{text:keep} It was {mask}.")
    with pytest.raises(ConfigError, match=r"the model is given 10: raise max_length"):
        Encoder(template, any_tokenizer, 10)([template.render({"text": "b " * 30})])


def test_needed_special_tokens_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]")
    template = Template("{text} {mask}")
    with pytest.raises(ConfigError, match="needs a mask token"):
        Encoder(template, bare, 16)([template.render({"text": "b"})])
