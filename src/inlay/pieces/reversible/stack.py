"""A stack of blocks run as two coupled streams, in any model that hands hidden states from block to block.

Each block's piece takes the two streams from the `Flow` of the pass, couples them (`kernels/reversible.py`), and hands
their mean on to the model, which carries it to the next block: the model's own loop runs as ever, and so do its masks,
position embeddings and caches. The first block of a pass starts both streams as its input.

    variant 1    F = the block,    G = a network      streams swapped after each block
    variant 2    F = a network,    G = the block      streams swapped after each block
    variant 3    F = the block's attention half, G = its feed-forward half

A half is the block's own forward with the other half silent: a sub-layer that returns zero leaves its residual branch
as it was, and where a norm ends the attention half, that norm's output is read (F) or given (G).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.errors import UnsupportedError
from inlay.kernels.reversible import Call, Segment, error_bound, reversible
from inlay.pieces.reversible.call_arguments import Arguments, caches, without_caches

GAINS = {1: (2.0, 0.0), 2: (0.0, 2.0), 3: (2.0, 2.0)}
"""What the error bound takes F and G to magnify a small change by: a block or half at most 2, a small network 0."""


@dataclasses.dataclass
class Flow:
    """The streams of one pass on their way through a stack."""

    x1: Tensor
    x2: Tensor
    mean: Tensor
    """What the model was last given, and must give to the next block."""
    dtype: torch.dtype
    """Of the model's hidden states; the streams are fp32 at least."""
    segment: Segment | None = None
    length: int = 0
    """Calls in the segment so far."""
    invert: bool = True


class Recorded(NamedTuple):
    """One call of a block, with its streams."""

    call: Call
    tensors: list[Tensor]
    into: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]


class ReversibleStack:
    """What the pieces of one stack share: the coupling, how often streams are kept, and the pass that is under way."""

    def __init__(self, variant: int, scales: tuple[float, float], every: int, depth: int) -> None:
        self.variant = variant
        self.scales = scales
        self.every = every
        self.depth = depth
        self.invert = True
        """Whether passes with gradients keep streams at the ends of segments alone; False: whatever autograd keeps."""
        self.checked = variant != 3
        self._forget()

    def _forget(self) -> None:
        self.flow: Flow | None = None
        self.phase: str | None = None
        """Variant 3, in a half: "attend" or "feed"."""
        self.between: Tensor | None = None
        """Variant 3: what stands between the halves, where a norm ends the first."""
        self.record: list[Recorded] | None = None

    @property
    def constants(self) -> tuple[int, float, float]:
        """What must be alike for two adapters to share a pass."""
        return (self.variant, *self.scales)

    def arrive(self, index: int, hidden: Tensor) -> Flow:
        """The pass that a block is called in. UnsupportedError where the model came between two blocks."""
        if index == 0 or self.flow is None:
            stream = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            self.flow = Flow(stream, stream, hidden, hidden.dtype, invert=self.invert)
        elif self.flow.mean is not hidden:
            self.flow = None
            raise UnsupportedError(
                "MEFT: the model changes its hidden states between two blocks, which a reversible stack cannot undo: "
                "choose blocks with layers=... that follow upon each other, or use Adapter(placement='parallel')"
            )
        return self.flow

    def advance(self, flow: Flow, index: int, y1: Tensor, y2: Tensor) -> Tensor:
        """Take a block's streams; returns what the model is given."""
        flow.x1, flow.x2 = (y1, y2) if self.variant == 3 else (y2, y1)
        flow.mean = ((y1 + y2) / 2).to(flow.dtype)
        if index == self.depth - 1:
            self.flow = None
        return flow.mean

    def place_in_segment(self, flow: Flow, index: int) -> tuple[Segment, tuple[bool, bool]]:
        """The segment of the next call, and whether that is its first and its last."""
        if flow.segment is None or flow.length == self.every:
            flow.segment, flow.length = Segment(), 0
        flow.length += 1
        return flow.segment, (flow.length == 1, flow.length == self.every or index == self.depth - 1)

    @contextlib.contextmanager
    def inverting(self, invert: bool) -> Iterator[None]:
        """Passes that begin within the block are inverted, or are not."""
        before, self.invert = self.invert, invert
        try:
            yield
        finally:
            self.invert = before

    def bound(self, inversions: int, dtype: torch.dtype = torch.float32) -> float:
        """`error_bound` for this stack."""
        return error_bound(self.scales, GAINS[self.variant], self.variant != 3, inversions, dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "flow": None, "phase": None, "between": None, "record": None}


