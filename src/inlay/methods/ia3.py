"""(IA)³: infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, arXiv:2205.05638).

    keys, values:   y = l ⊙ (W x + b)        l (out) scales what comes out
    feed-forward:   y = W (l ⊙ x) + b        l (in) scales what goes into the second projection

l starts at one, so the model starts as the base. With `form="additive"` the vector is added (y + l, or W (x + l)) and
starts at zero. Scaling the input of the second projection is the paper's place in gated and ungated networks alike; the
output of the first one is not, because an activation lies between.

A projection that holds query, key and value in one is scaled whole, as HF peft does: nothing in its shape tells in
which order it holds them, and a scale on the queries is one more on the same products q·k.

Parameters: out for each key and value projection, in for each second feed-forward projection (times experts).
T0-3B: 24 · (2 · 2048 + 5120) + 24 · (4 · 2048 + 5120) = 540,672.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

from torch import nn

from inlay.engine.peft_names import peft_targets, shortest_names, targets_from_peft
from inlay.engine.piece import Method, Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.targets import split_items
from inlay.errors import ConfigError, TargetError, UnsupportedError, did_you_mean
from inlay.pieces.multiplicative.vectors import IA3Piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """y = l ⊙ (W x + b) on keys and values, y = W (l ⊙ x) + b on the second feed-forward projection."""

    kind = "ia3"
    hosts = frozenset({"linear", "conv", "parameter"})
    default_targets = "key,value,down"
    peft_type = "IA3"
    paper = "Liu et al. 2022, arXiv:2205.05638"
    learning_rate: ClassVar[float] = 3e-3

    feedforward: Sequence[str] = ("role:down",)
    """Which of the targets are scaled at their input: roles, names or "re:…" patterns."""
    form: Literal["multiplicative", "additive"] = "multiplicative"
    """Whether l multiplies (and starts at one) or is added (and starts at zero)."""

    def __post_init__(self) -> None:
        if self.form not in ("multiplicative", "additive"):
            raise ConfigError(f"IA3(form={self.form!r}): choose one of multiplicative, additive")
        if isinstance(self.feedforward, str):
            object.__setattr__(self, "feedforward", tuple(split_items(self.feedforward)))

    def at_input(self, site: Site) -> bool:
        """Whether l acts on what goes into this place."""
        return any(site.matches(item) for item in self.feedforward)

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        for item in self.feedforward if tuple(self.feedforward) != ("role:down",) else ():
            if not any(site.matches(item) for site in sites):
                hint = did_you_mean(item, [site.tail for site in sites])
                raise TargetError(f"IA3: feedforward={item!r} is none of the targets in {type(model).__name__}{hint}")
        return super().build(model, sites)

    def piece(self, site: Site) -> Piece:
        return IA3Piece(self, site)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        here = {site: cast("IA3", self.at(site)) for site in sites}
        bare = any(site.kind == "parameter" or site.weight.dim() == 3 for site in sites)
        if bare or any(one.form == "additive" for one in here.values()):
            raise UnsupportedError("HF peft's (IA)³ multiplies, and sits in linears and 2-D and 3-D convolutions only")
        everything = [site.path for site in index.sites]
        inputs = {site.path for site, one in here.items() if one.at_input(site)}
        outputs = {site.path for site in sites} - inputs
        names: list[str] | str = shortest_names(inputs, everything)
        targets = peft_targets(sites, index)["target_modules"]
        if any(path.endswith(name) for path in outputs for name in names):
            # peft compares names by the end of the path, even inside a component; a pattern it compares as a whole.
            names = "|".join(re.escape(path) for path in sorted(inputs))
        elif not isinstance(targets, str):  # peft wants every feed-forward name among the targets, spelled alike
            targets = sorted({*names, *shortest_names(outputs, everything)})
        return {
            "target_modules": targets,
            "feedforward_modules": names,
            "fan_in_fan_out": any(site.transposed for site in sites),
            "init_ia3_weights": True,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> list[Method]:
        names = config.get("feedforward_modules") or []
        pattern = names if isinstance(names, str) else "|".join(f".*{re.escape(name)}" for name in sorted(names))
        return [cls(**targets_from_peft(config), feedforward=(f"re:{pattern}",) if pattern else ())]
