"""Compositions as YAML and JSON have them, {stack: [law, {average: [a, b], weights: [0.3, 0.7]}]}, and back.

name, null                              an adapter; the base
{stack: […]}, or the list by itself     Stack(…); the same for fuse, parallel
{average: […], weights: […]}            Average(…, weights=…); the weights may be left out
{batch_split: […], sizes: […]}          BatchSplit(…, sizes=…); the same for split
{adapter_drop: part, first: n}          AdapterDrop(part, first=n); [least, most] for a pair
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from inlay.combining.composition import AdapterDrop, Average, BatchSplit, Fuse, Parallel, Part, Split, Stack
from inlay.engine.composition import Composition
from inlay.errors import ConfigError, did_you_mean

FORMS: dict[str, tuple[Any, str | None]] = {
    "stack": (Stack, None),
    "parallel": (Parallel, None),
    "batch_split": (BatchSplit, "sizes"),
    "split": (Split, "sizes"),
    "average": (Average, "weights"),
    "fuse": (Fuse, None),
    "adapter_drop": (AdapterDrop, "first"),
}
"""By name, the composition and the one field that it has beside its parts."""
NEEDED = ("sizes", "first")


OWN = "default"
"""What a run's own adapter is called in its composition."""


def composed(tree: Any) -> Part:
    """The composition that plain data describe. Raises ConfigError for what is none."""
    if tree is None or isinstance(tree, str | Composition):
        return tree
    if isinstance(tree, list | tuple):
        return Stack(*map(composed, tree))
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"a composition is a name, a list, or a mapping such as {{stack: [law, poems]}}; got {tree!r}"
        )
    kinds = [key for key in tree if key in FORMS]
    if len(kinds) != 1:
        wrong = next((str(key) for key in tree if key not in FORMS), "")
        near = did_you_mean(wrong, FORMS) if not kinds else ""
        raise ConfigError(f"{dict(tree)!r} is no composition{near}: name one of {', '.join(FORMS)}, with its parts")
    (kind,) = kinds
    cls, field = FORMS[kind]
    for key in tree:
        if key not in (kind, field):
            takes = f"takes {field} beside its parts" if field else "takes its parts alone"
            raise ConfigError(f"{dict(tree)!r} has {key!r}, and {kind} {takes}")
    if field in NEEDED and tree.get(field) is None:
        raise ConfigError(f"{dict(tree)!r} needs {field}, as in {{{kind}: …, {field}: …}}")
    options = {} if field is None or tree.get(field) is None else {field: _field(tree[field], kind, field)}
    if cls is AdapterDrop:
        return AdapterDrop(composed(tree[kind]), **options)  # type: ignore[arg-type]  # it refuses the base itself
    parts = tree[kind]
    if not isinstance(parts, list | tuple):
        raise ConfigError(f"{dict(tree)!r}: {kind} takes a list of parts, as in {{{kind}: [law, poems]}}")
    made: Composition = cls(*map(composed, parts), **options)
    return made


def _field(value: Any, kind: str, field: str) -> Any:
    values = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in values):
        raise ConfigError(f"{kind}: {field} takes numbers, got {value!r}")
    if field == "first" and not isinstance(value, list | tuple):
        return value
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{kind}: {field} takes a list of numbers, got {value!r}")
    return tuple(value)


def plain(part: Part) -> Any:
    """A composition as plain data, which `composed` reads."""
    if part is None or isinstance(part, str):
        return part
    for kind, (cls, field) in FORMS.items():
        if type(part) is cls:
            inside = plain(part.part) if isinstance(part, AdapterDrop) else [plain(one) for one in parts_of(part)]
            value = None if field is None else getattr(part, field)
            more = {} if value is None else {str(field): list(value) if isinstance(value, tuple) else value}
            return {kind: inside, **more}
    raise ConfigError(f"{part!r} has no written form")


def parts_of(part: Part) -> tuple[Part, ...]:
    """What a composition is made of; nothing for a name and the base."""
    if isinstance(part, AdapterDrop):
        return (part.part,)
    found: tuple[Part, ...] = getattr(part, "parts", ())
    return found


def names_of(part: Part) -> list[str]:
    """Every adapter that is named, each once."""
    inside = [part] if isinstance(part, str) else [name for one in parts_of(part) for name in names_of(one)]
    return list(dict.fromkeys(inside))


def whole(tree: Any) -> str | Composition:
    """What a run runs: the composition, with the run's own adapter around it unless it names that itself."""
    part = composed(tree)
    if part is None:
        return OWN
    return part if OWN in names_of(part) else Stack(part, OWN)


def compositions_of(part: Part) -> Iterator[Composition]:
    """The composition and all in it."""
    if isinstance(part, Composition):
        yield part
        for one in parts_of(part):
            yield from compositions_of(one)
