r"""Places in any model: where a piece can sit, what role the place plays, and how users name it.

    index = SiteIndex(model)
    index.select("query,value", hosts=frozenset({"linear"}), layers="0-3")

The grammar of targets, one item or several separated by commas (or a list of them):

    all-linear          every linear, and the projections of nn.MultiheadAttention, without output heads
    query, ffn, norm    a role (`inlay.engine.roles.ROLES` lists them); read as a name where no such role is found
    q_proj, 3.mlp.fc1   a name: the whole path of a place, or its end after a dot
    re:.*\.fc[12]        a regular expression that fits the whole name
    role:key  name:key  one reading only

or a callable (site) -> bool. Every item must match, or it is a TargetError.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.host import CHILD
from inlay.engine.roles import ALIASES, ROLES, known_role
from inlay.engine.structure import Place, Structure, ancestors, join
from inlay.engine.targets import by_name, by_role, layer_indices, split_items
from inlay.engine.walk import modules
from inlay.errors import TargetError, UnsupportedError, did_you_mean

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
# nn.RNNBase reads a flat copy of its weights and parametrised modules recompute theirs, so replacing what an attribute
# reads would change nothing there.
OPAQUE = (nn.RNNBase, nn.utils.parametrize.ParametrizationList)
HIDDEN = (CHILD, "parametrizations")


@dataclass(frozen=True, eq=False)
class Site:
    """One place in a model. Compared by identity; `SiteIndex` makes them."""

    path: str
    """Path of the module in the model; "" is the root."""
    module: nn.Module
    kind: str
    """"linear", "conv", "embedding", "attention" (nn.MultiheadAttention), "norm", "parameter" or "module"."""
    roles: frozenset[str]
    layer: int | None
    """Index of the block it lies in, counted from 0 in each stack; None outside every stack."""
    parameter: str | None = None
    """For kind "parameter": the name of the parameter in `module`."""
    depth: int | None = None
    """How many blocks the stack has that it lies in."""
    owner: str | None = None
    """For a projection of nn.MultiheadAttention: the path of that attention."""

    @property
    def name(self) -> str:
        """The path, followed by the parameter's name where there is one."""
        return join(self.path, self.parameter) if self.parameter else self.path

    @property
    def tail(self) -> str:
        """The last component of the name."""
        return self.name.rpartition(".")[2]

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (…, in, out): transformers' Conv1D, and some layouts of expert weights."""
        if self.kind == "parameter":
            return self.weight.ndim == 3 and bool(getattr(self.module, "is_transposed", False))
        return is_conv1d(self.module)

    @property
    def weight(self) -> Tensor:
        """The stored parameter that a piece here acts on, untouched by any piece. UnsupportedError where none is."""
        name = self.parameter or "weight"
        weight = self.module._parameters.get(name)
        if weight is None:  # a parametrised weight is not among the parameters
            weight = getattr(self.module, name, None)
        if not isinstance(weight, Tensor):
            raise UnsupportedError(f"{self._label()} has no parameter {name!r}")
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The stored bias beside the weight, if there is one."""
        if self.parameter == "in_proj_weight":
            return self.module._parameters.get("in_proj_bias")
        if self.parameter not in (None, "weight"):
            return None
        return self.module._parameters.get("bias")

    @property
    def in_features(self) -> int:
        """Size of the input: features, channels, or rows of an embedding. UnsupportedError where undefined."""
        return self._features()[0]

    @property
    def out_features(self) -> int:
        """Size of the output: features, channels, or the width of an embedding. UnsupportedError where undefined."""
        return self._features()[1]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored weight; of the first parameter for a plain module."""
        return self._sample().dtype

    @property
    def device(self) -> torch.device:
        """Where the stored weight is; the first parameter of a plain module."""
        return self._sample().device

    @property
    def file_path(self) -> str:
        """The path that HF peft's files use for this place."""
        if self.owner is not None and self.parameter == "weight":
            return join(self.owner, "base_layer.out_proj")
        if self.owner is not None and self.parameter != "in_proj_weight":
            return self.name
        return self.path

    def matches(self, pattern: str) -> bool:
        """Whether one item of the grammar fits; a known role counts by role and by name."""
        return by_role(pattern)(self) or by_name(pattern)(self)

    def _features(self) -> tuple[int, int]:
        module: Any = self.module
        if self.kind == "linear":
            return (module.nx, module.nf) if self.transposed else (module.in_features, module.out_features)
        if self.kind == "conv":
            return module.in_channels, module.out_channels
        if self.kind == "embedding":
            return module.num_embeddings, module.embedding_dim
        if self.kind == "norm":
            return self.weight.shape[-1], self.weight.shape[-1]
        if self.kind == "attention":
            return module.embed_dim, module.embed_dim
        if self.kind == "parameter" and self.weight.ndim in (2, 3):
            rows, columns = self.weight.shape[-2:]
            return (rows, columns) if self.transposed else (columns, rows)
        raise UnsupportedError(f"{self._label()} has no one number of input and output features")

    def _label(self) -> str:
        return f"{self.name or 'the root'} ({type(self.module).__name__}, kind {self.kind})"

    def _sample(self) -> Tensor:
        if self.kind not in ("module", "attention"):
            return self.weight
        return next(self.module.parameters(), torch.empty(0))


