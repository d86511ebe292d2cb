"""Rows to prompts and completions, for the tasks that generate: pairs, instructions, and templates of one's own."""

from __future__ import annotations

import string
from collections.abc import Mapping

from datasets import Dataset

from inlay.errors import ConfigError, DataError, did_you_mean
from inlay.tasks import columns as named_columns
from inlay.tasks.columns import texts, values
from inlay.tasks.data import place, source_name

ALIASES = {"prompt": "source", "completion": "target"}
"""Other names of two roles; a source called "prompt" is put before its completion as it stands."""


def guess_pair(rows: Dataset, given: Mapping[str, str]) -> dict[str, str] | None:
    """Columns of instruction/input/target or source/target rows, or None where the rows are neither."""
    found = {role: column for role, column in given.items() if role in ("source", "target", "instruction", "input")}
    instruction = found.get("instruction") or named_columns.named(rows, ("instruction", "instructions"))
    if instruction is not None and "source" not in found:
        found["instruction"] = instruction
        extra = found.get("input") or named_columns.named(rows, ("input", "context"), without=found.values())
        found |= {"input": extra} if extra is not None else {}
    elif "source" not in found:
        source = named_columns.named(rows, named_columns.SOURCE, without=found.values())
        if source is None:
            return None
        found["source"] = source
    if "target" not in found:
        target = named_columns.named(rows, named_columns.TARGET, without=found.values())
        if target is None:
            return None
        found["target"] = target
    return {role: found[role] for role in ("instruction", "input", "source", "target") if role in found}


def default_template(columns: Mapping[str, str]) -> str:
    """How the columns become a prompt when nothing is said: instructions and sources end with a line end."""
    if "instruction" in columns:
        return "{instruction}\n{input}\n" if "input" in columns else "{instruction}\n"
    return "{source}" if columns.get("source", "").lower() == "prompt" else "{source}\n"


def prompts(rows: Dataset, columns: Mapping[str, str], template: str) -> list[str]:
    """The template filled in for every row; a line of it whose fields are all empty is left out.

    A field is a role ("source") or any column. Raises DataError where a source or instruction, or a whole prompt, is
    empty, and ConfigError for a field that is neither role nor column.
    """
    lines = [(line, _fields(line)) for line in template.splitlines(keepends=True)]
    cells: dict[str, list[str]] = {}
    for field in dict.fromkeys(name for _, fields in lines for name in fields):
        column = columns.get(field, field)
        if field not in columns and field not in rows.column_names:
            options = [*columns, *rows.column_names]
            raise ConfigError(
                f"prompt_template {template!r} has the field {field!r}{did_you_mean(field, options)}; "
                f"fields: {', '.join(dict.fromkeys(options))}"
            )
        cells[field] = texts(rows, column, field, empty=field not in ("source", "instruction"))
    filled = []
    for index in range(len(rows)):
        row = {field: found[index] for field, found in cells.items()}
        kept = [
            line.format_map(row) for line, fields in lines if not fields or any(row[field].strip() for field in fields)
        ]
        filled.append("".join(kept))
        if not filled[-1].strip():
            raise DataError(f"{place(rows, index)}: the prompt is empty; fill its columns or leave the row out")
    return filled


def references(rows: Dataset, column: str) -> list[list[str]] | None:
    """Row by row the texts to generate (several where the column holds lists); None where the rows have none.

    Published data often has "target" in training and "targets" in test: a missing column is looked for in the other
    number.
    """
    if column not in rows.column_names:
        column = column.removesuffix("s") if column.endswith("s") else f"{column}s"
    if column not in rows.column_names:
        return None
    cells = values(rows, column, "target")
    if all(cell is None for cell in cells):
        return None
    if not any(isinstance(cell, list) for cell in cells):
        return [[text] for text in texts(rows, column, "target")]
    for index, cell in enumerate(cells):
        if not cell or not all(isinstance(text, str) and text.strip() for text in cell):
            raise DataError(
                f"{place(rows, index)}: the targets (column {column!r}) are empty or hold an empty text; "
                f"fill them or leave the row out"
            )
    return cells


def need_references(rows: Dataset, column: str) -> list[list[str]]:
    """`references`, or DataError where there are none."""
    found = references(rows, column)
    if found is None:
        raise DataError(
            f"{source_name(rows)} has no targets (column {column!r}); columns: {', '.join(rows.column_names)}"
        )
    return found


def _fields(template: str) -> list[str]:
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(
            f"prompt_template {template!r} cannot be read ({error}); write {{{{ and }}}} for braces"
        ) from error
