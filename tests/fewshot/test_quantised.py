"""A quantised base, asked and trained on in turns: its codes stay, and gradients reach what lies below them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from fewshot import toys
from safetensors.torch import load_file

from inlay.errors import ConfigError
from inlay.fewshot import FewShotRun, evaluate, fewshot
from inlay.fewshot.base import Base

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for bitsandbytes' kernels, which take 64 outputs at a time."""
    folder, tokenizer = tmp_path_factory.mktemp("wide"), toys.wordpiece()
    toys.tiny_bert(len(tokenizer), hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def codes(base: Base, auto: str, labels: int = 0) -> dict[str, torch.Tensor]:
    state = base.model(auto, labels).state_dict()
    return {name: value.clone() for name, value in state.items() if not value.is_floating_point()}


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("load", ["4bit", "8bit"])
def test_a_run_on_a_quantised_base(load: str, model: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in (("good film", "pos"), ("a bad movie", "neg")) * 4]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "train": str(tmp_path / "rows.jsonl"), "test": str(tmp_path / "rows.jsonl"), "model": str(model), "load": load,
        "method": {"kind": "pet", "repetitions": 1, "final": {"steps": 3}}, "templates": ["{text} It was {mask}"],
        "verbalizer": {"neg": "bad", "pos": "good"}, "shots": 2, "recipe": {"steps": 3, "learning_rate": 0.01},
        "peft": ["lora"], "out": str(tmp_path / "out"),
    }  # fmt: skip
    run = FewShotRun.from_settings(settings)
    (found,) = fewshot(run).seeds
    assert evaluate(run.out) == found.test
    (plain,) = fewshot(FewShotRun.from_settings({**settings, "load": "auto", "out": str(tmp_path / "plain")})).seeds
    assert found.flops == pytest.approx(plain.flops, rel=0.01)  # the same products, however the weights are held
    for path in Path(run.out).rglob("adapter_model.safetensors"):
        moved = [bool(value.any()) for name, value in load_file(path).items() if "lora_B" in name]
        assert moved  # what training did not reach would still be 0
        assert all(moved)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_codes_stay_as_they_are_stored(model: Path) -> None:
    base = Base(str(model), device="cpu", load="4bit")
    before, ids = codes(base, "masked-lm"), torch.tensor([[5, 6, 7]])
    assert before
    with torch.no_grad():
        for _ in range(2):  # bitsandbytes would pack them at the first
            base.model("masked-lm").eval()(input_ids=ids)
    after = codes(base, "masked-lm")
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_way_to_hold_it_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="did you mean '4bit'"):
        FewShotRun(train="rows.jsonl", load="4bits")
