"""Which methods there are, read off the files in `inlay/methods` without importing them (or torch).

A method's kind is the name of its file; its class is the frozen dataclass that the file defines. So adding a method
edits nothing here, and `inlay --help` costs no import. Methods over other adapters are files of `inlay/combining`,
those that a few-shot template or its words ask for files of `inlay/fewshot/methods`.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

PACKAGE = "inlay.methods"
COMBINING = "inlay.combining"
"""Where the methods over other adapters are, each in the file of its kind."""
FEWSHOT = "inlay.fewshot.methods"
"""Where the methods are that only few-shot systems put in, and that a file they left may name."""
_METHOD = re.compile(r"^@dataclasses\.dataclass\(frozen=True, kw_only=True\)\nclass (\w+)\(", re.MULTILINE)


@functools.cache
def files() -> dict[str, Path]:
    """Each method's file, by kind."""
    return _files(PACKAGE)


def _files(package: str) -> dict[str, Path]:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    folders = spec.submodule_search_locations or ()
    found = {path.stem: path for folder in folders for path in Path(folder).glob("[!_]*.py")}
    return {kind: found[kind] for kind in sorted(found)}


@functools.cache
def combining() -> dict[str, Path]:
    """The file of each method over other adapters, by kind."""
    found = _files(COMBINING).items()
    return {kind: path for kind, path in found if f'\n    kind = "{kind}"\n' in path.read_text(encoding="utf-8")}


def module_of(kind: str) -> str | None:
    """The module that defines the method `kind`; None when there is none."""
    if kind in files():
        return f"{PACKAGE}.{kind}"
    if kind in combining():
        return f"{COMBINING}.{kind}"
    return f"{FEWSHOT}.{kind}" if kind in _files(FEWSHOT) else None


def kinds() -> list[str]:
    """Every method's kind, sorted."""
    return list(files())


@functools.cache
def classes() -> dict[str, str]:
    """The name of every method class, and the module that has it."""
    return {
        name: f"{package}.{kind}"
        for package, found in ((PACKAGE, files()), (COMBINING, combining()))
        for kind, path in found.items()
        for name in _METHOD.findall(path.read_text(encoding="utf-8"))
    }
