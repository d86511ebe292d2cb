"""`loss.svg`, drawn by hand: a line, two axes and a few numbers need no plotting library, and always work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 64, 64, 36, 44
LOSS, METRIC, INK = "#3b6ea5", "#c2571a", "#444"


def loss_chart(lines: Sequence[dict[str, Any]], metric: str, title: str) -> str:
    """The SVG of a `metrics.jsonl`: the training loss (each step pale, smoothed strong) and the validation metric."""
    losses = [(line["step"], float(line["loss"])) for line in lines if "loss" in line]
    scores = [(line["step"], line["validation"][metric]) for line in lines if metric in line.get("validation", {})]
    last = max([step for step, _ in losses + scores], default=1)
    top = max([loss for _, loss in losses], default=1.0) or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" fill="{INK}" font-size="14">{_escaped(title)}</text>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = _y(share, 0, 1)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end" fill="{LOSS}">{share * top:.3g}</text>')
        x = LEFT + share * (WIDTH - LEFT - RIGHT)
        parts.append(f'<text x="{x}" y="{HEIGHT - 24}" text-anchor="middle" fill="{INK}">{share * last:.0f}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle" fill="{INK}">optimiser step</text>')
    parts.append(f'<text x="{LEFT - 6}" y="20" text-anchor="end" fill="{LOSS}">loss</text>')
    parts.append(_line(losses, last, 0, top, f'stroke="{LOSS}" stroke-opacity="0.3"'))
    parts.append(_line(smoothed(losses), last, 0, top, f'stroke="{LOSS}" stroke-width="2"'))
    if scores:
        low, high = min(value for _, value in scores), max(value for _, value in scores)
        low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
        parts.append(f'<text x="{WIDTH - 8}" y="20" text-anchor="end" fill="{METRIC}">{_escaped(metric)}</text>')
        for value in (low, high):
            y = _y(value, low, high) + 4
            parts.append(f'<text x="{WIDTH - RIGHT + 6}" y="{y}" fill="{METRIC}">{value:.3f}</text>')
        parts.append(_line(scores, last, low, high, f'stroke="{METRIC}" stroke-width="2"'))
        for step, value in scores:
            parts.append(f'<circle cx="{_x(step, last)}" cy="{_y(value, low, high)}" r="3" fill="{METRIC}"/>')
    return "\n".join([*parts, "</svg>", ""])


def smoothed(points: Sequence[tuple[int, float]], keep: float = 0.9) -> list[tuple[int, float]]:
    """An exponential moving average, corrected for its start (as Adam corrects its own)."""
    total, result = 0.0, []
    for count, (step, value) in enumerate(points, start=1):
        total = keep * total + (1 - keep) * value
        result.append((step, total / (1 - keep**count)))
    return result


def _x(step: float, last: int) -> float:
    return round(LEFT + step / max(last, 1) * (WIDTH - LEFT - RIGHT), 1)


def _y(value: float, low: float, high: float) -> float:
    return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)


def _line(points: Sequence[tuple[int, float]], last: int, low: float, high: float, style: str) -> str:
    path = " ".join(f"{_x(step, last)},{_y(value, low, high)}" for step, value in points)
    return f'<polyline points="{path}" fill="none" {style}/>'


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
