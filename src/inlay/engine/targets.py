"""Reading what users write for `targets`, `exclude` and `layers`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from inlay.engine.roles import known_role
from inlay.errors import TargetError

if TYPE_CHECKING:
    from inlay.engine.sites import Site


def split_items(targets: str | Sequence[str]) -> list[str]:
    """The items of a target: split at commas that stand outside brackets (a regular expression may hold some)."""
    if not isinstance(targets, str):
        return [item for target in targets for item in split_items(target)]
    items, depth, escaped, current = [], 0, False, ""
    for character in targets:
        depth += (not escaped) * ((character in "([{") - (character in ")]}"))
        if character == "," and depth <= 0:
            items.append(current)
            current = ""
        else:
            current += character
        escaped = character == "\\" and not escaped
    return [item for item in (item.strip() for item in [*items, current]) if item]


def compile_regex(item: str) -> re.Pattern[str]:
    """The pattern of a "re:…" item. Raises TargetError when it is not a regular expression."""
    try:
        return re.compile(item.removeprefix("re:"))
    except re.error as error:
        raise TargetError(f"target {item!r} is not a regular expression: {error}") from error


def by_role(item: str) -> Callable[[Site], bool]:
    """Whether a site plays the role that an item names, or is one of all linears."""
    if item == "all-linear":
        return _in_all_linear
    role = known_role(item.removeprefix("role:"))
    return lambda site: role in site.roles


def _in_all_linear(site: Site) -> bool:
    linear = site.kind == "linear" or (site.kind == "parameter" and site.owner is not None)
    return linear and "head" not in site.roles


def by_name(item: str) -> Callable[[Site], bool]:
    """Whether a site's whole name, or its end after a dot, is an item; or its whole name fits a "re:…" item."""
    if item.startswith("role:") or item == "all-linear":
        return lambda site: False
    if item.startswith("re:"):
        pattern = compile_regex(item)
        return lambda site: pattern.fullmatch(site.name) is not None
    whole = item.removeprefix("name:")
    end = f".{whole}"

    def fits(site: Site) -> bool:
        names = [site.name]
        if site.owner is not None:  # an attention's own path stands for its projections
            names += [site.path, site.owner]
        return any(name == whole or name.endswith(end) for name in names)

    return fits


def layer_indices(layers: Any) -> list[int]:
    """The indices that `layers` names, as written: 3, [0, -1], range(4) or "0-3,8". Raises TargetError."""
    if isinstance(layers, bool):
        layers = None
    if isinstance(layers, int):
        return [layers]
    if isinstance(layers, str):
        indices: list[int] = []
        for part in layers.split(","):
            match = re.fullmatch(r"\s*(-?\d+)(?:\s*-\s*(-?\d+))?\s*", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if first > last:
                raise TargetError(f"layers={layers!r}: cannot read {part!r}; write ranges as '0-3,8'")
            indices += range(first, last + 1)
        return indices
    if isinstance(layers, Iterable):
        indices = list(layers)
        if indices and all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
            return indices
    raise TargetError(f"layers={layers!r}: give an index, a list of indices, or ranges such as '0-3,8'")
