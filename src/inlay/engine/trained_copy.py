"""A trained copy of a base parameter: the piece behind full fine-tuning, BitFit, norm tuning, heads and whole modules.

The base's bits stay where they are; the model reads W' = the copy. So detaching restores the bits, several adapters
can each have their own head, and an optimiser's weight decay never reaches a frozen entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.piece import Method, Piece, trainable_dtype
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.structure import ancestors
from inlay.engine.walk import modules
from inlay.errors import TargetError, UnsupportedError, did_you_mean


class TrainedCopy(Piece):
    """W' = `value`, which starts as W; `value` has W's shape."""

    replaces = True

    def __init__(self, value: nn.Parameter, dtype: torch.dtype) -> None:
        super().__init__()
        self.value = value
        self.dtype = dtype

    @property
    def stored(self) -> bool:  # type: ignore[override]
        return self.value.dtype == self.dtype

    def weight(self, weight: Tensor) -> Tensor:
        return self.value.to(self.dtype)

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return bias

    def file_tensors(self) -> dict[str, Tensor]:
        return {"": self.value}


def copies(sites: Iterable[Site]) -> list[tuple[Site, Piece]]:
    """A trained copy for each parameter site; tied parameters (one tensor, several owners) share one copy."""
    values: dict[int, nn.Parameter] = {}
    made: list[tuple[Site, Piece]] = []
    for site in sites:
        original = site.weight
        if not original.is_floating_point():
            raise UnsupportedError(
                f"{site.name} holds {original.dtype} codes (a quantised weight), which cannot be trained directly; "
                "use a method that adds to it, such as LoRA"
            )
        if id(original) not in values:
            values[id(original)] = nn.Parameter(original.detach().to(trainable_dtype(original.dtype), copy=True))
        made.append((site, TrainedCopy(values[id(original)], original.dtype)))
    return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyMethod(Method):
    """Base of the methods that train copies of base parameters: `sites` says which."""

    hosts = frozenset({"parameter"})

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        return copies(sites)

    def file_key(self, site: Site, name: str) -> str:
        return f"base_model.model.{site.name}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModulesToSave(CopyMethod):
    """Whole modules trained and saved with an adapter: new heads, or what the user names."""

    kind = "modules_to_save"

    modules: tuple[str, ...] = ()
    """Names as in targets: a path, or its last components."""

    def sites(self, index: SiteIndex) -> list[Site]:
        parameters = index.parameters() if self.modules else []
        found: list[Site] = []
        for name in self.modules:
            matched = [site for site in parameters if _inside(site.path, name)]
            if not matched:
                paths = {path for path, _ in modules(index.model) if path}
                raise TargetError(
                    f"modules_to_save={name!r} matches no module with parameters in {type(index.model).__name__}"
                    f"{did_you_mean(name, paths | {path.rpartition('.')[2] for path in paths})}"
                )
            found += [site for site in matched if site not in found]
        return found

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        # peft takes every module whose name ends so: `classifier` would bring DistilBERT's `pre_classifier` along.
        saved = {above for site in sites for above in ancestors(site.path)}
        for path, module in modules(index.model):
            if path.endswith(self.modules) and path not in saved and any(True for _ in module.parameters()):
                raise UnsupportedError(f"HF peft would save {path} too, which this adapter leaves alone")
        return {"modules_to_save": list(self.modules) or None}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> list[Method]:
        modules = config.get("modules_to_save")
        return [cls(modules=tuple(modules))] if modules else []


def _inside(path: str, name: str) -> bool:
    """Whether the module at `path` is, or lies in, a module that `name` names."""
    parts, wanted = path.split("."), name.split(".")
    return any(parts[start : start + len(wanted)] == wanted for start in range(len(parts)))
