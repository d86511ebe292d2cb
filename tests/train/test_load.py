"""A quantised base through a whole run: trained, measured, merged into the plain weights."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

import inlay
from inlay.engine.host import hosts
from inlay.errors import ConfigError, MissingExtraError, UnsupportedError
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


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", [True, False])
def test_an_evaluation_in_between_changes_nothing(bias: bool) -> None:
    """bitsandbytes packs its codes when it is called for inference; no gradient passes packed codes."""
    import bitsandbytes

    torch.manual_seed(0)
    dtype = torch.bfloat16
    linears = [bitsandbytes.nn.Linear4bit(64, 64, bias=bias, compute_dtype=dtype, quant_type="nf4") for _ in range(2)]
    model = nn.Sequential(*linears).to("cpu")
    x = torch.randn(4, 64, dtype=dtype)
    inlay.attach(model, inlay.LoRA(targets=["0"], init="gaussian"))  # the second is called as it is

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        model(x).float().square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    before, codes = gradients(), [linear._parameters["weight"].data.clone() for linear in linears]
    with torch.no_grad():
        model.eval()(x)
    after = gradients()
    assert before
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(linear._parameters["weight"].data, c) for linear, c in zip(linears, codes, strict=True))


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_packed_codes_are_refused_for_training() -> None:
    import bitsandbytes

    linear = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4")
    model = nn.Sequential(linear).to("cpu").eval()
    with torch.no_grad():
        model(torch.randn(1, 64, dtype=torch.bfloat16))
    if not getattr(linear.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes packs nothing on this CPU (it has no AVX512-bf16)")
    with pytest.raises(UnsupportedError, match="packed the weights of 0"):
        inlay.attach(model, inlay.LoRA(targets=["0"]))
    assert linear.support_avx512bf16_for_cpu
