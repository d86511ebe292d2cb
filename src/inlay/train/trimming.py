"""`trim(model, data, out)`: a base model's folder without the tokens that the data never uses."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from inlay.errors import ConfigError
from inlay.tasks.columns import guess_text, texts
from inlay.tasks.data import read_rows
from inlay.tasks.loading import load_pretrained, load_tokenizer, quiet
from inlay.tasks.vocabulary import trim_vocabulary
from inlay.train.files import staged


@dataclasses.dataclass(frozen=True)
class TrimmedFolder:
    """What `trim` wrote."""

    out: str
    tokens_before: int
    tokens: int
    share: float | None
    """Of the data's tokens, how many were kept."""
    bytes_before: int
    bytes: int
    """Of the weights."""
    report: str


def trim(
    model: str,
    data: Sequence[str],
    out: str | Path,
    *,
    text: str | None = None,
    min_count: int = 1,
    scripts: Sequence[str] | None = None,
    overwrite: bool = False,
) -> TrimmedFolder:
    """Trim the vocabulary of a model (a folder or hub id) to the texts of `data` (files or folders) and to `scripts`;
    write model and tokenizer to `out`, a plain transformers folder. `text` names the column where it is not recognised.

    Raises what `trim_vocabulary` and reading raise; then nothing is written.
    """
    out = Path(out)
    if out.exists() and not overwrite and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already: choose another folder, or --overwrite to replace it")
    tables = [read_rows(source, split="train") for source in data]
    columns = [texts(rows, text or guess_text(rows), "text") for rows in tables]
    tokenizer = load_tokenizer(model)
    whole = load_pretrained(_class_of(model), model, purpose="trimming", new_head=False)
    given = itertools.chain.from_iterable(columns) if columns else None
    small = trim_vocabulary(whole, tokenizer, given, min_count=min_count, scripts=scripts)
    with staged(out, "writing the trimmed model to") as folder, quiet():
        small.model.save_pretrained(folder)
        small.tokenizer.save_pretrained(folder)
    return TrimmedFolder(
        out=str(out),
        tokens_before=small.tokens_before,
        tokens=len(small.kept),
        share=small.share,
        bytes_before=small.bytes_before,
        bytes=small.bytes_after,
        report=str(small),
    )


def _class_of(model: str) -> Any:
    """The class that the model was saved as, head and all."""
    try:
        names = transformers.AutoConfig.from_pretrained(model).architectures
    except (OSError, ValueError):
        names = None  # loading says what is wrong
    return getattr(transformers, names[0], transformers.AutoModel) if names else transformers.AutoModel