class StackPiece(Piece):
    """A piece that belongs to a reversible stack."""

    def __init__(self, stack: ReversibleStack) -> None:
        super().__init__()
        self.stack = stack


class ReversibleBlock(StackPiece):
    """On a block: couples the streams. `network` is the adapter that stands in F's or G's place (variants 1 and 2)."""

    def __init__(self, stack: ReversibleStack, index: int, network: nn.Module | None, ends_in_norm: bool) -> None:
        super().__init__(stack)
        self.index = index
        self.network = network
        self.ends_in_norm = ends_in_norm
        """Whether the attention half ends in a norm."""
        self._silent = False

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        if self._silent:  # an adapter further out couples the streams, with this one's network beside its own
            return inner(*args, **kwargs)
        stack, guests = self.stack, self._guests(inner)
        given = Arguments(args, kwargs)
        hidden, tensors = given.take()
        flow = stack.arrive(self.index, hidden)
        compiling, held = torch.compiler.is_compiling(), caches(args, kwargs)
        invert = flow.invert and torch.is_grad_enabled() and not compiling and (self.training or not held)
        if held and (invert or stack.record is not None):  # it would be written to a second time
            given, held = without_caches(given), []
        block = BlockCall(inner, given, flow.dtype, (self, *guests))
        if not stack.checked and not compiling and not held:
            block.check_halves(flow.x2, tensors)
            stack.checked = True
        call = Call(*block.parts(), stack.scales, swapped=stack.variant != 3)
        trained = [p for p in inner.module.parameters() if p.requires_grad] if invert else []
        if invert and any(t.requires_grad for t in (flow.x1, flow.x2, *tensors, *trained)):
            segment, ends = stack.place_in_segment(flow, self.index)
            y1, y2 = reversible(call, segment, ends, flow.x1, flow.x2, tensors, trained)
        else:
            y1, y2 = call.forward(flow.x1, flow.x2, tensors, remember=stack.record is not None)
            if stack.record is not None:
                stack.record.append(Recorded(call, tensors, (flow.x1, flow.x2), (y1, y2)))
        rest = block.take_rest()
        mean = stack.advance(flow, self.index, y1, y2)
        return mean if rest is None else (mean, *rest)

    def _guests(self, inner: Any) -> tuple[ReversibleBlock, ...]:
        """Pieces of other reversible adapters further in. UnsupportedError where their coupling is another one."""
        found = []
        while inner is not None:
            if isinstance(inner.piece, ReversibleBlock):
                if inner.piece.stack.constants != self.stack.constants:
                    raise UnsupportedError(
                        f"two active MEFT adapters couple the streams differently (variant, λ, β: "
                        f"{self.stack.constants} and {inner.piece.stack.constants}): activate one of them"
                    )
                found.append(inner.piece)
            inner = inner.inner
        return tuple(found)


