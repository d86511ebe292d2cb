"""Rows of the matrix for the density loss, whose gates are all that it trains."""

from __future__ import annotations

from properties.models import Row

import inlay

GATES = inlay.DensityLoss(adaptive=True)
ROWS = [Row("density", GATES, {"bert": 2, "llama": 2, "gpt2": 2, "t5": 4}, peft=False, refuses={"conv": None})]
