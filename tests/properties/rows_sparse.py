"""Rows of the matrix for the methods that train chosen entries. By chance: no dtype then chooses other ones."""

from __future__ import annotations

from collections.abc import Callable

from properties.models import HOSTS, Row
from torch import nn

import inlay


def share(host: str, part: float) -> Callable[[nn.Module], int]:
    """So large a part of everything but the new head, and the head."""

    def count(model: nn.Module) -> int:
        head = HOSTS[host].head
        return round(part * (sum(p.numel() for p in model.parameters()) - head)) + head

    return count


ROWS = [
    Row("sparse", inlay.SparseDelta(score="random", budget=0.3),
        {host: share(host, 0.3) for host in ("gpt2", "bert", "conv")}, peft=False, compiled=()),
    Row("sparse-r", inlay.SparseDelta(score="random", r=2, targets="query,value"), {"bert": 4 * 2 * (32 + 32)},
        compiled=()),
    Row("apet", inlay.APET(budget=0.5), {host: share(host, 0.5) for host in ("llama", "tied")}, peft=False,
        compiled=("tied",)),
]  # fmt: skip
