"""The chart of a run's seeds: well-formed, every point where its figure is, and mean and deviation as the report's."""

from __future__ import annotations

import statistics
from xml.etree import ElementTree

import pytest

from inlay.fewshot.chart import seeds_chart

SVG = "{http://www.w3.org/2000/svg}"


def drawn(seeds: list[int], figures: dict[str, list[float]], title: str = "runs") -> ElementTree.Element:
    return ElementTree.fromstring(seeds_chart(seeds, figures, title))


def test_points_stand_at_their_figures_around_mean_and_deviation() -> None:
    values = [0.5, 0.7, 0.9]
    root = drawn([13, 21, 42], {"accuracy": values})
    heights = [float(point.get("cy", "")) for point in root.findall(f"{SVG}circle")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert heights[0] > heights[2]  # higher is better, and y grows downwards
    (mean,) = [line for line in root.findall(f"{SVG}line") if line.get("stroke-width") == "2"]
    assert float(mean.get("y1", "")) == pytest.approx(heights[1], abs=0.1)  # 0.7
    (band,) = [shape for shape in root.findall(f"{SVG}rect") if shape.get("fill-opacity")]
    top, height = float(band.get("y", "")), float(band.get("height", ""))
    # sd = 0.2, so that the band reaches from the lowest point to the highest
    assert (top, top + height) == (pytest.approx(heights[2], abs=0.2), pytest.approx(heights[0], abs=0.2))
    texts = [text.text for text in root.findall(f"{SVG}text")]
    assert {"13", "21", "42", "accuracy", "0.7000 ± 0.2000"} <= set(texts)
    titles = [point.findtext(f"{SVG}title") for point in root.findall(f"{SVG}circle")]
    assert titles == ["seed 13: 0.5000", "seed 21: 0.7000", "seed 42: 0.9000"]


def test_each_metric_has_a_panel_and_all_points_are_within() -> None:
    figures = {"accuracy": [0.9, 0.8, 0.85, 0.7], "mcc": [-0.2, 0.1, 0.0, 0.9]}
    root = drawn([1, 2, 3, 4], figures, title="a <b> & c")
    *_, width, height = map(float, root.get("viewBox", "").split())
    points = [(float(p.get("cx", "")), float(p.get("cy", ""))) for p in root.findall(f"{SVG}circle")]
    assert len(points) == 8
    assert all(64 <= x <= width and 70 <= y <= height - 40 for x, y in points)
    assert max(x for x, _ in points[:4]) < min(x for x, _ in points[4:])
    texts = [text.text for text in root.findall(f"{SVG}text")]
    assert "a <b> & c" in texts
    for values in figures.values():
        assert f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}" in texts


@pytest.mark.parametrize("values", [[0.5, 0.5], [0.0, 0.0], [1.0] * 40, [0.3]])
def test_figures_that_do_not_differ_are_still_a_chart(values: list[float]) -> None:
    root = drawn(list(range(len(values))), {"accuracy": values})
    assert len(root.findall(f"{SVG}circle")) == len(values)
