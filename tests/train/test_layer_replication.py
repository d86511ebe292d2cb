"""Runs on a base that is made deeper with its own layers: from settings to a folder, and all that is done with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train.interrupted import curve, press_ctrl_c_at, same_adapters
from transformers import AutoModelForSequenceClassification

from inlay.cli.app import run as command
from inlay.engine.adapters import adapters_of
from inlay.engine.replication import replicated_layers
from inlay.errors import ConfigError
from inlay.train import Interrupted, Run, check, evaluate, merge, predict, train
from inlay.train.use import open_run

RANGES = [[0, 2], [1, 2]]
BRIEF = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 0.01}
IDS = torch.arange(5, 17)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def test_a_run_is_the_same_model_wherever_it_is_opened(
    make_run: Callable[..., Run], rows: Path, tmp_path: Path
) -> None:
    deep = make_run("deep", train=BRIEF, layer_replication=RANGES)
    train(deep, progress=False)
    assert Run.from_yaml(Path(deep.out) / "run.yaml").layer_replication == RANGES
    opened = open_run(deep.out)
    assert replicated_layers(opened.model) == RANGES
    assert opened.model.config.num_hidden_layers == 3
    places = {site.path.split(".layer.")[1][0] for site, _ in adapters_of(opened.model).get("default").pieces()
              if ".layer." in site.path}  # fmt: skip
    assert places == {"0", "1", "2"}
    found = evaluate(deep.out)
    assert found == evaluate(deep.out, rows / "test.jsonl")
    assert len(predict(deep.out, rows / "test.jsonl")) == 12
    merged = merge(deep.out, tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert plain.config.num_hidden_layers == 3
    assert not {"inlays"} & {part for name in plain.state_dict() for part in name.split(".")}
    torch.testing.assert_close(logits(plain), logits(opened.model), rtol=1e-5, atol=merged.tolerance)


def test_it_goes_on_where_it_was_stopped(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"train": {**BRIEF, "save_steps": 2}, "layer_replication": RANGES}
    whole, halves = make_run("whole", **settings), make_run("halves", **settings)
    train(whole, progress=False)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        press_ctrl_c_at(patched, 3)
        train(halves, progress=False)
    with pytest.raises(ConfigError, match=r"layer_replication is \[\[0, 2\], \[1, 2\]\], not \[\[0, 2\]\]"):
        train(halves.replace(layer_replication=[[0, 2]]), resume=True, progress=False)
    train(halves, resume=True, progress=False)
    assert same_adapters(whole, halves)
    assert curve(whole) == curve(halves)


def test_other_adapters_of_the_same_layers_are_stacked(make_run: Callable[..., Run]) -> None:
    first = make_run("first", train=BRIEF, layer_replication=RANGES)
    train(first, progress=False)
    second = make_run(
        "second", train=BRIEF, layer_replication=RANGES, adapters={"first": first.out},
        compose={"stack": ["first", "default"]},
    )  # fmt: skip
    train(second, progress=False)
    assert replicated_layers(open_run(second.out).model) == RANGES


def test_the_flag_and_what_is_no_range(
    make_run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(make_run(train=BRIEF).to_yaml())
    assert "layer_replication" not in file.read_text()
    assert command(["check", str(file), "--layer-replication", "[[0, 2], [1, 2]]"], False) == 0
    assert "layer_replication" in capsys.readouterr().out
    assert make_run(replicate_layers=RANGES).layer_replication == RANGES
    for wrong in ([], [[0]], [[0, 1.5]], "0-4", [0, 2], 3):
        with pytest.raises(ConfigError, match=r"layer_replication=.*such as \[\[0, 4\], \[2, 6\]\]"):
            make_run(layer_replication=wrong)
    with pytest.raises(ConfigError, match="of the 2 layers from 0 to 1"):
        check(make_run(layer_replication=[[0, 3]]))
