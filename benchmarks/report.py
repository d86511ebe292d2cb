"""Tables and plots of the hot path, made from the JSON files in benchmarks/results/ and from nothing else.

    python benchmarks/report.py        # writes docs/benchmarks/hot-path.md between its markers, and the plots beside it

Also here: what a bound is and how it is judged, which the benchmarks use as well.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "hot-path.md"
BEGIN, END = "<!-- made by benchmarks/report.py: begin -->", "<!-- made by benchmarks/report.py: end -->"
MEASURES = {"seconds": "time", "saved_bytes": "saved bytes", "peak_bytes": "peak memory"}
Row = dict[str, Any]


# -- bounds ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bound:
    """A ratio that is to stay at or under a number; `aim` is what is hoped for, in words or as a number."""

    quantity: str
    measure: str
    """A key of what is known about each variant: "seconds", "saved_bytes" or "peak_bytes"; a number, or one a round."""
    variant: str
    over: str
    bound: float | None
    aim: float | str | None = None


def judged(bound: Bound, variants: Mapping[str, Mapping[str, Any]]) -> Row:
    """The bound with what was measured: the median over rounds; None where a variant was not there."""
    row = dataclasses.asdict(bound) | {"measured": None, "quartiles": None, "met": None}
    above, below = (variants.get(name, {}).get(bound.measure) for name in (bound.variant, bound.over))
    if above is None or below is None:
        return row
    ratios = [a / b for a, b in zip(above, below, strict=True)] if isinstance(above, list) else [above / below]
    row["measured"] = round(statistics.median(ratios), 4)
    if len(ratios) > 1:
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        row["quartiles"] = [round(low, 4), round(high, 4)]
    row["met"] = None if bound.bound is None else row["measured"] <= bound.bound
    return row


def line(row: Mapping[str, Any]) -> str:
    """A judged bound as a line of text."""
    verdict = {None: "", True: "met", False: "NOT MET"}[row["met"]]
    measured = "not measured" if row["measured"] is None else f"{row['measured']:.3f}"
    spread = "" if row["quartiles"] is None else "({:.3f}–{:.3f})".format(*row["quartiles"])
    return (
        f"  {name_of(row):<75} {measured:>12} {spread:<13}  bound {shown(row['bound']):<4}  aim {shown(row['aim']):<7}"
        f" {verdict}"
    )


def name_of(row: Mapping[str, Any]) -> str:
    """What a row measures."""
    return f"{row['quantity']}: {MEASURES.get(row['measure'], row['measure'])}, {row['variant']} / {row['over']}"


def shown(value: Any) -> str:
    """A bound or an aim as written in tables."""
    return "–" if value is None else str(value)


# -- files -------------------------------------------------------------------------------------------------------------


def rows_of(record: Any) -> list[Row]:
    """The judged bounds in a record, wherever they lie; those of admin.json from its sizes."""
    if isinstance(record, dict) and "sizes" in record:
        return list(_administration(record))
    if isinstance(record, dict):
        own = record.get("bounds")
        rows = [row for row in own if isinstance(row, dict) and "quantity" in row] if isinstance(own, list) else []
        return rows + [row for key, part in record.items() if key != "bounds" for row in rows_of(part)]
    return []


def _administration(record: Mapping[str, Any]) -> Iterator[Row]:
    for size in record["sizes"]:
        for name, figures in size["operations"].items():
            bound, aim = record["bounds"].get(name, (None, None))
            yield {
                "quantity": f"1,000 linears, d={size['d']}: {name}", "measure": "seconds", "variant": "inlay",
                "over": "peft", "bound": bound, "aim": aim, "measured": round(figures["ratio"], 4), "quartiles": None,
                "met": None if bound is None else figures["ratio"] <= bound,
            }  # fmt: skip


def circumstances(record: Mapping[str, Any]) -> str:
    """When, on what and with which versions, from the parts' own notes."""
    notes = [part["environment"] for part in record.get("parts", {}).values()]
    if "settings" in record:
        return ", ".join(f"{name} {value}" for name, value in record["settings"].items()) + "."
    if not notes:
        return ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    last = max(notes, key=lambda note: note["date"])
    named = ("torch", "transformers", "peft", "bitsandbytes")
    versions = ", ".join(f"{name} {last[name]}" for name in named if last[name])
    loads = [load for note in notes for load in note["load_average"]]
    dates = sorted({note["date"][:10] for note in notes})
    return (
        f"{versions}; {last['cpu']} ({', '.join(last['instructions'])}), {last['threads']} thread; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; load average {min(loads):.1f} to {max(loads):.1f}; "
        f"source {', '.join(sorted({note['inlay_source'] for note in notes}))}."
    )


