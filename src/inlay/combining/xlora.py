"""X-LoRA (Buehler, Buehler 2024, arXiv:2402.07148): a classifier that weighs several frozen LoRAs token by token.

    y = W x + g Σ_n w_n s_n B_n A_n x        w (N) of each token: softmax(C(h) / τ)

h is the last hidden state, below the head, of a first run of the model, in which every w is `scaling_pass_value` (0:
the base itself) and nothing is learned; C is one linear, or several with ReLU between them. `layerwise`: another w at
each place.

Parameters, for hidden size d and K = N, or N times the number of places with `layerwise`: K (d + 1); with depth D above
1 and size m: m (d + 1) + (D − 2) m (m + 1) + K (m + 1).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from inlay.combining.over_adapters import OverAdapters, OverPiece
from inlay.engine.piece import Method, Piece, trainable_dtype
from inlay.engine.prompts.calls import named, text_of
from inlay.engine.prompts.entry import arguments_of
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError, UnsupportedError
from inlay.kernels.token_mixture import token_mixture
from inlay.pieces.lora.piece import LoRAPiece
from inlay.pieces.recalled import recalled

LOSS = ("num_items_in_batch", "shift_labels")
"""What a call may hold for its loss alone."""


class TokenWeights:
    """What the classifier tells the places: w (batch, tokens, places or 1, N) of the call under way; 0: the base alone.

    With gradients they are kept until the next call, for blocks that are computed again; copies start without any.
    """

    def __init__(self) -> None:
        self.weights: Tensor | int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenWeights, ()

    def at(self, number: int, h: Tensor) -> Tensor:
        """w (…, N) for the tokens of h (…, d), at the place of this number."""
        if not isinstance(self.weights, Tensor):
            raise UnsupportedError("XLoRA needs a call of the whole model, and a part of it was called by itself")
        if self.weights.requires_grad and not torch.is_grad_enabled():
            raise UnsupportedError("XLoRA cannot be trained with use_reentrant=True, which loses its gradients")
        w = self.weights[:, :, number if self.weights.shape[2] > 1 else 0]
        if h.shape[:-1] == w.shape[:-1]:
            return w
        if h.shape[:-1] == (w.shape[0] * w.shape[1],):  # places that see the tokens of a batch as one row of them
            return w.flatten(0, 1)
        raise UnsupportedError(f"XLoRA weighs tokens {tuple(w.shape[:2])}, and a place has rows {tuple(h.shape[:-1])}")


class ClassifierPiece(Piece):
    """On the model: runs it for the hidden states, and leaves every token's weights for the run that counts."""

    def __init__(self, method: XLoRA, site: Site, places: int, shared: TokenWeights) -> None:
        super().__init__()
        config: Any = getattr(site.module, "config", None)
        width = config.hidden_size
        place: dict[str, Any] = {"dtype": trainable_dtype(site.dtype), "device": site.device}
        self.count, self.places, self.temperature = len(method.adapters), places, float(method.temperature)
        self.softmax, self.top_k, self.softmax_top_k = method.softmax, method.top_k, method.softmax_top_k
        self.scale, self.pass_value = float(method.scale), float(method.scaling_pass_value)
        self.shared, self.arguments = shared, arguments_of(site.module)
        outputs = self.count * (places if method.layerwise else 1)
        sizes = [width, *[method.size] * (method.depth - 1), outputs]
        layers: list[nn.Module] = []
        for number, (into, out) in enumerate(itertools.pairwise(sizes)):
            layers += [nn.ReLU(), *[nn.Dropout(method.dropout)] * bool(method.dropout)] if number else []
            layers.append(nn.Linear(into, out, **place))
        self.layers = nn.Sequential(*layers)

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's output, after a run that decides on the weights."""
        call = named(self.arguments, args, kwargs)
        text = text_of(call)
        if text is None:
            raise UnsupportedError("XLoRA needs input_ids or inputs_embeds, and the call has neither")
        if call.get("past_key_values") is not None:
            raise UnsupportedError("XLoRA runs the model twice and has no cache for that: generate(use_cache=False)")
        left: Tensor | None = None
        try:
            weights = self.shared.weights = self.weights(self.last_hidden(inner, call, text))
            output = inner(*args, **kwargs)
            left = weights if torch.is_grad_enabled() else None  # a block may be computed again, and needs them
        finally:
            self.shared.weights = left
        recalled(output, lambda: setattr(self.shared, "weights", weights))
        return output

    @torch.no_grad()
    def last_hidden(self, inner: Any, call: Mapping[str, Any], text: Tensor) -> Tensor:
        """What the model gives below its head, (batch, tokens, d), with every weight at the value of the first run."""
        model = inner.module
        body = inner if model.base_model is model else model.base_model
        known = arguments_of(model.base_model)
        own = {*self.arguments, *LOSS} - {*known}
        call = {name: value for name, value in call.items() if name not in own} | {"return_dict": True}
        if "use_cache" in known:
            call["use_cache"] = False
        value = torch.full((*text.shape[:2], 1, self.count), self.pass_value, device=text.device)
        self.shared.weights = self.chosen(value) if self.pass_value else 0
        hidden: Tensor = body(**call).last_hidden_state
        return hidden

    def weights(self, h: Tensor) -> Tensor:
        """w (batch, tokens, places or 1, N) from hidden states."""
        logits = self.layers(h.to(next(self.layers.parameters()).dtype)).unflatten(-1, (-1, self.count))
        return self.chosen((logits / self.temperature).softmax(-1) if self.softmax else logits)

    def chosen(self, weights: Tensor) -> Tensor:
        """The `top_k` largest, the others zero; with a softmax over those that remain, if asked for; times g."""
        if self.top_k is not None:
            kept = weights.topk(self.top_k, -1).indices
            left_out = torch.ones_like(weights, dtype=torch.bool).scatter(-1, kept, False)
            fill = -math.inf if self.softmax_top_k else 0.0
            weights = weights.masked_fill(left_out, fill)
        return self.scale * (weights.softmax(-1) if self.softmax_top_k else weights)