class BlockCall:
    """One call of a block as F and G: computable any number of times, with or without gradients."""

    def __init__(
        self, inner: Callable[..., Any], given: Arguments, dtype: torch.dtype, pieces: Sequence[ReversibleBlock]
    ) -> None:
        self.inner, self.given, self.dtype, self.pieces = inner, given, dtype, pieces
        self.rest: tuple[Any, ...] | None = None
        self.done = False

    def parts(self) -> tuple[Any, Any]:
        """F and G."""
        return {1: (self.layer, self.networks), 2: (self.networks, self.layer), 3: (self.attend, self.feed)}[
            self.pieces[0].stack.variant
        ]

    def layer(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The block on a stream."""
        args, kwargs = self.given.filled(x.to(self.dtype), tensors)
        for piece in self.pieces:
            piece._silent = True
        try:
            output = self.inner(*args, **kwargs)
        finally:
            for piece in self.pieces:
                piece._silent = False
        rest = output[1:] if isinstance(output, tuple) else None
        if not self.done:
            self.rest = rest
        elif rest is not None and any(isinstance(value, Tensor) and value.grad_fn is not None for value in rest):
            raise UnsupportedError(
                "MEFT: a block returns something trained beside its hidden states, which would get no gradient; leave "
                "what is trained there out of the adapter"
            )
        made: Tensor = output[0] if isinstance(output, tuple) else output
        return made.to(x.dtype)

    def take_rest(self) -> tuple[Any, ...] | None:
        """What the block returned after its hidden states, when it first ran; it is not kept here any longer."""
        rest, self.rest, self.done = self.rest, None, True
        return rest

    def networks(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The adapters on a stream; several active ones add up."""
        found = [piece.network(x.to(self.dtype)) for piece in self.pieces if piece.network is not None]
        total: Tensor = sum(found[1:], found[0])
        return total.to(x.dtype)

    def attend(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The block's attention half."""
        with self.phase("attend", None):
            output = self.layer(x, tensors)
            between = self.pieces[0].stack.between
        return output if between is None else between.to(x.dtype)

    def feed(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The block's feed-forward half."""
        with self.phase("feed", x.to(self.dtype) if self.pieces[0].ends_in_norm else None):
            return self.layer(x, tensors)

    @contextlib.contextmanager
    def phase(self, phase: str, between: Tensor | None) -> Iterator[None]:
        """Within the block the sub-layers of the other half are silent."""
        stacks = [piece.stack for piece in self.pieces]
        for stack in stacks:
            stack.phase, stack.between = phase, between
        try:
            yield
        finally:
            for stack in stacks:
                stack.phase = stack.between = None

    @torch.no_grad()
    def check_halves(self, x: Tensor, tensors: Sequence[Tensor]) -> None:
        """UnsupportedError unless the halves, one after the other, compute what the block does."""
        training = [module for module in self.inner.module.modules() if module.training]  # type: ignore[attr-defined]
        for module in training:
            module.training = False
        try:
            whole = self.layer(x, tensors)
            halves = self.feed(self.attend(x, tensors), tensors)
        finally:
            for module in training:
                module.training = True
        allowed = torch.finfo(self.dtype).eps ** 0.5 * whole.abs().max()
        if not (halves - whole).abs().max() <= allowed:
            name = type(self.inner.module).__name__  # type: ignore[attr-defined]
            raise UnsupportedError(
                f"MEFT(variant=3): {name} is not an attention half followed by a feed-forward half (its sub-layers run "
                "beside each other, or are not residual): use variant 1 or 2"
            )


class Silence(StackPiece):
    """On a sub-layer: zero while the other half of the block runs (`phase`), in the form of its last output."""

    def __init__(self, stack: ReversibleStack, phase: str, width: int | None) -> None:
        super().__init__(stack)
        self.phase = phase
        self.width = width
        self._others = 0

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        if self.stack.phase != self.phase:
            output = inner(*args, **kwargs)
            self._others = len(output) - 1 if isinstance(output, tuple) else 0
            return output
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        zero = x.new_zeros((*x.shape[:-1], self.width or x.shape[-1]))
        return (zero, *[None] * self._others) if self._others else zero


class Between(StackPiece):
    """On the norm that ends the attention half: its output is what F returns, and G's input stands in its place."""

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        if self.stack.phase == "feed":
            return self.stack.between
        output = inner(*args, **kwargs)
        if self.stack.phase == "attend":
            self.stack.between = output
        return output


class Scope(StackPiece):
    """Around the module that calls the blocks: nothing is left of a pass that broke off, and the blocks are not
    checkpointed, which would compute them a third time.
    """

    def __init__(self, stack: ReversibleStack, blocks: Sequence[nn.Module]) -> None:
        super().__init__(stack)
        self.blocks = tuple(blocks)  # a tuple hides them from registration

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        blocks = [block for block in self.blocks if getattr(block, "gradient_checkpointing", False)]
        checkpointed = [m for block in blocks for m in block.modules() if getattr(m, "gradient_checkpointing", False)]
        for module in checkpointed:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        try:
            return inner(*args, **kwargs)
        finally:
            self.stack.flow = None
            for module in checkpointed:
                module.gradient_checkpointing = True  # type: ignore[assignment]
