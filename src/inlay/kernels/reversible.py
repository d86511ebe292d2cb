"""Two coupled streams of which a backward pass needs only the ends: the rest is computed again by inversion.

    y1 = λ x1 + F(x2)          x2 = (y2 − G(y1)) / β
    y2 = β x2 + G(y1)          x1 = (y1 − F(x2)) / λ

A run of such calls (a `Segment`) keeps x2 of its first and y1, y2 of its last. Backward, the last call starts from what
was kept, and each call hands the inputs that it has found on to the one below it. What the first call began from is
never found by inversion, so k calls are k − 1 inversions deep. F and G run again with the random numbers, and under the
autocast, of the first time. Division by λ and β magnifies rounding: `error_bound` says by how much.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from inlay.errors import UnsupportedError

Part = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""F or G: of a stream and of the tensors that the whole call was given beside it."""

ROUNDINGS = 4.0
"""In a sum and in what undoes it, relative to the largest entry of a stream: two each."""


class Segment:
    """Calls one after another, between two places where streams are kept."""

    def __init__(self) -> None:
        self.found: tuple[Tensor, Tensor] | None = None
        """In a backward pass: y1 and y2 of the call whose turn is next."""


class Surroundings:
    """What a computation depends on beside its arguments, so that it can be done again: random numbers and autocast."""

    def __init__(self, device: torch.device) -> None:
        kinds = dict.fromkeys((device.type, "cpu"))
        self.device = device
        self.autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        self.states: list[Tensor] | None = self._states()

    def _states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type != "cpu":
            states.append(torch.get_device_module(self.device).get_rng_state(self.device))
        return states

    def settle(self) -> None:
        """After the computation: forget the states if no random number was drawn."""
        if self.states is not None and all(map(torch.equal, self.states, self._states())):
            self.states = None

    @contextlib.contextmanager
    def cast(self) -> Iterator[None]:
        """Within the block autocast is what it was. It remembers no casts: those made without gradients have none."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within the block everything is as it was the first time; afterwards, as it is now."""
        with self.cast():
            if self.states is None:
                yield
                return
            now = self._states()
            self._set(self.states)
            try:
                yield
            finally:
                self._set(now)

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.get_device_module(self.device).set_rng_state(state, self.device)


