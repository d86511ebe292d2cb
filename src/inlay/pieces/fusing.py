"""`fuse`: neighbouring linears with LoRA computed in one function, without a word changed in the model's code.

Two ways, each a piece that looks at what is there at every call and steps aside where it is anything else:

    gated feed-forward networks    down(f(gate(x)) ⊙ up(x)) keeps neither f(gate(x)) nor the product for the backward
    siblings                       linears that read the same x are computed when the first of them is called

Both are off unless asked for. A second adapter, another dtype, compiling, or hooks on what is computed inside send a
call the ordinary way, which is always right.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from inlay.engine import fused
from inlay.engine.adapters import adapters_of, base_model
from inlay.engine.host import CHILD, FUSED, Inlays, base_class, inlays_of
from inlay.engine.linear import Linear
from inlay.engine.piece import Piece
from inlay.errors import TargetError
from inlay.kernels import gated, siblings
from inlay.kernels.choice import compute_dtype, fusible
from inlay.kernels.lora import suits
from inlay.pieces.lora.piece import LoRAPiece

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks",
                "_global_backward_pre_hooks")  # fmt: skip
PARTS = ("gate_proj", "up_proj", "down_proj")
SCOPE, SIBLING, GATED = "siblings_scope", "sibling", "gated"


def fuse(model: nn.Module, *, mlp: bool = True, siblings: bool = False, shared_dropout: bool = False) -> nn.Module:
    """Compute neighbouring LoRAs together; returns the same model. `detach` of the last adapter undoes it.

    `mlp`: gated feed-forward networks (gate_proj, up_proj, down_proj, act_fn) keep 2 T m activations fewer; bits stay
    the same. `siblings`: linears under one module that are called with the very same x share their small products and
    the buffer of dx; sums come in another order. With dropout they do so only if `shared_dropout`: one mask for all of
    them. Which of them share is learned from the first call, unless that is under gradient checkpointing: run one batch
    without it before. Neither way has second derivatives.

    Raises TargetError when the model has nothing of the kind; then it is as it was.
    """
    adapters = adapters_of(model)
    modules = [*base_model(model).modules()]
    networks = [module for module in modules if mlp and is_gated(module)]
    families = [(module, family) for module in modules if siblings and len(family := linears_in(module)) > 1]
    if not networks and not families:
        wanted = " or ".join(["gated feed-forward network"] * mlp + ["linears with LoRA side by side"] * siblings)
        raise TargetError(f"fuse: {type(base_model(model)).__name__} has no {wanted or 'part that was asked for'}")
    fused.remove(adapters)
    for module in networks:
        fused.insert(adapters, module, GATED, GatedPiece())
    for module, family in families:
        group = Group(shared_dropout)
        fused.insert(adapters, module, SCOPE, ScopePiece(group))
        for linear, inlays in family:
            fused.insert(adapters, linear, SIBLING, SiblingPiece(group, inlays))
    return model


def linears_in(module: nn.Module) -> list[tuple[nn.Linear, Inlays]]:
    """Those of its children that are linears with some adapter, and their pieces."""
    linears = [(child, inlays_of(child)) for child in module.children() if isinstance(child, nn.Linear)]
    return [(linear, inlays) for linear, inlays in linears if inlays is not None and inlays._modules.keys() - {FUSED}]


def hooked(module: nn.Module) -> bool:
    """Whether somebody looks at the calls of this module."""
    return any(getattr(module, name) for name in HOOKS) or any(getattr(torch_module, name) for name in GLOBAL_HOOKS)


def lora_inside(inlays: Inlays) -> tuple[LoRAPiece, Linear] | None:
    """The LoRA and the linear that a host is, when it is these and nothing else."""
    onion = inlays.call()
    if isinstance(onion.piece, SiblingPiece) and onion.inner is not None:
        onion = onion.inner
    piece = onion.piece
    if onion.inner is None or type(piece) is not LoRAPiece or not piece.plain or hooked(piece):
        return None
    base = onion.inner.linear()
    return None if base is None or base.weight.requires_grad else (piece, base)


def rate(piece: LoRAPiece) -> float:
    """The probability of dropout now."""
    return piece.dropout if piece.training else 0.0


# -- gated feed-forward networks ---------------------------------------------------------------------------------------


def is_gated(module: nn.Module) -> bool:
    """Whether the module is down(f(gate(x)) ⊙ up(x)) and no more: by its names, and then by trying its formula."""
    parts = [getattr(module, name, None) for name in PARTS]
    if not all(isinstance(part, nn.Linear) for part in parts) or not callable(getattr(module, "act_fn", None)):
        return False
    inlays = inlays_of(module)
    replaced = "forward" in module.__dict__ or (inlays is not None and inlays.own_forward is not None)
    others = module._modules.keys() - {*PARTS, "act_fn", CHILD} or module._parameters or module._buffers
    if replaced or others:
        return False
    dtype = parts[0].weight.dtype  # type: ignore[union-attr]
    dtypes = {torch.float64, dtype if dtype.is_floating_point else torch.bfloat16}
    return all(is_formula(module, dtype, training) for dtype in dtypes for training in (True, False))


@torch.no_grad()
def is_formula(module: Any, dtype: torch.dtype, training: bool) -> bool:
    """Whether its `forward` gives the formula's bits with small linears as its parts, which no hook or device sees."""
    activation = module.act_fn
    if isinstance(activation, nn.Module):
        activation = copy.copy(activation)
        activation.training = training
        activation = activation.forward
    base = base_class(type(module))
    shell: Any = base.__new__(base)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            torch.manual_seed(0)
            gate, up, down = (nn.Linear(*shape, dtype=dtype) for shape in ((8, 16), (8, 16), (16, 8)))
            parts = dict(zip(PARTS, (gate, up, down), strict=True))
            shell.__dict__.update(module.__dict__, _modules=parts, act_fn=activation, training=training)
            x = torch.randn(4, 8, dtype=dtype)
            g, u = gate(x), up(x)
            before = g.clone()
            y = down(activation(g) * u)
            return torch.equal(g, before) and torch.equal(base.forward(shell, x), y)  # g: it may work in place
    except Exception:  # whatever the forward of a stranger raises on parts that it did not expect
        return False


