"""The shape of a model: where its blocks, attentions and heads are; and from these, the roles of every place.

An attention is a module that directly holds query, key and value projections, whatever they are called. A block is the
smallest numbered entry of a container that holds an attention and other weights beside it; where a model has no
attention, the entries of its outermost containers that repeat one class. A layer is a block's number in its stack.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from inlay.engine import roles as tables
from inlay.engine.roles import Rule


class Place(NamedTuple):
    """A place before its roles are known."""

    path: str
    module: nn.Module
    kind: str
    parameter: str | None

    @property
    def name(self) -> str:
        """The path, with the parameter's name where there is one."""
        return join(self.path, self.parameter) if self.parameter else self.path


class Around(NamedTuple):
    """The innermost block, attention, sub-layer of an attention, and head that a path is or lies in."""

    block: str | None
    attention: str | None
    shell: str | None
    head: str | None


class Reading(NamedTuple):
    """What is known of a place: its roles, the index of its block, and how many blocks that stack has."""

    roles: frozenset[str]
    layer: int | None
    depth: int | None


def join(path: str, name: str) -> str:
    """`path.name`, or `name` at the root."""
    return f"{path}.{name}" if path else name


def parent(path: str) -> str:
    """The path one step up; the root is its own parent."""
    return path.rpartition(".")[0]


def unwrapped(name: str) -> str:
    """The name of what a linear stands for: some layers keep theirs in a child called "linear"."""
    return name.removesuffix(".linear")


def ancestors(path: str) -> Iterator[str]:
    """The path itself and every path above it, the root last."""
    while path:
        yield path
        path = parent(path)
    yield ""


@functools.lru_cache(maxsize=1024)
def attends(names: tuple[str, ...], said: bool) -> bool:
    """Whether projections of these names make an attention; `said`: the class of what holds them says that it is one.

    Remembered, since the blocks of a model ask the same again and again.
    """

    def holds(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in names)

    if holds(tables.LATENT) or holds(tables.FUSED) or (said and holds(tables.FUSED_IN_ATTENTION)):
        return True
    queries = holds(tables.QUERY) or holds(tables.LATENT_QUERY)
    return queries and (holds(tables.KEY_VALUE) or (holds(tables.KEY) and holds(tables.VALUE)))


