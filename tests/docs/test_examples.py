"""What the pages show runs: their Python, command lines, run.yaml and links; and no public name is missing there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import inlay
import inlay.fewshot
import inlay.train
from inlay.cli import app, verbs
from inlay.tasks.task import make_task
from inlay.train.run import Run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shown(pages: list[Path], language: str) -> list[Any]:
    """The pages that have such blocks, as test parameters."""
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages if blocks(page, language)]


@pytest.mark.parametrize("page", shown(PAGES, "python"))
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": f"example in {page.name}"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec", dont_inherit=True), namespace)


# -- command lines -----------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[str]:
    """The lines after a prompt in console blocks that call `inlay`."""
    for block in blocks(page, "console"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ inlay "):
                yield line.removeprefix("$ ")


class Called(Exception):
    """Raised in place of the library function that a verb would have called."""


@pytest.mark.parametrize("page", shown(PAGES, "console"))
def test_command_lines_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the one library function that each verb calls, which is not called; runs are checked as far as names go."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text((blocks(page, "yaml") or ["model: bert-base-uncased\n"])[0], encoding="utf-8")
    called: list[Any] = []

    def stop(*arguments: Any, **_: Any) -> None:
        called.append(arguments)
        raise Called

    for verb in verbs.VERBS:
        room = inlay.fewshot if verb.__name__ in ("fewshot", "explain") else inlay.train
        monkeypatch.setattr(room, verb.__name__, stop, raising=room is inlay.train)
    for line in commands(page):
        arguments = shlex.split(line, comments=True)[1:]
        if "--resume" in arguments and "--out" in arguments:
            folder = Path(arguments[arguments.index("--out") + 1])
            folder.mkdir(parents=True)
            (folder / "run.yaml").write_text("model: bert-base-uncased\n", encoding="utf-8")
            (folder / "fewshot.yaml").write_text("train: train.jsonl\n", encoding="utf-8")
        with pytest.raises(Called):
            app.run(arguments, debug=True)
            raise AssertionError(f"{line} ended without an error and without calling anything")
        if called[-1] and isinstance(called[-1][0], Run):
            check_names(called[-1][0])


def check_names(run: Run) -> None:
    """The methods' and the task's names and fields, which `Run` leaves to them."""
    run.methods()
    make_task(**run.task, columns=dict(run.columns))


def test_commands_named_in_the_text_have_these_verbs_and_options() -> None:
    known: Any = typer.main.get_command(app.app)
    for page in PAGES:
        if page.name == "errors.md":  # made of wrong ones, which a test of their own tries
            continue
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for span in re.findall(r"`inlay ([^`]+)`", prose):
            verb, *rest = span.split()
            assert verb in known.commands or verb.startswith("-"), f"{page}: inlay {span}"
            parameters = known.commands[verb].params if verb in known.commands else []
            options = {name for parameter in parameters for name in parameter.opts}
            assert {word for word in rest if re.match(r"--\w", word)} <= options | {"--debug"}, f"{page}: inlay {span}"


@pytest.mark.parametrize("page", shown(PAGES, "yaml"))
def test_run_files_are_runs(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        run = Run.from_yaml(path)
        check_names(run)
        assert Run.from_settings(run.to_dict()) == run


# -- completeness ------------------------------------------------------------------------------------------------------


def test_every_public_name_is_in_the_docs() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    missing = [name for name in inlay.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == []


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"


def test_every_page_of_docs_is_reached_from_the_index() -> None:
    pages = {path.resolve() for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "adr"}
    reached = set()
    waiting = [(ROOT / "docs" / "index.md").resolve()]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = re.findall(r"\]\(([^)#]+\.md)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        found = {(page.parent / target).resolve() for target in targets if not target.startswith("https://")}
        waiting += found & pages - reached
    assert reached >= pages