# -- tables ------------------------------------------------------------------------------------------------------------


def bounds_table(rows: Sequence[Row]) -> str:
    """Measured against bound, one row each."""
    lines = ["| quantity | measured | quartiles | bound | aim | |", "|---|---:|---|---:|---:|---|"]
    for row in rows:
        measured = "not measured" if row["measured"] is None else f"{row['measured']:.3f}"
        quartiles = "" if row["quartiles"] is None else "{:.3f}–{:.3f}".format(*row["quartiles"])
        verdict = {None: "", True: "met", False: "**not met**"}[row["met"]]
        cells = (name_of(row), measured, quartiles, shown(row["bound"]), shown(row["aim"]), verdict)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def variants_table(part: Mapping[str, Any]) -> str:
    """Every variant of a part: time, what it keeps, how far its gradients are off."""
    variants = part["variants"]
    floor = variants["floor"]
    measure, unit = ("seconds", "CPU ms") if "seconds" in floor else ("peak_bytes", "MiB at the peak")
    scale = 1e-3 if measure == "seconds" else 2**20
    saved = "saved_bytes" in floor
    lines = [f"| variant | {unit} | × floor |" + (" MiB saved | × floor | error of gradients |" if saved else ""),
             "|---|---:|---:|" + ("---:|---:|---:|" if saved else "")]  # fmt: skip
    for name, about in variants.items():
        times = statistics.median(a / b for a, b in zip(about[measure], floor[measure], strict=True))
        cells = [name, f"{statistics.median(about[measure]) / scale:.0f}", f"{times:.2f}"]
        if saved:
            error = about.get("errors", {}).get("gradients")
            cells += [f"{about['saved_bytes'] / 2**20:.1f}", f"{about['saved_bytes'] / floor['saved_bytes']:.2f}",
                      "" if error is None else f"{error:.1e}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cases_table(cases: Mapping[str, Any]) -> str:
    """Times of an epoch with and without cached states."""
    lines = ["| what trains | epoch | with evaluation | largest difference of losses |", "|---|---:|---:|---:|"]
    for name, about in cases.items():
        times = [f"{about[part]['times faster']:.1f} × faster" for part in ("epoch", "with evaluation")]
        lines.append(f"| {name} | {' | '.join(times)} | {about['largest relative difference of losses']:.0e} |")
    return "\n".join(lines)


# -- plots -------------------------------------------------------------------------------------------------------------

WIDTH, LABELS, NUMBERS, STEP, TOP = 900, 430, 60, 22, 46
MET, MISSED, PLAIN, INK = "#3b6ea5", "#c2571a", "#9a9a9a", "#444"


def chart(rows: Sequence[Row], title: str) -> str:
    """A bar for each ratio, a mark for its bound, a line at one."""
    rows = [row for row in rows if row["measured"] is not None]
    longest = max([1.0, *(row["measured"] for row in rows), *(row["bound"] or 0 for row in rows)])
    height = TOP + STEP * len(rows) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="20" fill="{INK}" font-size="14">{_escaped(title)}</text>',
        f'<text x="12" y="37" fill="{INK}">ratios; blue: bound met, orange: not met, grey: no bound; '
        "the upright mark is the bound</text>",
    ]
    for position, row in enumerate(rows):
        y = TOP + STEP * position
        color = {None: PLAIN, True: MET, False: MISSED}[row["met"]]
        end = _x(row["measured"], longest)
        name = _escaped(name_of(row))
        parts.append(f'<text x="{LABELS - 8}" y="{y + 14}" text-anchor="end" fill="{INK}">{name}</text>')
        parts.append(f'<rect x="{LABELS}" y="{y + 3}" width="{end - LABELS:.1f}" height="14" fill="{color}"/>')
        parts.append(f'<text x="{end + 5}" y="{y + 14}" fill="{INK}">{row["measured"]:.2f}</text>')
        if row["bound"] is not None:
            x = _x(row["bound"], longest)
            parts.append(f'<line x1="{x}" x2="{x}" y1="{y}" y2="{y + 20}" stroke="black" stroke-width="2"/>')
    one = _x(1.0, longest)
    parts.append(f'<line x1="{one}" x2="{one}" y1="{TOP}" y2="{height - 16}" stroke="{INK}" stroke-dasharray="3 3"/>')
    return "\n".join([*parts, "</svg>", ""])