class GatedPiece(Piece):
    """Around a gated feed-forward network: its last linear takes gate and up instead of their product."""

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        module = inner.module
        found = self._last(inner, module) if len(args) == 1 and not kwargs and fusible(args[0]) else None
        if found is None or not fusible(found[0].lora_A, found[0].lora_B):
            return inner(*args, **kwargs)
        piece, base = found
        g, u = module.gate_proj(args[0]), module.up_proj(args[0])
        if g.dtype != u.dtype or not suits(base, g, compute_dtype(g)):
            return module.down_proj(module.act_fn(g) * u)
        return gated.adapted(module.act_fn, g, u, base, piece.lora_A, piece.lora_B, piece.scale, rate(piece))

    def _last(self, inner: Any, module: Any) -> tuple[LoRAPiece, Linear] | None:
        """The LoRA on the last linear, if that is all there is and nobody looks at its calls."""
        inlays = inlays_of(module.down_proj)
        trains = isinstance(module.act_fn, nn.Module) and any(True for _ in module.act_fn.parameters())
        watched = hooked(module.down_proj) or (isinstance(module.act_fn, nn.Module) and hooked(module.act_fn))
        if not inner.plain or inlays is None or trains or watched or not torch.is_grad_enabled():
            return None
        return lora_inside(inlays)


# -- siblings ----------------------------------------------------------------------------------------------------------


def surroundings() -> tuple[bool, Any]:
    """What gradient checkpointing changes: whether a graph is made, and who takes what is saved for the backward."""
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(False)