Targets = None | str | Sequence[str] | Callable[[Site], bool]


class SiteIndex:
    """Every place of one model, found in one pass. Pieces already set into the model are not looked into."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        places = list(_places(model))
        self._structure = Structure(model, places)
        self.sites = [self._site(place) for place in places]

    def _site(self, place: Place, roles: frozenset[str] | None = None) -> Site:
        """The site of a place; `roles` replace the ones that its own name gives it."""
        reading = self._structure.read(place)
        roles = reading.roles if roles is None else roles
        owner = self._structure.torch_attention(place.path) if place.kind == "parameter" else None
        return Site(*place[:3], roles, reading.layer, place.parameter, reading.depth, owner)

    def by_name(self) -> dict[str, Site]:
        """Every site by its name."""
        return {site.name: site for site in self.sites}

    def roles(self) -> dict[str, list[Site]]:
        """The roles that this model has, each with its sites."""
        found = {role: [site for site in self.sites if role in site.roles] for role in ROLES}
        return {role: sites for role, sites in found.items() if sites}

    def parameters(self) -> list[Site]:
        """A parameter site for every parameter of every module, in the model's order (biases and norms included).

        A parameter that is tied appears at each of its places; compare `site.weight` by identity to tell.
        """
        places = {site.path: site for site in self.sites if site.parameter is None}
        sites = []
        for path, module in modules(self.model):
            above = places.get(path)
            # A layer's own parameters play the layer's role; those of other modules are read by their names.
            leaf = above is not None and above.kind in ("linear", "conv", "embedding", "norm")
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    place = Place(path, module, "parameter", name)
                    sites.append(self._site(place, above.roles if above is not None and leaf else None))
        return sites

    # -- selection ---------------------------------------------------------------------------------------------------

    def select(
        self,
        targets: Targets,
        *,
        hosts: frozenset[str],
        exclude: Targets = None,
        layers: Any = None,
        what: str = "",
    ) -> list[Site]:
        """The sites of an accepted kind that `targets` names, in the model's order.

        `hosts` are the accepted kinds; `exclude` has the grammar of `targets`, and a module that it names is left out
        with everything inside; `layers` is an index, several, or ranges ("0-3,8"), negative ones counting from the end
        of each stack. `targets=None` is every site of an accepted kind. `what` begins the error messages.

        Raises TargetError when any item, layer or exclusion matches nothing, or when nothing is left.
        """
        candidates = [site for site in self.sites if site.kind in hosts]
        chosen = {id(site) for site in self._resolve(targets, candidates, hosts, what, "target")}
        if exclude is not None:
            left_out = self._resolve(exclude, self.sites, None, what, "exclude")
            inside = {site.path for site in left_out if site.kind in ("module", "attention")}
            names = {site.name for site in left_out}
            chosen -= {
                id(site)
                for site in candidates
                if site.name in names or any(above in inside for above in ancestors(site.path))
            }
        if layers is not None:
            wanted = self._layers(layers, what)
            chosen &= {id(s) for s in candidates if s.layer is not None and (s.layer, s.depth) in wanted}
        result = [site for site in candidates if id(site) in chosen]
        if not result:
            limits = [f"exclude={exclude!r}"] * (exclude is not None) + [f"layers={layers!r}"] * (layers is not None)
            raise TargetError(
                f"{_prefix(what)}nothing is left of targets {targets!r} in {self._model()}"
                f"{' with ' + ' and '.join(limits) if limits else ''}; {self._advice()}"
            )
        return result

    def _resolve(
        self, targets: Targets, candidates: list[Site], hosts: frozenset[str] | None, what: str, field: str
    ) -> list[Site]:
        if targets is None:
            return candidates
        if callable(targets):
            found = [site for site in candidates if targets(site)]
            if not found:
                raise TargetError(
                    f"{_prefix(what)}the {field} callable is true for none of {self._searched(candidates, hosts)}; "
                    f"{self._advice()}"
                )
            return found
        items = split_items(targets)
        if not items:
            raise TargetError(f"{_prefix(what)}{field} {targets!r} names no place; {self._advice()}")
        return [site for item in items for site in self._item(item, candidates, hosts, what, field)]

    def _item(
        self, item: str, candidates: list[Site], hosts: frozenset[str] | None, what: str, field: str
    ) -> list[Site]:
        """What one item matches: read as a role first, then as a name."""
        for fits in (by_role(item), by_name(item)):
            if found := [site for site in candidates if fits(site)]:
                return found
        others = [site for site in self.sites if site.matches(item)]
        if others and hosts is not None:
            kinds = ", ".join(sorted({site.kind for site in others}))
            inside = any(s.kind in ("module", "attention") and s.path for s in others)
            hint = f"name places inside it, such as 're:.*{re.escape(others[0].tail)}\\..*', or " if inside else ""
            raise TargetError(
                f"{_prefix(what)}{field} {item!r} matches {_count(len(others), 'place')} of kind {kinds} in "
                f"{self._model()} (the first is {others[0].name!r}), but only {', '.join(sorted(hosts))} can be used "
                f"here; {hint}{self._advice()}"
            )
        word = re.sub(r"^(re|name|role):", "", item)
        options = [role for role in [*ROLES, *ALIASES] if any(known_role(role) in s.roles for s in candidates)]
        options += [site.tail for site in candidates]
        options += [".".join(site.name.split(".")[-2:]) for site in candidates]
        guess = did_you_mean(word, options)
        raise TargetError(
            f"{_prefix(what)}{field} {item!r} matches nothing in {self._searched(candidates, hosts)}"
            f"{guess + ' ' if guess else '; '}{self._advice()}"
        )

    def _layers(self, layers: Any, what: str) -> set[tuple[int, int]]:
        """(layer, depth) pairs that `layers` names."""
        depths = {site.depth for site in self.sites if site.depth is not None}
        if not depths:
            raise TargetError(f"{_prefix(what)}layers={layers!r}, but {self._model()} has no repeated stack of blocks")
        wanted = set()
        for index in layer_indices(layers):
            found = {(index % depth, depth) for depth in depths if -depth <= index < depth}
            if not found:
                raise TargetError(
                    f"{_prefix(what)}layers={layers!r}: there is no layer {index} in {self._model()}; "
                    f"its layers are 0 to {max(depths) - 1} (or -1 to -{max(depths)} from the end)"
                )
            wanted |= found
        return wanted

    def _model(self) -> str:
        return type(self.model).__name__

    def _searched(self, candidates: list[Site], hosts: frozenset[str] | None) -> str:
        kinds = f" of kind {', '.join(sorted(hosts))}" if hosts is not None else ""
        return f"{self._model()} (searched {_count(len(candidates), 'place')}{kinds})"

    def _advice(self) -> str:
        return "`inlay show MODEL` lists every place and role"


# -- reading a model -------------------------------------------------------------------------------------------------


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D, a linear whose weight is stored (in, out)."""
    return _is_conv1d_class(type(module))  # type: ignore[arg-type]  # (classes hash; nn.Module's stub says otherwise)


