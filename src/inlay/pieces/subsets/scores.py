"""How much each entry of a parameter matters: by chance, by size, by the gradients of a loss.

    random        uniform                            magnitude     |θ|
    gradient      |mean of ∂L/∂θ|                    snip          |θ · mean of ∂L/∂θ|       (Lee et al. 2018)
    fisher        mean of (∂ log p(y | x) / ∂θ)² over single examples with their labels      (Sung et al. 2021)
    lottery, l0   how far an entry moves when all are trained                                (`searches`)

Gradients are taken in as they come up in the backward and dropped: one fp32 number is held for each entry, which is
what one gradient takes, and never two. The square of a batch's mean gradient is no Fisher information; examples go
through the model one by one for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from inlay.engine.batches import Batches, looked_at

FROM_DATA = ("gradient", "snip", "fisher", "lottery", "l0")
SCORES = ("random", "magnitude", *FROM_DATA)
Parameters = Mapping[str, Tensor]
Numbers = Callable[[], Iterable[Tensor]]


def numbers(
    score: str, model: nn.Module, parameters: Parameters, batches: Batches | None, count: int, seed: int
) -> Numbers:
    """A function that gives the parameters' scores, fp32 and in the parameters' shapes, again and again."""
    if score == "random":
        return lambda: drawn(parameters, seed)
    if score == "magnitude":
        return lambda: (value.detach().float().abs() for value in parameters.values())
    assert batches is not None
    if score == "fisher":
        sums = of_gradients(model, parameters, batches, batches.examples(model, count, "fisher"), True)
        return lambda: sums
    sums = of_gradients(model, parameters, batches, batches.first(model, count, score), False)
    if score == "gradient":
        return lambda: (total.abs() for total in sums)
    pairs = list(zip(sums, parameters.values(), strict=True))
    return lambda: ((total * value.detach().float()).abs() for total, value in pairs)


def drawn(parameters: Parameters, seed: int) -> Iterator[Tensor]:
    """Uniform numbers, the same on every machine."""
    for number, value in enumerate(parameters.values()):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        yield torch.rand(value.shape, generator=generator)


def of_gradients(
    model: nn.Module,
    parameters: Parameters,
    batches: Batches,
    given: Iterable[Mapping[str, object]],
    squared: bool,
) -> list[Tensor]:
    """The mean over `given` of each parameter's gradient, or of its square."""
    sums = {id(value): torch.zeros_like(value, dtype=torch.float32) for value in parameters.values()}

    def take(value: Tensor) -> None:
        assert value.grad is not None
        gradient = value.grad.float()
        if squared:
            sums[id(value)].addcmul_(gradient, gradient)
        else:
            sums[id(value)].add_(gradient)
        value.grad = None

    done = 0
    with looked_at(model):
        model.requires_grad_(False)
        handles = []
        for value in parameters.values():
            value.requires_grad_(True)
            handles.append(value.register_post_accumulate_grad_hook(take))  # type: ignore[no-untyped-call]
        try:
            for batch in given:
                batches.loss(model, batch).backward()  # type: ignore[no-untyped-call]
                done += 1
        finally:
            for handle in handles:
                handle.remove()
    return [sums[id(value)].div_(max(done, 1)) for value in parameters.values()]