@dataclasses.dataclass
class Visit:
    """One call of the module that holds the siblings: what one of them has computed for the others waits here."""

    around: tuple[bool, Any]
    seen: list[tuple[SiblingPiece, Tensor]] = dataclasses.field(default_factory=list)
    """Who was called with what, in order."""
    waiting: dict[SiblingPiece, tuple[Any, Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    """By sibling: the state of affairs, x, and its output."""


class Group:
    """Linears under one module, and which of them share."""

    def __init__(self, shared_dropout: bool) -> None:
        self.shared_dropout = shared_dropout
        self.companions: dict[SiblingPiece, tuple[SiblingPiece, ...]] | None = None
        """By the first one that is called: those that get the same x, as the first call of all showed; empty once they
        were seen not to."""
        self.settled = False
        """No more is learned: a forward that is computed again for its backward must go the way it went."""
        self._threads = threading.local()

    @property
    def visit(self) -> Visit | None:
        """The call that this thread is in."""
        return getattr(self._threads, "visit", None)

    @visit.setter
    def visit(self, visit: Visit | None) -> None:
        self._threads.visit = visit

    def learn(self, visit: Visit) -> None:
        """A call is over. What nobody fetched was computed in vain, so it is not done again."""
        if self.settled:
            return
        if visit.waiting:
            self.companions = {}
        elif self.companions is None and visit.seen:
            self.companions = companions(visit.seen)

    def __getstate__(self) -> dict[str, Any]:  # threads mean nothing elsewhere: a copy learns again
        return {"shared_dropout": self.shared_dropout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def companions(seen: list[tuple[SiblingPiece, Tensor]]) -> dict[SiblingPiece, tuple[SiblingPiece, ...]]:
    """Those who were called with the same x, by the first of them."""
    groups: dict[SiblingPiece, tuple[SiblingPiece, ...]] = {}
    for piece, x in seen:
        same = tuple(dict.fromkeys(other for other, y in seen if y is x))
        if same[0] is piece and len(same) > 1:
            groups[piece] = same
    return groups


class ScopePiece(Piece):
    """Around the module that holds the siblings."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        if not fusible():
            return inner(*args, **kwargs)
        group, visit = self.group, Visit(surroundings())
        grad, hooks = visit.around
        if hooks is not None or (self.training and not grad):  # the two ways of checkpointing
            group.settled = True
        outer, group.visit = group.visit, visit
        try:
            result = inner(*args, **kwargs)
        finally:
            group.visit = outer
        group.learn(visit)
        return result


class SiblingPiece(Piece):
    """On one linear: fetches what a sibling has computed from the same x, or computes for those that will be called."""

    inlays: Inlays

    def __init__(self, group: Group, inlays: Inlays) -> None:
        super().__init__()
        self.group = group
        self.__dict__["inlays"] = inlays  # not as a child: it is above

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        visit = None if args or kwargs or not fusible(x) else self.group.visit
        if visit is None or x.is_inference() or visit.around != surroundings():
            return inner(x, *args, **kwargs)
        now = x._version, self.inlays.state.running, compute_dtype(x)
        found = visit.waiting.get(self)
        if found is not None and found[0] == now and found[1] is x:
            return visit.waiting.pop(self)[2]
        visit.seen.append((self, x))
        together = () if self.group.companions is None else self.group.companions.get(self, ())
        members = [member for piece in together if (member := piece.member(x, self)) is not None]
        if not members or len(members) < len(together):
            return inner(x)
        outputs = siblings.adapted(x, members, self.rate())
        for piece, output in zip(together[1:], outputs[1:], strict=True):
            visit.waiting[piece] = now, x, output
        return outputs[0]

    def rate(self) -> float:
        """The probability of dropout of the LoRA here."""
        found = lora_inside(self.inlays)
        return 0.0 if found is None else rate(found[0])

    def member(self, x: Tensor, first: SiblingPiece) -> siblings.Member | None:
        """This linear as the kernel takes it; None where it is anything but a LoRA on a linear, or drops by itself."""
        found = lora_inside(self.inlays)
        if found is None or not suits(found[1], x, compute_dtype(x)) or not fusible(found[0].lora_A, found[0].lora_B):
            return None
        piece, base = found
        if rate(piece) != first.rate() or (rate(piece) and not self.group.shared_dropout):
            return None
        if not base.weight.untyped_storage().size():  # sharded, and not gathered before its own call
            return None
        return siblings.Member(base, piece.lora_A, piece.lora_B, piece.scale)

    def weight(self, weight: Tensor) -> Tensor:
        return weight
