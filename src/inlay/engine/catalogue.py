"""Which methods there are, read off the files in `inlay/methods` without importing them (or torch).

A method's kind is the name of its file; its class is the frozen dataclass that the file defines. So adding a method
edits nothing here, and `inlay --help` costs no import.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

PACKAGE = "inlay.methods"
_METHOD = re.compile(r"^@dataclasses\.dataclass\(frozen=True, kw_only=True\)\nclass (\w+)\(", re.MULTILINE)


@functools.cache
def files() -> dict[str, Path]:
    """Each method's file, by kind."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    folders = spec.submodule_search_locations or ()
    found = {path.stem: path for folder in folders for path in Path(folder).glob("[!_]*.py")}
    return {kind: found[kind] for kind in sorted(found)}


def kinds() -> list[str]:
    """Every method's kind, sorted."""
    return list(files())


@functools.cache
def classes() -> dict[str, str]:
    """The name of every method class, and the module that has it."""
    return {
        name: f"{PACKAGE}.{kind}"
        for kind, path in files().items()
        for name in _METHOD.findall(path.read_text(encoding="utf-8"))
    }
