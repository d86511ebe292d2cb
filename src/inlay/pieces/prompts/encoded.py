"""A prompt whose vectors a network computes: an MLP, or an LSTM and an MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    pass


class EncodedPrompt(nn.Module):
    """The prompt's vectors (n, d) from trained vectors e (n, d) and an encoder."""

    def __init__(self, method: Any, n: int, d: int) -> None:
        super().__init__()
        h = method.hidden_size or d
        self.embedding = nn.Parameter(torch.randn(n, d))
        self.lstm: nn.LSTM | None = None
        if method.encoder == "lstm":
            self.lstm = nn.LSTM(d, h, method.num_layers, dropout=method.dropout, bidirectional=True, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, d))
        else:
            self.mlp = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, d))

    def forward(self) -> Tensor:
        """(n, d)."""
        hidden: Tensor = self.embedding
        if self.lstm is not None:
            hidden = self.lstm(hidden.unsqueeze(0))[0].squeeze(0)
        output: Tensor = self.mlp(hidden)
        return output
