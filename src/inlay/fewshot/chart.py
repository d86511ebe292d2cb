"""`seeds.svg`: every seed's own figure of each metric, their mean and standard deviation; drawn by hand, as text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 240, 360, 64, 16, 76, 48
POINT, MEAN, INK = "#3b6ea5", "#c2571a", "#444"
NAMED = 8
"""Up to so many seeds stand below their points by name."""


def seeds_chart(seeds: Sequence[int], figures: Mapping[str, Sequence[float]], title: str) -> str:
    """The SVG, a panel for each metric on one scale: a point for each seed, a line at their mean m, and a band m ± sd.

    `figures` has each metric's figures in the seeds' order; sd = sqrt(Σ (x − m)² / (n − 1)), 0 for one seed.
    """
    summed = {name: (statistics.fmean(x), statistics.stdev(x) if len(x) > 1 else 0.0) for name, x in figures.items()}
    ends = [edge for mean, sd in summed.values() for edge in (mean - sd, mean + sd)]
    ends += [value for values in figures.values() for value in values]
    pad = 0.05 * (max(ends) - min(ends)) or 0.05
    scale = (min(ends) - pad, max(ends) + pad)
    width = LEFT + WIDTH * len(figures) + RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" fill="{INK}" font-size="14">{escape(title)}</text>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = scale[0] + share * (scale[1] - scale[0])
        y = _y(value, scale)
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end" fill="{INK}">{value:.3f}</text>')
    for number, (name, values) in enumerate(figures.items()):
        parts += _panel(LEFT + WIDTH * number, name, dict(zip(seeds, values, strict=True)), *summed[name], scale)
    parts.append(f'<text x="{width / 2}" y="{HEIGHT - 8}" text-anchor="middle" fill="{INK}">seed</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(
    left: float, name: str, points: Mapping[int, float], mean: float, sd: float, scale: tuple[float, float]
) -> list[str]:
    """One metric: its band, its line, its points from left to right, and what they come to."""
    start, end, middle = left + 12, left + WIDTH - 12, left + WIDTH / 2
    top, line, bottom = _y(mean + sd, scale), _y(mean, scale), _y(mean - sd, scale)
    parts = [
        f'<text x="{middle}" y="44" text-anchor="middle" fill="{INK}" font-size="13">{escape(name)}</text>',
        f'<text x="{middle}" y="62" text-anchor="middle" fill="{MEAN}">{mean:.4f} ± {sd:.4f}</text>',
        f'<rect x="{start}" y="{top}" width="{end - start}" height="{round(bottom - top, 1)}" fill="{MEAN}" '
        'fill-opacity="0.15"/>',
        f'<line x1="{start}" x2="{end}" y1="{line}" y2="{line}" stroke="{MEAN}" stroke-width="2"/>',
    ]
    for number, (seed, value) in enumerate(points.items()):
        x, y = round(start + (number + 0.5) * (end - start) / len(points), 1), _y(value, scale)
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{POINT}"><title>seed {seed}: {value:.4f}</title></circle>')
        if len(points) <= NAMED:
            parts.append(f'<text x="{x}" y="{HEIGHT - 28}" text-anchor="middle" fill="{INK}">{seed}</text>')
    return parts


def _y(value: float, scale: tuple[float, float]) -> float:
    low, high = scale
    return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)
