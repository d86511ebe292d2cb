"""Files and checkpoints are whole or not there, whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inlay.errors import InlayError, TrainingError
from inlay.train import checkpoints
from inlay.train.files import MARKER, is_complete, staged, write_json, write_text


def put(folder: Path, content: str = "new") -> Path:
    with staged(folder, marker=True) as beside:
        (beside / "weights").write_text(content)
    return folder


def test_a_staged_folder_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    put(tmp_path / "a", "old")
    put(tmp_path / "a", "new")
    assert (tmp_path / "a" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert is_complete(tmp_path / "a")


def test_an_error_inside_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    put(tmp_path / "a", "old")
    with pytest.raises(KeyError), staged(tmp_path / "a") as beside:
        (beside / "weights").write_text("half")
        raise KeyError
    assert (tmp_path / "a" / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed: No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 27456 vs 27344"),
        ValueError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_sentence(tmp_path: Path, error: Exception) -> None:
    put(tmp_path / "a", "old")
    with pytest.raises(TrainingError, match=r"the disk is full while saving .*a; what was there before is intact"):  # noqa: SIM117
        with staged(tmp_path / "a"):
            raise error
    assert (tmp_path / "a" / "weights").read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_really_full_device_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    from inlay.train import files

    monkeypatch.setattr(files, "replacing", lambda path: contextlib.nullcontext(Path("/dev/full")))
    with pytest.raises(InlayError, match="the disk is full"):
        write_text(tmp_path / "metrics.json", "x" * 100_000)


def test_writing_keeps_the_old_text_when_it_fails(tmp_path: Path) -> None:
    write_text(tmp_path / "t", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "t", "\ud800")
    with pytest.raises(TypeError):
        write_json(tmp_path / "t", {"a": object()})
    assert (tmp_path / "t").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    for step in (2, 10, 9, 11):
        put(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-11" / "weights").write_text("c")  # another size than the marker says
    (tmp_path / "checkpoint-12").mkdir()  # no marker
    (tmp_path / "checkpoint-x").mkdir()
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints(tmp_path)] == [2, 9, 10]
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-10"
    checkpoints.keep_last(tmp_path, 1)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-10"]


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(TrainingError, match="no complete checkpoint in"):
        checkpoints.last_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("there", "kept"),
    [
        (["part"], "new"),  # killed after the new one was whole, before it had its name (and there was no old one)
        (["part", "old"], "new"),  # killed between the two renames
        (["old"], "old"),  # killed between the renames, the new one lost
        (["", "old"], ""),  # killed before the old one was deleted
        (["", "part"], ""),  # killed before the renames
    ],
)
def test_recovery_after_a_crash_between_two_renames(tmp_path: Path, there: list[str], kept: str) -> None:
    names = {"": "best", "part": ".best.part", "old": ".best.old"}
    for kind in there:
        put(tmp_path / "made", {"part": "new"}.get(kind, kind))
        os.replace(tmp_path / "made", tmp_path / names[kind])
    checkpoints.recover(tmp_path)
    assert (tmp_path / "best" / "weights").read_text() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_recovery_throws_torn_folders_away(tmp_path: Path) -> None:
    put(tmp_path / "best", "old")
    (tmp_path / ".best.part").mkdir()
    (tmp_path / ".checkpoint-4.part").mkdir()
    (tmp_path / ".checkpoint-4.part" / MARKER).write_text(json.dumps({"weights": 10}))
    checkpoints.recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


KILLED = """
import os, signal, sys
from inlay.train.files import staged
with staged(sys.argv[1], marker=True) as beside:
    (beside / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_in_the_middle_of_a_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    put(tmp_path / "checkpoint-4", "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "checkpoint-4")], check=False, timeout=60)
    assert done.returncode == -9
    assert checkpoints.last_checkpoint(tmp_path).joinpath("weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
