"""One step under DistributedDataParallel, in a process of its own: `torch.multiprocessing.spawn` calls `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from oracles.plain_formulas import trained
from pieces.fusing_hosts import IDS, decoder, logits
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

import inlay


def gradients(model: Any, ids: Tensor, run: Any) -> dict[str, Tensor]:
    run(input_ids=ids, use_cache=False).logits.square().mean().backward()
    return {name: parameter.grad for name, parameter in trained(model).items() if parameter.grad is not None}


def fused() -> Any:
    """A model that has learned who shares."""
    model = inlay.fuse(decoder(), siblings=True)
    logits(model)
    return model


def train(rank: int, folder: str) -> None:
    """The gradients of one row of the batch, averaged over both processes, into a file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model = fused()
        found = gradients(model, IDS[rank : rank + 1], DistributedDataParallel(model))
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()
