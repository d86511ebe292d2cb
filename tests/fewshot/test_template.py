"""A template says what an example looks like in words; what cannot be read is an error that names the fix."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from inlay.errors import ConfigError, DataError
from inlay.fewshot.prompts.template import FILTERS, Piece, Template

ROW = {"text": "Slow, dull!", "other": "It ends."}


def shown(source: str, **options: object) -> str:
    return str(Template(source).render(ROW, **options))  # type: ignore[arg-type]


def test_parts_are_read_in_order() -> None:
    template = Template("{text} It was {mask}. {soft:2}{sep}{other:keep}")
    assert [part.kind for part in template.parts] == ["field", "text", "mask", "text", "soft", "sep", "field"]
    assert template.columns == ("text", "other")
    assert [part.cut for part in template.parts if part.kind == "field"] == [True, False]
    assert str(template.render(ROW)) == "Slow, dull! It was [mask]. [soft][sep]It ends."


@pytest.mark.parametrize(
    ("source", "masks"), [("{text}{mask}", 1), ("{text}{mask*3}", 3), ("{mask}{text}{mask*2}", 3), ("{text}", 0)]
)
def test_masks_are_counted(source: str, masks: int) -> None:
    assert Template(source).masks == masks
    assert sum(piece.kind == "mask" for piece in Template(source).render(ROW).before) == masks


def test_a_mask_as_wide_as_the_words_has_no_number_of_its_own() -> None:
    assert Template("{text} {mask*}").need_mask().masks is None
    assert shown("{text} {mask*}.", masks=3) == "Slow, dull! [mask][mask][mask]."


def test_filters_change_the_cell_alone() -> None:
    assert shown("{text|lower_first|strip_punctuation} So {mask}") == "slow, dull So [mask]"
    assert shown("{text | lower} X {mask}") == "slow, dull! X [mask]"
    for name, change in FILTERS.items():
        assert shown("{text|" + name + "}") == change(ROW["text"])


def test_braces_in_cells_and_in_doubled_braces_are_only_braces() -> None:
    row = {"text": "{mask} {__class__} {{}} %s"}
    assert str(Template("{{{text}}} {mask}").render(row)) == "{{mask} {__class__} {{}} %s} [mask]"
    pieces = Template("{text}: {mask}").render(row).before
    assert pieces[0] == Piece("text", row["text"], cut=True)  # a cell is one piece, whatever stands in it


def test_cells_that_are_no_text() -> None:
    assert str(Template("{text}|{mask}").render({"text": None})) == "|[mask]"
    assert str(Template("{text}|{mask}").render({"text": 3})) == "3|[mask]"


def test_words_stand_in_place_of_masks() -> None:
    assert shown("{text} It was {mask}.", fill="great") == "Slow, dull! It was great."
    assert shown("{text} {mask*}.", fill="sports news") == "Slow, dull! sports news."
    assert shown("{mask} {text} {mask}.", fill="yes sir") == "yes Slow, dull! sir."
    assert shown("{mask} {text} {mask}.", fill="yes") == "yes Slow, dull! ."


def test_demonstrations_stand_behind_or_where_it_is_said() -> None:
    demos = [({"text": "A"}, "good"), ({"text": "B"}, "bad")]
    row = {"text": "x"}
    behind = Template("{text}: {mask}.").render(row, demonstrations=demos)
    assert str(behind) == "x: [mask]. A: good. B: bad."
    before = Template("{demos}{text}: {mask}.").render(row, demonstrations=demos, between="\n")
    assert str(before) == "A: good.\nB: bad.\nx: [mask]."
    assert sum(piece.kind == "mask" for piece in [*before.before, *before.after]) == 1
    assert not any(piece.kind == "mask" for demo in before.demonstrations for piece in demo)


def test_the_text_before_the_mask_stands_on_a_letter_for_a_column() -> None:
    assert Template("{text} It was {mask}.").before_mask() == "a It was "
    assert Template("{text}{mask}").before_mask() == "a"
    assert Template("{mask}: {text}").before_mask() == ""
    assert Template("{text}{sep}so {mask}").before_mask() == "so "


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "a template is text"),
        ("It was {mask}.", "shows nothing of an example"),
        ("{text} {", "position 7"),
        ("{text} {}", "position 7"),
        ("{text} }", "position 7"),
        ("{text} {mask*0}", "at least one mask"),
        ("{text} {soft:}", "say how many"),
        ("{text} {soft:0}", "say how many"),
        ("{text} {soft:00}", "say how many"),
        ("{text} {mask*00}", "at least one mask"),
        ("{text} {mask|lower}", "filters are for columns"),
        ("{text|lowr} {mask}", "did you mean 'lower'"),
        ("{text:cutt} {mask}", "which is neither"),
        ("{text} {mask*two}", "which is neither"),
    ],
)
def test_what_cannot_be_read_is_an_error(source: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Template(source)


def test_a_mask_is_needed_where_one_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"has no \{mask\}"):
        Template("{text}").need_mask()
    with pytest.raises(ConfigError, match="beside another mask"):
        Template("{mask} {text} {mask*}").need_mask()


def test_columns_that_the_rows_lack_are_named() -> None:
    with pytest.raises(DataError, match="did you mean 'sentence'"):
        Template("{sentense} {mask}").check(SimpleNamespace(column_names=["sentence", "label"]))
    with pytest.raises(DataError, match="no such column"):
        Template("{text} {mask}").render({"label": "x"})


def test_a_slot_named_by_a_sign_that_is_no_number_starts_as_it() -> None:
    (part,) = Template("{text} {soft:²}").soft
    assert (part.text, part.count) == ("²", None)
