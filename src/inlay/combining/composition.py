"""Compositions of loaded adapters, as plain data that `inlay.activate` takes.

    inlay.activate(model, Stack("law", Parallel("mnli", "rte")))

    Stack(a, b)             b around a: what the names alone mean too
    Parallel(a, b)          the batch once for each part, one after the other: n · B rows come out
    BatchSplit(a, b, sizes) the first rows through a, the next through b
    Split(a, b, sizes)      the first tokens through a, the next through b
    Average(a, b, weights)  h + Σ w_i (part_i − h) at each place, h without any of them; equal weights by default
    Fuse(a, b)              the loaded AdapterFusion of these adapters
    AdapterDrop(a, first)   a without the first blocks

Parts are names, compositions, or None for the base; they nest freely, except that Parallel, which lengthens the batch,
stands outermost or in a Stack. The names and meanings are AdapterHub's (Pfeiffer et al. 2020, arXiv:2007.07779).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from inlay.engine.composition import Bound, Composition, names_in
from inlay.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from inlay.engine.adapters import Adapters

Part = str | Composition | None
Parts = tuple[str | Bound, ...]


@dataclasses.dataclass(frozen=True, init=False)
class _Several(Composition):
    """Base of what has parts."""

    parts: tuple[Part, ...]

    def __init__(self, *parts: Part) -> None:
        object.__setattr__(self, "parts", parts)
        name = type(self).__name__
        if not parts:
            raise ConfigError(f"{name}(): name adapters, as in {name}('law', 'poems')")
        for part in parts:
            if not isinstance(part, str | Composition | None):
                raise ConfigError(f"{name}({part!r}): parts are names of adapters, compositions, or None for the base")

    def __repr__(self) -> str:
        inside = [repr(part) for part in self.parts]
        fields = [field.name for field in dataclasses.fields(self) if field.name != "parts"]
        inside += [f"{name}={getattr(self, name)!r}" for name in fields if getattr(self, name) is not None]
        return f"{type(self).__name__}({', '.join(inside)})"

    def sized(self, field: str, values: Sequence[Any]) -> tuple[Any, ...]:
        """Values for the parts. ConfigError where there are more or fewer."""
        if len(values) != len(self.parts):
            raise ConfigError(f"{type(self).__name__}({field}={values!r}): {len(self.parts)} are needed, one a part")
        return tuple(values)

    def whole(self, values: Sequence[Any]) -> tuple[int, ...]:
        """Sizes for the parts. ConfigError for what is none."""
        sizes = self.sized("sizes", values)
        if any(not isinstance(size, int) or isinstance(size, bool) or size < 0 for size in sizes) or not sum(sizes):
            raise ConfigError(f"{type(self).__name__}(sizes={values!r}): whole numbers, not all 0, are needed")
        return sizes

    def branches(self, adapters: Adapters) -> tuple[Parts, ...]:
        """Each part as what runs in order. ConfigError for a Parallel, which cannot be inside."""
        for part in self.parts:
            if _repeats(part):
                raise ConfigError(f"{self!r}: Parallel repeats the whole batch, so it stands outermost or in a Stack")
        return tuple(bound(part, adapters) for part in self.parts)


def is_number(value: Any) -> bool:
    """Whether it is a finite number, of Python's or of numpy's."""
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)


def _repeats(part: Part) -> bool:
    if isinstance(part, AdapterDrop):
        return _repeats(part.part)
    return isinstance(part, Parallel) or (isinstance(part, _Several) and any(map(_repeats, part.parts)))


def bound(part: Part, adapters: Adapters) -> Parts:
    """A part as what runs in order. AdapterError where an adapter is not loaded."""
    if isinstance(part, Composition):
        return part.bind(adapters)
    return () if part is None else (adapters.get(part).name,)


class Stack(_Several):
    """One after the other, the first innermost."""

    def bind(self, adapters: Adapters) -> Parts:
        """Its parts in order; AdapterError where one adapter is in two of them."""
        found = [bound(part, adapters) for part in self.parts]
        names = [name for one in found for name in set(names_in(one))]
        if len(set(names)) != len(names):
            raise AdapterError(f"{self!r} has an adapter twice")
        return tuple(part for one in found for part in one)


class Parallel(_Several):
    """The same batch through each part: what comes out has the rows of the first part, then those of the next, …"""

    def bind(self, adapters: Adapters) -> Parts:
        """Its branches, by rows."""
        from inlay.combining.divided import BoundParallel

        return (BoundParallel(self, self.branches(adapters), adapters),)


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class BatchSplit(_Several):
    """The first `sizes[0]` rows of each batch through the first part, the next `sizes[1]` through the second, …"""

    sizes: tuple[int, ...]

    def __init__(self, *parts: Part, sizes: Sequence[int]) -> None:
        super().__init__(*parts)
        object.__setattr__(self, "sizes", self.whole(sizes))

    def bind(self, adapters: Adapters) -> Parts:
        """Its branches, by rows."""
        from inlay.combining.divided import BoundBatchSplit

        return (BoundBatchSplit(self, self.branches(adapters), adapters),)


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Split(_Several):
    """The first `sizes[0]` tokens of each row through the first part, the next `sizes[1]` through the second, …"""

    sizes: tuple[int, ...]

    def __init__(self, *parts: Part, sizes: Sequence[int]) -> None:
        super().__init__(*parts)
        object.__setattr__(self, "sizes", self.whole(sizes))

    def bind(self, adapters: Adapters) -> Parts:
        """Its branches, by tokens."""
        from inlay.combining.divided import BoundSplit

        return (BoundSplit(self, self.branches(adapters), adapters),)


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Average(_Several):
    """The weighted mean of the parts' outputs at each place; weights that do not sum to 1 still keep the base once."""

    weights: tuple[float, ...] | None

    def __init__(self, *parts: Part, weights: Sequence[float] | None = None) -> None:
        super().__init__(*parts)
        given = None if weights is None else self.sized("weights", weights)
        if given is not None and not all(is_number(weight) for weight in given):
            raise ConfigError(f"Average(weights={weights!r}): numbers are needed, one a part")
        object.__setattr__(self, "weights", None if given is None else tuple(map(float, given)))

    def bind(self, adapters: Adapters) -> Parts:
        """Its branches, with their weights."""
        from inlay.combining.averaged import BoundAverage

        return (BoundAverage(self, self.branches(adapters), adapters),)


