"""Which column plays which role: by name where the name is one that the field uses, by content otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, LargeList, List, Value

from inlay.errors import ConfigError, DataError, did_you_mean
from inlay.tasks.data import place, source_name

TEXT = (
    "text",
    "sentence",
    "review",
    "content",
    "utterance",
    "tweet",
    "comment",
    "query",
    "headline",
    "title",
    "document",
    "body",
    "message",
    "question",
    "sentence1",
    "premise",
    "input",
)
LABEL = (
    "label",
    "labels",
    "class",
    "category",
    "intent",
    "sentiment",
    "emotion",
    "stance",
    "topic",
    "gold_label",
    "target",
    "y",
    "score",
    "similarity",
    "similarity_score",
    "rating",
    "stars",
)
PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("query", "document"),
    ("question", "answer"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
    ("sentence_a", "sentence_b"),
)
TOKENS = ("tokens", "words", "token", "word")
TAGS = ("tags", "ner_tags", "labels", "label", "pos_tags", "tag", "ner", "upos")
SOURCE = (
    "source",
    "prompt",
    "document",
    "article",
    "question",
    "dialogue",
    "input",
    "src",
    "meaning_representation",
    "text",
)
TARGET = (
    "target",
    "targets",
    "completion",
    "response",
    "output",
    "summary",
    "highlights",
    "answer",
    "reference",
    "references",
    "tgt",
    "label",
)
MESSAGES = ("messages", "conversations", "conversation")
IMAGE = (
    "image",
    "img",
    "image_path",
    "image_file",
    "picture",
    "photo",
    "file_name",
    "filename",
    "file",
    "path",
    "pixels",
)
AUDIO = (
    "audio",
    "sound",
    "speech",
    "recording",
    "wav",
    "audio_path",
    "audio_file",
    "file_name",
    "filename",
    "file",
    "path",
    "samples",
)
FEATURES = (
    "features",
    "image_features",
    "visual_features",
    "image_embedding",
    "image_embeddings",
    "embedding",
    "embeddings",
    "visual",
)
_LISTS = (List, LargeList)
_IDENTIFIERS = frozenset({"id", "idx", "index", "guid", "uid", "uuid", "row", "row_id"})


def named(rows: Dataset, names: Iterable[str], *, without: Iterable[str] = ()) -> str | None:
    """The first of `names` that is a column, whatever its capitals."""
    taken = set(without)
    columns = {column.lower(): column for column in reversed(rows.column_names) if column not in taken}
    return next((columns[name] for name in names if name in columns), None)


def text_columns(rows: Dataset, *, without: Iterable[str] = ()) -> list[str]:
    """Columns of strings, the one with the longest texts first (judged by the first 200 rows)."""
    sample = rows[: min(len(rows), 200)]
    lengths = {
        name: sum(len(text or "") for text in sample[name])
        for name, feature in rows.features.items()
        if name not in set(without) and isinstance(feature, Value) and feature.dtype in ("string", "large_string")
    }
    return sorted((name for name in lengths if name.lower() not in _IDENTIFIERS), key=lambda name: -lengths[name])


def list_columns(rows: Dataset, *, without: Iterable[str] = ()) -> list[str]:
    """Columns of lists, in their order."""
    return [name for name, feature in rows.features.items() if isinstance(feature, _LISTS) and name not in set(without)]


def other_columns(rows: Dataset, *, without: Iterable[str]) -> list[str]:
    """What is left: columns that are neither taken nor identifiers."""
    return [name for name in rows.column_names if name not in set(without) and name.lower() not in _IDENTIFIERS]


def guess_text(rows: Dataset, *, without: Iterable[str] = ()) -> str:
    """The column of texts, by its name, or else the one with the longest. Raises DataError where there is none."""
    candidates = text_columns(rows, without=without)
    column = named(rows, TEXT, without=set(rows.column_names) - set(candidates))
    if column is None and not candidates:
        raise cannot_guess(rows, "text")
    return column or candidates[0]


def check_roles(columns: Mapping[str, str], roles: Sequence[str], kind: str) -> None:
    """Raise ConfigError for a role that the task does not have."""
    for role in columns:
        if role not in roles:
            raise ConfigError(
                f"{kind} has no column role {role!r}{did_you_mean(role, roles)}; roles: {', '.join(roles)}"
            )


def require(rows: Dataset, column: str, role: str) -> None:
    """Raise DataError when the rows have no such column, naming those that there are."""
    if column not in rows.column_names:
        raise DataError(
            f"{source_name(rows)} has no column {column!r} (for the role {role})"
            f"{did_you_mean(column, rows.column_names)}; columns: {', '.join(rows.column_names)}. "
            f"Choose with --columns {role}=…"
        )


def parts(rows: Dataset, column: str) -> list[str]:
    """The columns that "a+b+c" names together; one name that is itself a column stays whole."""
    return [column] if column in rows.column_names else column.split("+")


def cannot_guess(rows: Dataset, role: str) -> DataError:
    """The error for a role that no column plays by its name or its content."""
    return DataError(
        f"{source_name(rows)}: which column is the {role}? Columns: {', '.join(rows.column_names)}. "
        f"Say it with --columns {role}=…"
    )


def values(rows: Dataset, column: str, role: str) -> list[Any]:
    """A column's values; numbered classes of a hub data set become their names, and its -1 (not given) becomes None."""
    require(rows, column, role)
    feature, cells = rows.features[column], rows[column][:]
    if isinstance(feature, ClassLabel):
        return [_class_name(feature, cell) for cell in cells]
    if isinstance(feature, _LISTS) and isinstance(feature.feature, ClassLabel):
        inner = feature.feature
        return [None if cell is None else [_class_name(inner, item) for item in cell] for cell in cells]
    return cells  # type: ignore[no-any-return]


def class_names(rows: Dataset, column: str) -> tuple[str, ...] | None:
    """The names that a hub data set gives a column's numbered classes, in their order."""
    feature = rows.features[column]
    if isinstance(feature, _LISTS):
        feature = feature.feature
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None


def texts(rows: Dataset, column: str, role: str, *, empty: bool = False) -> list[str]:
    """A column of texts. Raises DataError naming the first that is null, not a text or (unless `empty`) blank."""
    found = values(rows, column, role)
    for index, text in enumerate(found):
        if isinstance(text, int | float) and not isinstance(text, bool):
            found[index] = str(text)
        elif empty and text is None:
            found[index] = ""
        elif not isinstance(text, str) or not (text.strip() or empty):
            what = (
                "null" if text is None else "empty" if isinstance(text, str) else f"a {type(text).__name__}, not a text"
            )
            raise DataError(
                f"{place(rows, index)}: the {role} (column {column!r}) is {what}; fill it or leave the row out"
            )
    return found


def _class_name(feature: ClassLabel, cell: int | None) -> str | None:
    return None if cell is None or cell < 0 else feature.int2str(cell)
