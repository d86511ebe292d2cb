"""Methods on embeddings beyond what HF peft tries: scaled rows, other ways to look rows up, a LoRA of the change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from properties.models import perturb
from torch import Tensor, nn

import inlay
from inlay.errors import UnsupportedError

IDS = torch.tensor([[3, 0, 5], [5, 7, 1]])


class Scaled(nn.Embedding):
    """As transformers' scaled embeddings: a multiple of the row."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = super().forward(ids) * self.embed_scale
        return result


class Shifted(nn.Embedding):
    """As OPT's positions: another row than the one asked for."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 2)


def model(table: Any, method: inlay.Method) -> nn.Module:
    torch.manual_seed(0)
    return perturb(inlay.attach(nn.Sequential(table(10, 8)), method))


@pytest.mark.parametrize("table", [nn.Embedding, Scaled])
@pytest.mark.parametrize(
    "method", [inlay.TinyLoRA(u=3, targets="0"), inlay.OFT(block_size=4, targets="0")], ids=["tinylora", "oft"]
)
def test_merged_is_unmerged(table: Any, method: inlay.Method) -> None:
    adapted = model(table, method)
    found = adapted(IDS)
    assert not torch.allclose(found, inlay.detach(copy.deepcopy(adapted))(IDS))
    torch.testing.assert_close(inlay.merge(adapted)(IDS), found, rtol=1e-5, atol=1e-5)


def test_rows_are_turned_wherever_they_come_from_and_a_change_of_them_needs_their_ids() -> None:
    adapted = model(Shifted, inlay.OFT(block_size=4, targets="0"))
    torch.testing.assert_close(inlay.merge(copy.deepcopy(adapted))(IDS), adapted(IDS), rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedError, match="TinyLoRA cannot sit at 0: Shifted looks its rows up"):
        model(Shifted, inlay.TinyLoRA(targets="0"))


def test_a_lora_of_the_change() -> None:
    adapted = model(nn.Embedding, inlay.TinyLoRA(u=3, targets="0"))
    expected = adapted(IDS)
    inlay.to_lora(adapted, name="lora", rank=2)
    inlay.activate(adapted, "lora")
    torch.testing.assert_close(adapted(IDS), expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_on_the_looked_up_rows_of_b() -> None:
    adapted: Any = model(nn.Embedding, inlay.TinyLoRA(u=3, dropout=0.5, targets="0")).train()
    piece = adapted[0].inlays.default.tinylora
    torch.manual_seed(4)
    found = adapted(IDS)
    torch.manual_seed(4)
    rows = F.dropout(piece.tinylora_B[IDS], 0.5)
    expected = adapted[0].weight[IDS] + rows @ piece.core() @ piece.tinylora_A
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
