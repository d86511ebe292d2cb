"""MAM, the mix-and-match adapter: prefixes and a scaled parallel adapter (He et al. 2021, arXiv:2110.04366).

    attention:       softmax(q [K_p ; K]ᵀ / √d) [V_p ; V]
    feed-forward:    h + s · W_up f(W_down x)

A name for two methods: what is attached, shown and saved is `PrefixTuning` and `Adapter(placement="parallel")`, with
the paper's sizes. The adapter starts at zero; the prefix changes the output from the start, as prefixes do.

Parameters: those of the two. projection_size w: n d + w (d + 1) + (w + 1) · Σ (d_k + d_v) · key-value heads; and
m (d_in + d_out) + m + d_out for each feed-forward network.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from inlay.engine.piece import Method
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError, InlayError
from inlay.methods.adapter import Adapter
from inlay.methods.prefix_tuning import PrefixTuning


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAM(Method):
    """A short prefix in every self-attention, and a wide adapter parallel to every feed-forward network."""

    kind = "mam"
    hosts = frozenset({"module", "linear", "norm", "attention"})
    paper = "He et al. 2021, arXiv:2110.04366"
    learning_rate: ClassVar[float] = 1e-4

    num_virtual_tokens: int = 30
    """n, the rows of the prefix in each layer."""
    projection_size: int | None = 800
    """Width of the MLP that computes the prefix; None: the prefix itself is trained."""
    bottleneck: int | None = 512
    """Width m of the adapters; None: 1/16 of the place."""
    scale: float = 4.0
    """s."""
    dropout: float = 0.0
    """Probability of zeroing an entry of a bottleneck, in training."""

    def __post_init__(self) -> None:
        if self.targets is not None or self.exclude is not None or self.overrides:
            raise ConfigError(
                "MAM has no targets, exclude or overrides: its places are the self-attentions and feed-forward "
                "networks; to choose others, attach [PrefixTuning(...), Adapter(placement='parallel', ...)]"
            )
        self.methods()  # which check the fields

    def methods(self) -> list[Method]:
        """The two methods that it stands for."""
        prefix = PrefixTuning(
            num_virtual_tokens=self.num_virtual_tokens, projection_size=self.projection_size, layers=self.layers
        )
        adapter = Adapter(
            placement="parallel", bottleneck=self.bottleneck, scale=self.scale, dropout=self.dropout, layers=self.layers
        )
        return [prefix, adapter]

    def sites(self, index: SiteIndex) -> list[Site]:
        try:
            return [site for method in self.methods() for site in method.sites(index)]
        except InlayError as error:
            raise type(error)(f"MAM: {error}") from error

    def parts(self, index: SiteIndex) -> list[Method]:
        self.sites(index)
        return self.methods()
