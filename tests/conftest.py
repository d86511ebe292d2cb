"""Shared fixtures. Every test is offline and seeded; data and weights beside the repository are optional."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is first imported; peft brings it along

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and small real weights that lies beside the repository on development machines."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the data folder ../shared/data beside the repository, which is not there")
    return SHARED / "data"
