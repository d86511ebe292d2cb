"""What watches the activations of feed-forward networks: which of their positions are text, and how dense they are.

The activations are read where the second projection reads them, so a product with a gate, and a dropout between, count.
Which positions are padding is known where the model is called: a hook there reads the masks. Terms of the loss are kept
from a forward pass until the loss is asked for, or the next forward pass, and no longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.controller import Controller
from inlay.engine.piece import Piece, trainable_dtype
from inlay.engine.prompts.calls import named, ones_before
from inlay.engine.prompts.entry import arguments_of, encoder_of
from inlay.engine.sites import Site
from inlay.errors import UnsupportedError
from inlay.kernels import density

ENCODER, DECODER, ONLY = "encoder", "decoder", "model"
"""The stacks whose positions have masks of their own."""


def stack_of(model: nn.Module, path: str) -> str:
    """Which stack the module at `path` lies in."""
    encoder = encoder_of(model)
    if encoder is None:
        return ONLY
    inside = next(name for name, module in model.named_modules() if module is encoder)
    return ENCODER if path.startswith(f"{inside}.") else DECODER


def masks_of(call: Mapping[str, Any], two_stacks: bool) -> dict[str, Tensor | None]:
    """Which positions of each stack are text (…, T), as a call's arguments tell; None: all of them."""
    if not two_stacks:
        return {ONLY: _truth(call.get("attention_mask"))}
    decoder, labels = _truth(call.get("decoder_attention_mask")), call.get("labels")
    if decoder is None and isinstance(labels, Tensor) and labels.ndim == 2:
        decoder = labels != -100
    return {ENCODER: _truth(call.get("attention_mask")), DECODER: decoder}


def _truth(mask: Any) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim > 3 or mask.is_floating_point():
        raise UnsupportedError(
            "activation density counts the positions that are text, and needs an attention_mask of the text's own "
            "shape, (batch, tokens), not one for each query"
        )
    return mask.bool()


