"""Lines of code of each method, here and in HF peft: every line of every Python file, as `wc -l` counts.

    python benchmarks/lines.py      # writes docs/benchmarks/lines.md

Here a method is its file in `methods/`, and whatever of `pieces/`, `kernels/` and `combining/` no other method reaches
by imports. In peft it is its folder in `tuners/`. What several methods share is counted once, below the table.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import peft

import inlay
from inlay.engine.registry import all_methods

SOURCE, TUNERS = Path(inlay.__file__).parent, Path(peft.__file__).parent / "tuners"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "lines.md"
ROOMS = ("methods", "pieces", "kernels")


def lines(files: Iterable[Path]) -> int:
    """Of all these together."""
    return sum(len(file.read_bytes().splitlines()) for file in files)


def imports(file: Path) -> set[Path]:
    """The files of ROOMS that this one imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                parts = name.split(".")
                path = SOURCE.joinpath(*parts[1:]).with_suffix(".py") if parts[0] == "inlay" else None
                if path is not None and len(parts) > 2 and parts[1] in ROOMS and path.is_file():
                    found.add(path)
    return found


def reached(file: Path) -> set[Path]:
    """What it imports, and what that imports, other methods aside."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        for path in imports(waiting.pop()) - found:
            if path.parent.name != "methods" or path.name.startswith("_"):
                found.add(path)
                waiting.append(path)
    return found


def main() -> None:
    """Count, and write the page."""
    methods = {cls: SOURCE / "methods" / f"{cls.kind}.py" for cls in all_methods()}
    reach = {cls: reached(file) for cls, file in methods.items()}
    users = Counter(path for paths in reach.values() for path in paths)
    rows, both, folders = [], set[Path](), set[Path]()
    for cls, file in methods.items():
        own = {path for path in reach[cls] if users[path] == 1}
        folder = TUNERS / str(cls.peft_type).lower()
        theirs = set(folder.rglob("*.py")) if cls.peft_type else set()
        if theirs:
            both, folders = both | {file} | own, folders | theirs
        shown = f"{lines(theirs):,}" if theirs else "–"
        rows.append(f"| {cls.kind} | {lines([file])} | {lines(own) or '–'} | {shown} |")
    totals = {room: lines(list((SOURCE / room).rglob("*.py"))) for room in ROOMS}
    PAGE.write_text(
        "\n".join([
            "# Lines of code", "",
            "Every line of every Python file, blank ones, comments and docstrings included:",
            f"`python benchmarks/lines.py` with HF peft {peft.__version__}.",
            "Its own is what no other method reaches by imports; peft's lines are those",
            "of the method's folder in `tuners/` (of LoRA's variants the one folder that holds them all).", "",
            "| method | its file | its own beside it | HF peft |", "|---|---:|---:|---:|", *rows, "",
            f"The methods that both have: {lines(both):,} lines here, {lines(folders):,} in peft.",
            f"All of `methods/`: {totals['methods']:,}; `pieces/`, which they share: {totals['pieces']:,};",
            f"`kernels/`: {totals['kernels']:,}, with Triton's.",
            f"All of peft's `tuners/`: {lines(set(TUNERS.rglob('*.py'))):,}.", "",
        ]),
        encoding="utf-8",
    )  # fmt: skip
    print(PAGE)


if __name__ == "__main__":
    main()