class Call:
    """One call of a reversible block: F, G, λ and β, and what is needed to compute F and G a second time."""

    def __init__(self, first: Part, second: Part, scales: tuple[float, float], swapped: bool) -> None:
        self.parts = first, second
        self.scales = scales
        self.swapped = swapped
        """Whether the block above takes (y2, y1) for its (x1, x2)."""
        self.surroundings: list[Surroundings] = []

    def forward(
        self, x1: Tensor, x2: Tensor, tensors: Sequence[Tensor], remember: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(y1, y2); `remember`: they are to be inverted later."""
        (first, second), (scale1, scale2) = self.parts, self.scales
        if not remember:
            y1 = torch.add(first(x2, tensors), x1, alpha=scale1)
            return y1, torch.add(second(y1, tensors), x2, alpha=scale2)
        y1 = torch.add(self._remembered(first, x2, tensors), x1, alpha=scale1)
        return y1, torch.add(self._remembered(second, y1, tensors), x2, alpha=scale2)

    def _remembered(self, part: Part, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        surroundings = Surroundings(x.device)
        with surroundings.cast():
            made = part(x, tensors)
        surroundings.settle()
        self.surroundings.append(surroundings)
        return made

    def second_input(self, y2: Tensor, g: Tensor) -> Tensor:
        """x2 from y2 and G(y1)."""
        return (y2 - g) / self.scales[1]

    def first_input(self, y1: Tensor, f: Tensor) -> Tensor:
        """x1 from y1 and F(x2)."""
        return (y1 - f) / self.scales[0]

    @torch.no_grad()
    def inverse(self, y1: Tensor, y2: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(x1, x2), without gradients."""
        with self.surroundings[1].again():
            x2 = self.second_input(y2, self.parts[1](y1, tensors))
        with self.surroundings[0].again():
            return self.first_input(y1, self.parts[0](x2, tensors)), x2

    def below(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """(y1, y2) of the block below, of which x1 and x2 were made."""
        return (x2, x1) if self.swapped else (x1, x2)


def reversible(
    call: Call, segment: Segment, ends: tuple[bool, bool], x1: Tensor, x2: Tensor,
    tensors: Sequence[Tensor], parameters: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y1, y2), keeping streams only where the segment begins and ends (`ends`: whether this call is first, or last).

    `parameters` are all trained tensors that F and G read by themselves; others in their graph are an UnsupportedError
    in the backward pass.
    """
    y1, y2 = _Reversible.apply(call, segment, ends, len(tensors), x1, x2, *tensors, *parameters)  # type: ignore[no-untyped-call]
    return y1, y2


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, segment: Segment, ends: tuple[bool, bool], count: int, *given: Tensor) -> Any:
        x1, x2, *rest = given
        tensors, ctx.parameters = rest[:count], rest[count:]
        y1, y2 = call.forward(x1, x2, tensors, remember=True)
        ctx.call, ctx.segment, ctx.ends, ctx.count = call, segment, ends, count
        first, last = ends
        ctx.save_for_backward(*tensors, *[x2] * first, *[y1] * last, *[y2] * (last and not first))
        return y1, y2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> Any:
        call, (first, last) = ctx.call, ctx.ends
        saved = list(ctx.saved_tensors)
        tensors, kept = saved[: ctx.count], saved[ctx.count :]
        needs = ctx.needs_input_grad[4:]
        given = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs[2 : 2 + ctx.count], strict=True)]
        trained = [t for t in (*given, *ctx.parameters) if t.requires_grad]
        x2 = kept.pop(0) if first else None
        if not last and ctx.segment.found is None:
            raise UnsupportedError(
                "the backward pass of a reversible stack began below its last block: every block must run in every "
                "forward pass (set the model's layerdrop to 0)"
            )
        y1, y2 = (kept[0], kept[-1]) if last else ctx.segment.found
        ctx.segment.found = None

        g, (through, *second) = _gradients(call, 1, y1, True, given, trained, d2)
        d1 = d1 if through is None else d1 + through
        x2 = call.second_input(y2, g) if x2 is None else x2
        f, (through, *others) = _gradients(call, 0, x2, needs[1], given, trained, d1)
        if not first:
            ctx.segment.found = call.below(call.first_input(y1, f), x2)

        dx1 = d1 * call.scales[0] if needs[0] else None
        dx2 = _sum(d2 * call.scales[1], through) if needs[1] else None
        found = iter([_sum(one, other) for one, other in zip(second, others, strict=True)])
        rest = [next(found) if t.requires_grad else None for t in (*given, *ctx.parameters)]
        return (None, None, None, None, dx1, dx2, *rest)


def _gradients(
    call: Call, number: int, x: Tensor, need: bool, given: Sequence[Tensor], trained: Sequence[Tensor], d: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """F(x) or G(x), computed again, and the gradients of x (None unless needed) and of what is trained."""
    x = x.detach().requires_grad_(need)
    with torch.enable_grad(), call.surroundings[number].again():
        made = call.parts[number](x, given)
    if not made.requires_grad:
        return made, [None] * (1 + len(trained))
    leaves = [x, *trained] if need else list(trained)
    _refuse_others(made, leaves)
    with _hooks_waiting(trained):
        found: list[Tensor | None] = list(torch.autograd.grad(made, leaves, d, allow_unused=True)) if leaves else []
    return made.detach(), found if need else [None, *found]


@contextlib.contextmanager
def _hooks_waiting(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Hooks on these tensors run when the gradients found here reach them, and must not run here already."""
    held = [(t._backward_hooks, dict(t._backward_hooks)) for t in tensors if t._backward_hooks]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, entries in held:
            hooks.update(entries)


def _refuse_others(made: Tensor, leaves: Sequence[Tensor]) -> None:
    """A trained tensor that nobody named would get no gradient, and nobody would notice."""
    known, seen, waiting = {id(leaf) for leaf in leaves}, set(), [made.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
            raise UnsupportedError(
                f"a trained tensor of shape {tuple(leaf.shape)} is read inside a reversible block without lying in it, "
                "so it would get no gradient: train it without MEFT, or freeze it (inlay.trainable)"
            )
        waiting += [after for after, _ in node.next_functions]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other


# -- how far to trust an inversion -------------------------------------------------------------------------------------


def error_bound(
    scales: tuple[float, float], gains: tuple[float, float], swapped: bool, inversions: int, dtype: torch.dtype
) -> float:
    """The largest error of a stream after so many inversions, relative to the streams' largest entry.

    e(x2) = (e(y2) + g_G e(y1) + ρ) / β and e(x1) = (e(y1) + g_F e(x2) + ρ) / λ, with ρ four roundings. `gains` are
    g_F and g_G: by how much F and G magnify a small change of their input, at most.
    """
    rounding = ROUNDINGS * torch.finfo(dtype).eps / 2
    e1 = e2 = 0.0
    for _ in range(inversions):
        x2 = (e2 + gains[1] * e1 + rounding) / scales[1]
        x1 = (e1 + gains[0] * x2 + rounding) / scales[0]
        e1, e2 = (x2, x1) if swapped else (x1, x2)
    return max(e1, e2)


def longest_segment(
    scales: tuple[float, float], gains: tuple[float, float], swapped: bool, dtype: torch.dtype, tolerance: float,
    most: int,
) -> int:  # fmt: skip
    """How many calls may lie between two kept streams, at most `most`, for the bound to stay within the tolerance."""
    lengths = range(1, most + 1)
    return max(k for k in lengths if k == 1 or error_bound(scales, gains, swapped, k - 1, dtype) <= tolerance)
