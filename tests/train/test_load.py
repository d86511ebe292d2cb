"""A quantised base through a whole run: trained, measured, merged into the plain weights."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from inlay.engine.host import hosts
from inlay.errors import ConfigError, MissingExtraError
from inlay.tasks import quantised
from inlay.tasks.loading import quiet
from inlay.train import Run, evaluate, merge, train
from inlay.train.use import open_run

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def run(model: Path, rows: Path, out: Path, load: str) -> Run:
    settings = {"max_steps": 3, "per_device_train_batch_size": 4}
    method = {"kind": "lora", "r": 2}
    return Run(model=str(model), data=str(rows), method=method, train=settings, max_length=16, out=str(out), load=load)


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for bitsandbytes' kernels, which take 64 outputs at a time."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    with quiet():
        config = BertConfig(vocab_size=19, max_position_embeddings=64, initializer_range=0.3, **sizes)
        BertForMaskedLM(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("load", "stored"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_a_whole_run(load: str, stored: str, model: Path, rows: Path, tmp_path: Path) -> None:
    record = train(run(model, rows, tmp_path / "run", load), progress=False)
    assert all(map(math.isfinite, record.metrics["test"].values()))
    opened = open_run(tmp_path / "run")
    kinds = {path: type(module).__name__ for path, module, _ in hosts(opened.model)}
    assert kinds["classifier"] == kinds["bert.pooler.dense"] == "Linear"  # new ones, which are trained
    assert {kind for path, kind in kinds.items() if "encoder" in path} == {stored}
    assert evaluate(tmp_path / "run") == record.metrics["test"]
    merged = merge(tmp_path / "run", tmp_path / "merged")
    assert merged.quantisation > 0
    assert merged.largest_difference <= merged.tolerance


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_what_is_kept_in_memory(model: Path, rows: Path, tmp_path: Path) -> None:
    """A quarter of what bf16 takes, in codes; the rest computes in the dtype of the run."""
    train(run(model, rows, tmp_path / "run", "4bit"), progress=False)
    held = open_run(tmp_path / "run").model
    query = held.bert.encoder.layer[0].attention.self.query
    assert query._parameters["weight"].dtype == torch.uint8
    assert query._parameters["weight"].numel() == query.in_features * query.out_features / 2
    assert held.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16


def test_bad_input(model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="load must be one of auto, 4bit, 8bit; got '5bit'"):
        run(model, rows, tmp_path, "5bit")
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"load=4bit needs bitsandbytes.*inlay\[quant\]"):
        quantised.loading("4bit", "auto")
    assert quantised.loading("auto", "auto") == {}
    assert quantised.loading("auto", "float16") == {"dtype": "float16"}
