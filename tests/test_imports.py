"""The house's one-way street, read off the sources; and that naming things costs no torch."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "inlay"
ROOMS = ["cli", "compare", "fewshot", "train", "tasks", "combining", "methods", "pieces", "kernels", "engine", "errors"]
# All but the package's front door, which names every room.
FILES = sorted(file for file in SOURCE.rglob("*.py") if file != SOURCE / "__init__.py")


def room(module: str) -> str | None:
    """The room that a dotted name lies in; None for the package itself and for what is not ours."""
    parts = module.split(".")
    return parts[1] if parts[0] == "inlay" and len(parts) > 1 else None


def imported(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_a_room_imports_only_what_stands_to_its_right(file: Path) -> None:
    here = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    for module in imported(ast.parse(file.read_text(encoding="utf-8"))):
        there = room(module)
        if there in ROOMS:
            assert ROOMS.index(here) <= ROOMS.index(there), f"{here}/ imports {module}, which stands to its left"


def test_the_engine_names_no_method() -> None:
    kinds = {file.stem for file in (SOURCE / "methods").glob("[!_]*.py")}
    for file in (SOURCE / "engine").glob("*.py"):
        named = imported(ast.parse(file.read_text(encoding="utf-8")))
        assert not {module for module in named if module.startswith("inlay.methods.")}, file
    assert kinds, "the methods are files"


@pytest.mark.parametrize(
    "code",
    [
        "import inlay",
        "import inlay.errors",
        "from inlay.train import Run; Run.from_settings({'model': 'm', 'train': {'learning_rate': 1e-3}})",
        "from inlay.cli.app import run; assert run(['--help'], False) == 0",
        "from inlay.cli.app import run; assert run(['train', '--help'], False) == 0",
        "from inlay.cli.app import run; assert run(['train', '--model', 'm', '--set', 'train.lr=1'], False) == 2",
    ],
)
def test_naming_things_costs_no_torch(code: str) -> None:
    probe = (
        f"{code}\nimport sys\nprint([m for m in ('torch', 'transformers', 'datasets', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_is_quick() -> None:
    # Processor seconds, because other tests run beside this one: 0.3 on the machine this was written on.
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "inlay.cli", "--help"], capture_output=True, check=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5, seconds
