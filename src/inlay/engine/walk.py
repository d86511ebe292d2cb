"""A model's modules as they were before anything was attached: the insides of hosts' pieces are not walked through."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from inlay.engine.host import CHILD


def modules(model: nn.Module, hidden: Collection[str] = (CHILD,)) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) in the order of `named_modules`, each module once, without children of a `hidden` name.

    `named_modules` passes every module on through as many generators as it lies deep, and would walk through the
    pieces of every adapter, which may well be more modules than the base has.
    """
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        if module._modules:
            prefix = f"{path}." if path else ""
            below = [(prefix + name, m) for name, m in module._modules.items() if m is not None and name not in hidden]
            waiting += reversed(below)