def _x(value: float, longest: float) -> float:
    return round(LABELS + value / longest * (WIDTH - LABELS - NUMBERS), 1)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# -- the page ----------------------------------------------------------------------------------------------------------

SECTIONS = {
    "step": ("A training step", "python benchmarks/step.py"),
    "memory": ("Peak memory", "python benchmarks/memory.py"),
    "admin": ("Administration", "python benchmarks/admin.py"),
    "mixed": ("Mixed batches", "python benchmarks/mixed.py"),
    "decode": ("Generating on a CPU", "python benchmarks/decode.py"),
    "cache_frozen": ("Frozen states computed once", "python benchmarks/cache_frozen.py"),
    "methods": ("Method by method", "python benchmarks/methods.py"),
}
HEAD = f"""# The hot path, measured

What an adapter costs beyond the frozen model, against HF peft, each figure a ratio inside one run.

{BEGIN}
{END}
"""


def section(name: str, record: Mapping[str, Any]) -> str:
    """One file's part of the page; its plots are written beside the page."""
    title, command = SECTIONS[name]
    rows = rows_of(record)
    parts = [f"## {title}", f"`{command}`, [results](../../benchmarks/results/{name}.json). {circumstances(record)}"]
    for measure, words in MEASURES.items():
        some = [row for row in rows if row["measure"] == measure and row["measured"] is not None]
        if some:
            picture = PAGE.with_name(f"{name}-{words.replace(' ', '-')}.svg")
            picture.write_text(chart(some, f"{title}: {words}"))
            parts.append(f"![{title}: {words}]({picture.name})")
    if rows:
        parts.append(bounds_table(rows))
    if "cases" in record:
        parts.append(cases_table(record["cases"]))
    for part, about in record.get("parts", {}).items():
        if "floor" in about.get("variants", {}):
            parts += [f"### {part}", f"{about['settings']['rounds']} rounds.", variants_table(about)]
    return "\n\n".join(parts)


def main() -> None:
    """Write the page from whatever results there are."""
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    page = PAGE.read_text() if PAGE.is_file() else HEAD
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"{PAGE} has to hold each marker once: {BEGIN} and {END}")
    files = {name: RESULTS / f"{name}.json" for name in SECTIONS}
    records = {name: json.loads(path.read_text()) for name, path in files.items() if path.is_file()}
    made = "\n\n".join(section(name, record) for name, record in records.items())
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")
    rows = [row for record in records.values() for row in rows_of(record)]
    counts = {verdict: sum(row["met"] is verdict for row in rows) for verdict in (True, False)}
    print(f"{PAGE}: {counts[True]} bounds met, {counts[False]} not met, from {', '.join(records) or 'no results'}")


if __name__ == "__main__":
    main()