class Structure:
    """Where a model's blocks, attentions and heads are; gives each place its address and reads the tables."""

    def __init__(self, model: nn.Module, places: Sequence[Place]) -> None:
        self.model = model
        self.kinds = {place.path: place.kind for place in places if place.parameter is None}
        self.modules = {place.path: place.module for place in places}
        self.children: dict[str, list[str]] = {}
        self.weights: dict[str, list[str]] = {}
        for place in places:
            if place.path and place.parameter is None:
                self.children.setdefault(parent(place.path), []).append(place.path.rpartition(".")[2])
            if place.kind in ("linear", "conv", "parameter"):
                above, _, tail = unwrapped(place.name).rpartition(".")
                self.weights.setdefault(above, []).append(tail)
        self.heads = tables.heads(model)
        self.attentions = {path for path in self.modules if self.is_attention(path)}
        self.held: Counter[str] = Counter()  # weights below each path
        for path, names in self.weights.items():
            self.held.update(dict.fromkeys(ancestors(path), len(names)))
        self.attending = Counter(above for path in self.attentions for above in ancestors(path))
        self.blocks: dict[str, tuple[int, int]] = {}  # path -> (layer, depth)
        self.find_blocks()
        self.shells = {self.shell(path): path for path in self.attentions}
        self.surroundings: dict[str, Around] = {}  # what `around` has found
        self.fits: dict[tuple[int, str, tuple[str, ...]], frozenset[str]] = {}  # what `match` has found
        self.crosses = {path for path in self.attentions if self.is_cross(path)}
        self.attentive = {self.around(path).block or "" for path in self.attentions}
        self.norm_first: dict[str, tuple[bool | None, bool]] = {}

    # -- attentions, blocks ------------------------------------------------------------------------------------------

    def is_attention(self, path: str) -> bool:
        """Whether the module at `path` directly holds query, key and value projections."""
        if self.kinds.get(path) == "attention":
            return True
        names = tuple(self.weights.get(path, ()))
        return bool(names) and attends(names, "Attention" in type(self.modules[path]).__name__)

    def entries(self, path: str) -> Iterator[str]:
        """Numbered entries of containers at or above `path`, innermost first."""
        for above in ancestors(path):
            if above.rpartition(".")[2].isdigit() and self.is_container(parent(above)):
                yield above

    def is_container(self, path: str) -> bool:
        """Whether a module is one of torch's containers, which name their entries by number."""
        return isinstance(self.modules.get(path), (nn.ModuleList, nn.Sequential, nn.ModuleDict))

    def is_uniform(self, path: str) -> bool:
        """Whether all entries of a container are of one class and have children of their own."""
        entries = [join(path, name) for name in self.children.get(path, [])]
        # By name: an entry with a piece in it has a class of its own, of the same name.
        classes = {type(self.modules[entry]).__name__ for entry in entries}
        return len(classes) == 1 and all(self.children.get(entry) for entry in entries)

    def find_blocks(self) -> None:
        """Fill `blocks`: every entry of every stack, numbered within the outermost container of the stack."""
        inside = {path for path in self.weights if any(above in self.attentions for above in ancestors(path))}
        others = {above for path in self.weights if path not in inside for above in ancestors(path)}
        stacks: dict[str, None] = {}
        for attention in sorted(self.attentions):
            candidates = [entry for entry in self.entries(attention) if entry != attention]
            block = next((entry for entry in candidates if entry in others), candidates[-1] if candidates else None)
            if block is not None:
                stacks[parent(block)] = None
        if not self.attentions:
            uniform = [path for path in self.modules if self.is_container(path) and self.is_uniform(path)]
            stacks = {p: None for p in uniform if not any(above in uniform for above in ancestors(parent(p)) if p)}
        groups: dict[str, list[str]] = {}
        is_uniform = functools.cache(self.is_uniform)  # every entry of a container asks the same
        for path in self.modules:
            if parent(path) in stacks and path.rpartition(".")[2].isdigit():
                outer = [parent(entry) for entry in self.entries(path) if is_uniform(parent(entry))]
                groups.setdefault(outer[-1] if outer else parent(path), []).append(path)
        for blocks in groups.values():
            for layer, path in enumerate(blocks):
                self.blocks[path] = (layer, len(blocks))

    def shell(self, path: str) -> str:
        """The sub-layer around an attention: the module above it, if that adds no more than an output projection."""
        above = parent(path)
        alone = self.attending[above] == 1 and self.held[above] - self.held[path] <= 1
        return above if above and above not in self.blocks and not self.is_container(above) and alone else path

    def torch_attention(self, path: str) -> str | None:
        """The path of the nn.MultiheadAttention that `path` is, or is the output projection of."""
        above = parent(path) if path.endswith("out_proj") else path
        return above if self.kinds.get(above) == "attention" else None

    def is_cross(self, path: str) -> bool:
        """Whether an attention is named as one that looks at another sequence."""
        block = self.around(path).block
        local = path[len(block) :] if block else path
        beside = self.children.get(parent(path), [])
        return bool(tables.CROSS.search(local)) or (local.endswith("multihead_attn") and "self_attn" in beside)

    def around(self, path: str) -> Around:
        """What a path lies in: what the path above lies in, unless it is one of these itself."""
        found = self.surroundings.get(path)
        if found is None:
            block, attention, shell, head = self.around(parent(path)) if path else (None, None, None, None)
            found = self.surroundings[path] = Around(
                path if path in self.blocks else block,
                path if path in self.attentions else attention,
                path if path in self.shells else shell,
                path if path in self.heads else head,
            )
        return found

    # -- addresses ---------------------------------------------------------------------------------------------------

    def address(self, name: str) -> tuple[str, str | None]:
        """(the name with its structure written in, the attention whose sub-layer it is in)."""
        name = unwrapped(name)
        block, attention, shell, _ = self.around(name)
        prefix = "" if self.blocks and block is None else "#"
        if attention is not None:
            inner, start = "@" if attention in self.shells else "~.@", attention
        elif shell is not None:
            inner, start, attention = "~", shell, self.shells[shell]
        else:
            inner, start = "", block or ""
        rest = name[len(start) :].lstrip(".")
        return ".".join(part for part in (prefix, inner, rest) if part), attention

    def match(self, table: Sequence[Rule], address: str, path: str) -> frozenset[str]:
        """The roles of the first row that fits."""
        above = parent(path)
        beside = (*self.children.get(above, ()), *self.weights.get(above, ()))
        key = (id(table), address, beside)  # alike in every block
        if key not in self.fits:
            rows = (row for row in table if row.pattern.search(address))
            fitting = (row.roles for row in rows if row.beside is None or any(map(row.beside.match, beside)))
            self.fits[key] = next(fitting, frozenset())
        return self.fits[key]

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, place: Place) -> Reading:
        """Everything the tables say of one place."""
        block, _, _, head = self.around(place.path)
        layer, depth = self.blocks[block] if block is not None else (None, None)
        address, attention = self.address(place.name)
        container = place.kind == "module"
        roles: set[str] = set()
        if attention in self.crosses and (not container or place.path in (attention, self.shell(attention))):
            roles.add("cross")
        if "pooler" in (place.path.split(".")[-1:] if container else place.path.split(".")):
            roles.add("pooler")
        if head is not None and (place.path == head or not container):
            roles |= self.heads[head]
        if place.kind == "norm":
            roles |= {"norm"} | self.norm_roles(place, address)
        elif place.kind == "embedding":
            roles.add("position" if tables.POSITION.search(place.name) else "embed")
        elif container or place.kind == "attention":
            roles |= self.module_roles(place, address) if head is None else set()
        elif head is None:
            roles |= self.weight_roles(place, address, block)
        return Reading(frozenset(roles), layer, depth)

    def weight_roles(self, place: Place, address: str, block: str | None) -> set[str]:
        """Roles of a linear, convolution or parameter place."""
        if block is None and tables.POSITION.search(place.name) and "@" not in address:
            return {"position"}
        roles = set(self.match(tables.PROJECTIONS, address, place.path) if address[:1] in "#~@" else ())
        if "ffn" in roles:
            roles |= {"experts"} if tables.EXPERTS.search(address) else set()
            roles |= {"shared_expert"} if tables.SHARED_EXPERT.search(address) else set()
        patchy = place.kind == "conv" or (place.kind == "linear" and "patch" in place.path)
        if patchy and block is None and not roles and tables.PATCH.search(place.path):
            roles.add("patch")
        return roles

    def module_roles(self, place: Place, address: str) -> set[str]:
        """Roles of a module that holds others."""
        block = {"block"} if place.path in self.blocks else set()
        if place.path in self.attentions:
            return block | {"cross_attention" if place.path in self.crosses else "self_attention"}
        roles = block | set(self.match(tables.MODULES, address, place.path) if address.startswith("#") else ())
        if tables.MLP.match(address) and self.children.get(place.path):
            outer = (self.address(above)[0] for above in ancestors(parent(place.path)) if above)
            roles |= set() if any(map(tables.MLP.match, outer)) else {"mlp"}
        return roles

    def norm_roles(self, place: Place, address: str) -> set[str]:
        """Roles of a normalisation besides "norm"."""
        block = self.around(place.path).block or ""
        if block not in self.attentive:  # such names mean something else where there is no attention
            return set()
        roles = set(self.match(tables.NORMS, address, place.path))
        beside = [self.kinds[join(parent(place.path), name)] for name in self.children.get(parent(place.path), [])]
        if tables.NORM_ALONE.match(address) and beside.count("norm") == 1:
            roles.add("ffn_norm")
        stack = parent(block)
        if stack not in self.norm_first:
            self.norm_first[stack] = self.normalises_first(block)
        flag, found = self.norm_first[stack]
        first = flag is not False if "flagged" in roles else found if flag is None else flag
        if "after" in roles or (roles and "before" not in roles and not first):
            roles.add("post_norm")
        return roles - {"after", "before", "flagged"}

    def normalises_first(self, block: str) -> tuple[bool | None, bool]:
        """Whether a stack normalises before each sub-layer: as a flag of the block or its config says, and by shape.

        A pre-norm stack is known by the norm that ends it, which a post-norm stack has no need of.
        """
        above = list(ancestors(parent(block)))
        config = next((self.modules[path].config for path in above if hasattr(self.modules[path], "config")), None)
        values = [getattr(h, f, None) for h in (self.modules[block], config) for f in tables.NORM_FIRST_FIELDS]
        flag = next((value for value in values if isinstance(value, bool)), None)
        beside = [(path, name) for path in above for name in self.children.get(path, []) if block]
        norms = [name for path, name in beside if self.kinds.get(join(path, name)) == "norm"]
        return flag, any(not tables.NOT_FINAL_NORM.search(name) for name in norms)
