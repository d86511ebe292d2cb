"""A whole run on a quantised base that starts from what quantising lost; it cannot be merged into the plain weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from inlay.errors import UnsupportedError
from inlay.tasks.loading import quiet
from inlay.train import Run, evaluate, merge, train


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_whole_run(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    with quiet():
        config = BertConfig(vocab_size=19, max_position_embeddings=64, initializer_range=0.3, **sizes)
        BertForMaskedLM(config).save_pretrained(tmp_path / "base")
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
    run = Run(
        model=str(tmp_path / "base"), data=str(rows), method={"kind": "lora", "r": 2, "init": "loftq"},  # type: ignore[arg-type]
        train={"max_steps": 3, "per_device_train_batch_size": 4}, max_length=16, out=str(tmp_path / "run"), load="4bit",
    )  # fmt: skip
    record = train(run, progress=False)
    assert evaluate(tmp_path / "run") == record.metrics["test"]
    with pytest.raises(UnsupportedError, match="this base is not quantised"):
        merge(tmp_path / "run", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
