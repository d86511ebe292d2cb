"""A prompt whose vectors a network computes: an MLP, or an LSTM and an MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine import files
from inlay.engine.checkpoint import own_entry
from inlay.errors import ConfigError
from inlay.pieces.prompts.saved import adapter_folder, check_base, saved_prompt


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

    @torch.no_grad()
    def start_from(self, model: nn.Module, folder: str, encoder: str) -> None:
        """Become the prompt of a saved adapter, encoder and all. ConfigError where it has none, or one of another kind:
        its vectors alone do not say what an encoder would have to be.
        """
        check_base(saved_prompt(folder), model)
        place = adapter_folder(folder)
        own = own_entry(files.read_config(place))
        methods = own.get("methods") or [{}]
        number = next((n for n, method in enumerate(methods) if method.get("kind") == "p_tuning"), 0)
        there, mine = methods[number].get("encoder"), self.state_dict()
        prefix = f"{number}."
        found = files.read_tensors(place, files.EXTRA)[0] if own.get("extra") else {}
        found = {key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)}
        shapes = {key: tuple(tensor.shape) for key, tensor in found.items()}
        if there != encoder or shapes != {key: tuple(tensor.shape) for key, tensor in mine.items()}:
            sizes = "of other sizes" if there == encoder else f"and {encoder!r} is needed"
            raise ConfigError(
                f"init_from: {folder} has encoder={there!r} {sizes}: set num_virtual_tokens, encoder, hidden_size and "
                "num_layers as they were there, or encoder=None, which starts from the vectors of any prompt"
            )
        self.load_state_dict(found)
