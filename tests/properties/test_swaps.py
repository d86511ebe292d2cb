"""A file's values go into an adapter that is loaded, whatever the method: by `hot_swap`, and as a warm start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from properties.models import Row, close, fresh, output, perturb
from properties.test_matrix import cases

import inlay
from inlay.engine.adapters import adapters_of
from inlay.fewshot.learning.warm_start import start_from


@cases(lambda row: [row.first])
@pytest.mark.parametrize("take", [inlay.hot_swap, start_from])
def test_a_loaded_adapter_computes_what_the_file_says(
    row: Row, host: str, take: Callable[..., Any], tmp_path: Path
) -> None:
    saved = row.attached(host)
    inlay.save(saved, tmp_path)
    torch.manual_seed(7)
    model = perturb(inlay.attach(fresh(host), row.at(host)), std=0.03)
    before = list(adapters_of(model).get("default").parameters())
    take(model, tmp_path)
    close(output(model, host), output(saved, host), 1e-5)
    assert all(one is two for one, two in zip(before, adapters_of(model).get("default").parameters(), strict=True))