def fitted(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask for x (…, features): of its last positions, with virtual tokens before the text, or of a flat batch."""
    if mask is None or mask.shape == x.shape[:-1]:
        return mask
    mask = mask.flatten(0, -2)
    if x.ndim == 3:
        missing = x.shape[1] - mask.shape[1]
        mask = ones_before(mask, missing) if missing > 0 else mask[:, -x.shape[1] :]
        if mask.shape[0] and x.shape[0] % mask.shape[0] == 0:
            return mask.repeat(x.shape[0] // mask.shape[0], 1)
    if x.ndim == 2 and mask.numel() == x.shape[0]:
        return mask.flatten()
    raise UnsupportedError(
        f"activation density cannot tell which of {tuple(x.shape[:-1])} positions are text from an attention_mask of "
        f"{tuple(mask.shape)}; leave that place out with exclude=..."
    )


class Watch:
    """What the call of a model and its feed-forward networks have in common while one forward pass goes on."""

    def __init__(self, arguments: tuple[str, ...], two_stacks: bool) -> None:
        self.arguments, self.two_stacks = arguments, two_stacks
        self.masks: dict[str, Tensor | None] = {}
        self.terms: list[tuple[str, Tensor]] = []
        self.open = False
        """Whether the model's forward is running: what runs outside is a checkpoint computed again."""
        self.wanted = False
        """Whether that forward has gradients."""
        self.blind = False
        """Whether a part of it had none all the same: a checkpoint of the older, reentrant kind."""
        self.handles: list[Any] = []

    @classmethod
    def of(cls, model: nn.Module) -> Watch:
        """One for this model, which is not told of its calls yet."""
        return cls(arguments_of(model), encoder_of(model) is not None)

    def open_on(self, model: nn.Module) -> None:
        """Be told of every call of `model`, until `close`."""
        self.handles = [
            model.register_forward_pre_hook(self.begin, with_kwargs=True),
            model.register_forward_hook(self.end, always_call=True),
        ]

    def close(self) -> None:
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins: what was kept of the one before goes."""
        self.masks = masks_of(named(self.arguments, args, kwargs), self.two_stacks)
        self.terms, self.open, self.wanted, self.blind = [], True, torch.is_grad_enabled(), False

    def end(self, *_: Any) -> None:
        """It is over."""
        self.open = False

    def mask(self, stack: str, x: Tensor) -> Tensor | None:
        """Which positions of x (…, features) count.

        A checkpoint of a pass before the last one, computed again, has a term that nobody asks for: any mask will do.
        """
        try:
            return fitted(self.masks.get(stack), x)
        except UnsupportedError:
            if self.open:
                raise
            return x.new_ones(x.shape[:-1], dtype=torch.bool)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "masks": {}, "terms": [], "open": False}


class ActivationPiece(Piece):
    """Before a second projection: the density of what it reads; with a gate, y = g · (W a + b) too.

    In evaluation a gate of less than `skip_below` is a zero, and nothing is computed.
    """

    gate: nn.Parameter | None

    def __init__(self, site: Site, watch: Watch, stack: str, eps: float, skip_below: float | None) -> None:
        super().__init__()
        self.watch, self.stack, self.eps = watch, stack, eps
        self.skip_below, self.out_features = skip_below, site.out_features
        start = torch.ones(1, dtype=trainable_dtype(site.dtype), device=site.device)
        self.register_parameter("gate", None if skip_below is None else nn.Parameter(start))
        self._known: tuple[int, bool] | None = None

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.skips():
            return x.new_zeros(()).expand(*x.shape[:-1], self.out_features)
        if self.watch.wanted:
            self.look(x)
        if self.gate is None:
            return inner(x, *args, **kwargs)
        y = inner(x, *args, **kwargs)
        return y * self.effective().view(()).to(y.dtype)

    def look(self, x: Tensor) -> None:
        """Add this call's term to the loss."""
        if not torch.is_grad_enabled():
            self.watch.blind = True
            return
        # A checkpoint that is computed again must do the same operations again; only the term is kept no second time.
        term = density.penalty(x, self.watch.mask(self.stack, x), self.eps)
        if self.gate is not None:
            term = term * self.gate.abs().sum()
        if self.watch.open:
            self.watch.terms.append((self.stack, term))

    def skips(self) -> bool:
        """Whether the gate is shut. The answer is remembered until the gate changes, since asking stops a GPU."""
        if self.gate is None or self.training or torch.compiler.is_compiling():
            return False
        version = self.gate._version
        if self._known is None or self._known[0] != version:
            self._known = version, bool(self.gate.detach().abs() < self._least)
        return self._known[1]

    @property
    def _least(self) -> float:
        return self.skip_below or 0.0

    def effective(self) -> Tensor:
        """g, or 0 where it is shut."""
        assert self.gate is not None
        if self.training:
            return self.gate
        return self.gate * (self.gate.detach().abs() >= self._least)

    def weight(self, weight: Tensor) -> Tensor:
        return weight if self.gate is None else weight * self.effective()

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if bias is None or self.gate is None else bias * self.effective()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}


class FirstProjection(Piece):
    """At a first projection: computes nothing while the gate of its network is shut."""

    def __init__(self, site: Site, gate: ActivationPiece) -> None:
        super().__init__()
        self.shared = (gate,)  # not a child: its parameters are the second projection's
        self.out_features = site.out_features

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.shared[0].skips():
            return x.new_zeros(()).expand(*x.shape[:-1], self.out_features)
        return inner(x, *args, **kwargs)

    def weight(self, weight: Tensor) -> Tensor:
        return weight


class DensityTerm(Controller):
    """The loss of the last forward pass: w times the mean over its feed-forward networks, summed over stacks."""

    def __init__(self, watch: Watch, weight: float, networks: Mapping[str, int]) -> None:
        self.watch, self.loss_weight = watch, weight
        self.networks = networks
        """How many there are in each stack. Where some are not computed (cached states), they count as constant."""

    def extra_loss(self) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if self.watch.blind:
            raise UnsupportedError(
                "DensityLoss cannot see through reentrant gradient checkpointing, which computes activations without "
                "gradients: use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        terms, self.watch.terms = self.watch.terms, []
        if not terms or not self.loss_weight:
            return None
        stacks = dict.fromkeys(stack for stack, _ in terms)
        parts = {stack: torch.stack([term for own, term in terms if own == stack]) for stack in stacks}
        means = [part.sum() / max(len(part), self.networks.get(stack, 0)) for stack, part in parts.items()]
        return self.loss_weight * torch.stack(means).sum()
