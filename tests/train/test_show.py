"""What a run shows: the chart, the lines with the time that is left, names of places folded together."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from transformers import AutoConfig, TrainerControl, TrainerState

from inlay.engine import catalogue
from inlay.errors import ConfigError
from inlay.train import methods, show
from inlay.train.callbacks import Curve, Progress, read_curve
from inlay.train.chart import loss_chart, smoothed
from inlay.train.inspect import folded
from inlay.train.record import duration

SVG = "{http://www.w3.org/2000/svg}"


def test_the_chart_is_xml_with_both_curves() -> None:
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 11)]
    lines += [{"step": 5, "validation": {"accuracy": 0.5}}, {"step": 10, "validation": {"accuracy": 0.75}}]
    root = ElementTree.fromstring(loss_chart(lines, "accuracy", "a <b> & c"))
    assert len(root.findall(f"{SVG}polyline")) == 3
    assert len(root.findall(f"{SVG}circle")) == 2
    assert "a <b> & c" in [text.text for text in root.findall(f"{SVG}text")]


@pytest.mark.parametrize("lines", [[], [{"step": 1, "loss": 0.0}], [{"step": 3, "validation": {"f1": 0.0}}]])
def test_the_chart_of_next_to_nothing_is_still_a_chart(lines: list[dict[str, object]]) -> None:
    ElementTree.fromstring(loss_chart(lines, "f1", "t"))


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value() -> None:
    assert [value for _, value in smoothed([(1, 2.0), (2, 2.0), (3, 2.0)])] == pytest.approx([2.0, 2.0, 2.0])
    assert smoothed([(1, 5.0)]) == [(1, pytest.approx(5.0))]


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0s"), (59, "59s"), (190, "3m10s"), (7500, "2h05m")])
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_plain_lines_have_the_step_the_loss_and_the_time_left(tmp_path: Path) -> None:
    stream = io.StringIO()
    curve = Curve(tmp_path / "metrics.jsonl")
    progress = Progress(curve, stream)
    state, control = TrainerState(max_steps=40, is_world_process_zero=True), TrainerControl()
    progress.on_train_begin(None, state, control)  # type: ignore[arg-type]
    for step in range(1, 41):
        state.global_step, curve.step_loss = step, 0.5
        progress.on_step_end(None, state, control)  # type: ignore[arg-type]
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("step 4/40 (10%)  loss 0.5000  ")
    assert lines[0].endswith("s left")
    assert lines[-1].endswith("0s left")


def begin(curve: Curve) -> None:
    state = TrainerState(is_world_process_zero=True)
    curve.on_train_begin(None, state, TrainerControl())  # type: ignore[arg-type]


def test_a_resumed_curve_drops_what_came_after_and_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    assert [line["step"] for line in read_curve(path)] == [1, 2, 3]
    curve = Curve(path, resumed_at=2)
    begin(curve)
    curve.add({"step": 3, "loss": 9})
    assert [line["loss"] for line in read_curve(path)] == [3, 2, 9]
    begin(Curve(path))
    assert read_curve(path) == []


def test_names_fold_over_their_numbers() -> None:
    names = [f"encoder.layer.{n}.attention.query" for n in (0, 1, 2, 5)] + ["h.3.conv1", "pooler"]
    assert [pattern for pattern, _ in folded(names)] == ["encoder.layer.{0-2,5}.attention.query", "h.3.conv1", "pooler"]
    experts = [f"layers.{layer}.experts.{expert}.up" for layer in (0, 1) for expert in (0, 1, 2)]
    assert [pattern for pattern, _ in folded(experts)] == ["layers.{0-1}.experts.{0-2}.up"]


@pytest.mark.parametrize("name", ["runs/lora/adapter", "./other", "/nowhere/lora", "lora/x"])
def test_what_looks_like_a_path_is_not_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lora").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoConfig, "from_pretrained", None)  # it is not even asked
    with pytest.raises(ConfigError, match=f"there is no model folder {re.escape(name)}"):
        show(name)


def test_a_missing_folder_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    with pytest.raises(ConfigError, match=r"there is no model folder .*lorra; did you mean 'lora'"):
        show(str(tmp_path / "lorra"))


def test_methods_over_adapters_are_listed_last() -> None:
    kinds = [row.kind for row in methods()]
    assert kinds[-len(catalogue.combining()) :] == list(catalogue.combining())
    assert {"adapter_fusion", "scalearn", "xlora"} <= set(catalogue.combining())