class WeighedPiece(OverPiece):
    """g Σ w_n u_n at one place, the LoRAs of linears side by side in two products."""

    def __init__(self, adapters: tuple[str, ...], shared: TokenWeights, number: int) -> None:
        super().__init__(adapters)
        self.shared, self.number = shared, number

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The output with the weighed sum; as it is in a first run of the base alone."""
        own = [self._pieces(inner, name) for name in self.adapters]
        if isinstance(self.shared.weights, int):
            return inner(*args, **kwargs)
        if not all(len(pieces) == 1 and self.thin(pieces[0]) for pieces in own):
            return super().forward(inner, *args, **kwargs)
        x = args[0]
        y = inner(*args, **kwargs)
        found = [pieces[0].factors() for pieces in own]
        rates = [pieces[0].dropout if pieces[0].training else 0.0 for pieces in own]
        return y + token_mixture(x, self.shared.at(self.number, y), found, rates).to(y.dtype)

    @staticmethod
    def thin(piece: Piece) -> bool:
        """Whether it is a LoRA of a linear, and nothing more."""
        return type(piece) is LoRAPiece and piece.plain

    def mix(self, h: Tensor, changes: list[Tensor]) -> Tensor:
        """The weighed sum of changes that are no thin products."""
        w = self.shared.at(self.number, h).to(h.dtype)
        return torch.stack([w[..., n, None] * u for n, u in enumerate(changes)]).sum(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class XLoRA(OverAdapters):
    """y = W x + g Σ w_n s_n B_n A_n x, w of each token by a classifier: a trained mixture of frozen LoRAs."""

    kind = "xlora"
    paper = "Buehler, Buehler 2024, arXiv:2402.07148"
    peft_type = "XLORA"

    layerwise: bool = False
    """Weights of its own for each place; otherwise a token has the same ones everywhere."""
    depth: int = 1
    """How many linears the classifier has."""
    size: int = 2048
    """Width between its linears."""
    dropout: float = 0.2
    """Probability of zeroing an entry between its linears, in training."""
    softmax: bool = True
    """Whether the weights are a softmax over the adapters."""
    temperature: float = 1.0
    """What the classifier's outputs are divided by before the softmax."""
    top_k: int | None = None
    """How many adapters a token keeps, those with the largest weights; None: all."""
    softmax_top_k: bool = False
    """Whether the weights that remain go through a softmax of their own; meant with `softmax=False`."""
    scaling_pass_value: float = 0.0
    """Every weight in the run that the classifier reads; 0: the base alone."""
    scale: float = 1.0
    """g, the same for all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overrides:
            raise ConfigError("XLoRA has no overrides: its fields are of one classifier for all places")
        self.check_whole("depth", "size", "top_k")
        if self.top_k is not None and self.top_k > len(self.adapters):
            raise ConfigError(f"XLoRA(top_k={self.top_k}): it has {len(self.adapters)} adapters to choose from")
        self.check_rate("dropout")
        self.check_positive("temperature")
        self.check_number("scale")
        self.check_at_least_zero("scaling_pass_value")

    def sites(self, index: SiteIndex) -> list[Site]:
        """The model, which the classifier sits on, and the places of the adapters."""
        config = getattr(index.model, "config", None)
        reads = all(hasattr(*one) for one in ((config, "hidden_size"), (index.model, "base_model")))
        reads = reads and "input_ids" in arguments_of(index.model)
        if not reads or getattr(config, "is_encoder_decoder", False):
            raise UnsupportedError(
                f"XLoRA cannot sit on {type(index.model).__name__}: it needs a transformer of one stack that reads text"
            )
        return [next(site for site in index.sites if site.module is index.model), *super().sites(index)]

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        """The classifier, and what its weights go to at each place."""
        shared, (root, *places) = TokenWeights(), sites
        made: list[tuple[Site, Piece]] = [(root, ClassifierPiece(self, root, len(places), shared))]
        return made + [(site, WeighedPiece(tuple(self.adapters), shared, n)) for n, site in enumerate(places)]

    # -- files -------------------------------------------------------------------------------------------------------

    def file_key(self, site: Site, name: str) -> str:
        """HF peft's key: the classifier is the model's, whatever it is called."""
        return f"base_model.internal_xlora_classifier.{name}"

    def import_(
        self, pieces: Sequence[tuple[Site, Piece]], tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> None:
        """Take the tensors over; HF peft's files do not say which adapters they were trained over."""
        if extra:
            super().import_(pieces, tensors, extra)
        else:
            Method.import_(self, pieces, tensors, extra)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        """The entries of peft's config. Where the adapters lie is not known here: their names stand for the folders."""
        if self.exclude is not None or self.layers is not None:
            raise UnsupportedError("HF peft weighs its adapters wherever they sit")
        config = cast("Any", index.model).config
        entries = {theirs: getattr(self, ours) for ours, theirs in PEFT_NAMES.items()}
        numbered = {str(number): name for number, name in enumerate(self.adapters)}
        return {**entries, "hidden_size": config.hidden_size, "adapters": numbered, "use_trainable_adapters": False}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> list[Method]:
        """Made of adapters that are loaded under the keys of peft's `adapters`: "0", "1", …"""
        if config.get("use_trainable_adapters"):
            raise UnsupportedError("this XLoRA adapter has use_trainable_adapters=True, and Inlay has only False")
        fields = {ours: config[theirs] for ours, theirs in PEFT_NAMES.items() if theirs in config}
        return [cls(adapters=tuple(config["adapters"]), **fields)]


PEFT_NAMES = {
    "layerwise": "layerwise_scalings",
    "depth": "xlora_depth",
    "size": "xlora_size",
    "dropout": "xlora_dropout_p",
    "softmax": "enable_softmax",
    "temperature": "softmax_temperature",
    "top_k": "top_k_lora",
    "softmax_top_k": "enable_softmax_topk",
    "scaling_pass_value": "scaling_pass_value",
    "scale": "global_scaling_weight",
}
"""What HF peft calls the fields."""