@functools.lru_cache(maxsize=1024)
def _is_conv1d_class(cls: type) -> bool:
    # By name, so that a plain torch user need not import transformers.
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in cls.__mro__)


def kind_of(module: nn.Module) -> str:
    """The kind of a module's site."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return "linear"
    if isinstance(module, CONVOLUTIONS):
        return "conv"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    own = [p for p in module._parameters.values() if p is not None]
    named = re.search(r"norm(?!al)", type(module).__name__, re.IGNORECASE)
    leaf = all(name in HIDDEN for name in module._modules)
    if isinstance(module, NORMS) or (named and leaf and all(p.ndim <= 1 for p in own)):
        return "norm" if own else "module"
    return "module"


def _places(model: nn.Module) -> Iterator[Place]:
    """Every module, each followed by those of its parameters that are places too."""
    projections: set[str] = set()
    for path, module in modules(model, HIDDEN):
        # nn.MultiheadAttention reads out_proj's weight and never calls it: a parameter site, not a linear one.
        if path in projections:
            yield Place(path, module, "parameter", "weight")
            continue
        kind = kind_of(module)
        yield Place(path, module, kind, None)
        if kind == "attention":
            projections.add(join(path, "out_proj"))
        if kind in ("attention", "module") and not isinstance(module, OPAQUE):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.ndim in (2, 3) and "bias" not in name:
                    yield Place(path, module, "parameter", name)


def _prefix(what: str) -> str:
    return f"{what}: " if what else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
