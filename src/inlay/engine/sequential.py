"""An `nn.Sequential` as a host: it runs all its children one after the other, but for the one that holds pieces."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


def without(child: str) -> dict[str, Callable[..., Any]]:
    """The methods of an `nn.Sequential`'s subclass that does not see the child of this name."""

    def layers(host: nn.Sequential) -> dict[str, Any]:
        return {name: module for name, module in host._modules.items() if name != child}

    def iterate(host: nn.Sequential) -> Iterator[Any]:
        return iter(layers(host).values())

    def length(host: nn.Sequential) -> int:
        return len(layers(host))

    def item(host: nn.Sequential, index: int | slice) -> Any:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(layers(host).items())[index]))
        return list(layers(host).values())[index]

    return {"__iter__": iterate, "__len__": length, "__getitem__": item}