class Fuse(_Several):
    """The adapter that an AdapterFusion of exactly these adapters was loaded or attached as."""

    def bind(self, adapters: Adapters) -> Parts:
        """Its name. AdapterError where there is none, or more than one."""
        from inlay.combining.adapter_fusion import AdapterFusion

        names = tuple(adapters.get(part).name if isinstance(part, str) else None for part in self.parts)
        if None in names:
            raise ConfigError(f"{self!r}: parts are names of adapters")
        found = [
            adapter.name
            for adapter in adapters.loaded.values()
            for method in adapter.methods
            if isinstance(method, AdapterFusion) and set(method.adapters) == set(names)
        ]
        if len(found) != 1:
            what = f"{len(found)} are: activate one by name ({', '.join(found)})" if found else (
                f"none is: inlay.attach(model, inlay.AdapterFusion(adapters={names!r}), name=...) and train it"
            )  # fmt: skip
            raise AdapterError(f"{self!r} needs one loaded AdapterFusion of these adapters, and {what}")
        return (found[0],)


@dataclasses.dataclass(frozen=True)
class AdapterDrop(Composition):
    """The part without its pieces in the first blocks of each stack (Rücklé et al. 2021, arXiv:2010.11918).

    `first`: how many blocks, or a pair (least, most), of which each forward pass of training draws one, by torch's
    generator; in evaluation mode a pair means its least. Nothing of the part runs in blocks that are left out, and
    `backward` ends above them where nothing below is trained. Leave at least one block, or nothing learns in that pass.
    """

    part: str | Composition
    first: int | tuple[int, int]

    def __post_init__(self) -> None:
        pair = tuple(self.first) if isinstance(self.first, Iterable) else (self.first, self.first)
        if len(pair) != 2 or any(not isinstance(n, int) or n < 0 for n in pair) or pair[0] > pair[1]:
            raise ConfigError(f"AdapterDrop(first={self.first!r}): a number of blocks, or a pair (least, most)")
        if not isinstance(self.part, str | Composition):
            raise ConfigError(f"AdapterDrop({self.part!r}): name an adapter, or give a composition")

    def bind(self, adapters: Adapters) -> Parts:
        """Its part, with the block of each place."""
        from inlay.combining.dropped import BoundDrop

        if _repeats(self.part):
            raise ConfigError(f"{self!r}: Parallel repeats the whole batch, so it stands outermost or in a Stack")
        pair = (self.first, self.first) if isinstance(self.first, int) else (self.first[0], self.first[1])
        return (BoundDrop(self, bound(self.part, adapters), adapters, pair),)
