"""A method that wants a look at the data before training gets one, and the run stays reproducible and resumable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from train.interrupted import same_adapters, train_until

import inlay
from inlay.errors import ConfigError
from inlay.pieces.subsets.subset import Subset
from inlay.train import Run, check, train
from inlay.train.prepare import prepare, training_batches

SPARSE = {"kind": "sparse", "budget": 40, "batches": 2}
NEW = (2 * 16 + 2) + (16 * 16 + 16)
"""The head, and the pooler that the base's files lack: trained whole."""


def saved(run: Run) -> dict[str, Tensor]:
    return load_file(Path(run.out) / "adapter" / "adapter_model.safetensors")


def test_a_choice_from_data_trains_and_loads(make_run: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(method=SPARSE, train={"max_steps": 2})
    checked = check(run)
    record = train(run, progress=False)
    assert record.trainable_parameters == checked.trainable_parameters == 40 + NEW
    assert not [key for key in saved(run) if "sparse" in key and ("pooler" in key or "classifier" in key)]
    values = [v for key, v in saved(run).items() if key.endswith(("shira_weight", "sparse_values"))]
    assert sum(value.numel() for value in values) == 40
    assert run.to_dict()["method"] == SPARSE
    assert capsys.readouterr().err == ""
    again = make_run("again", method=SPARSE, train={"max_steps": 2})
    train(again, progress=False)
    assert all(torch.equal(saved(again)[key], value) for key, value in saved(run).items())


def test_the_rows_seen_are_the_runs_own_and_seeing_them_leaves_no_trace(make_run: Callable[..., Run]) -> None:
    run = make_run(method=SPARSE)
    torch.manual_seed(5)
    bare = prepare(run, show=False)
    state = torch.get_rng_state()
    torch.manual_seed(6)
    shown = prepare(run)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in shown.model.state_dict().items():
        assert torch.equal(value, bare.model.state_dict()[name])
    batches = training_batches(bare)
    first, second = list(batches()), list(batches())
    assert [len(batch["labels"]) for batch in first] == [8] * 5
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    expected = inlay.select(bare.model, first, 40, batches=2)
    (method,) = shown.methods
    assert isinstance(method, inlay.SparseDelta)
    assert method.subset == expected
    assert isinstance(bare.methods[0], inlay.SparseDelta)
    assert bare.methods[0].subset is None


def test_a_resumed_run_goes_on_with_the_entries_that_were_chosen(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 6, "eval_strategy": "no", "save_strategy": "no"}
    whole, broken = (make_run(name, method=SPARSE, train=settings) for name in ("whole", "broken"))
    train(whole, progress=False)
    train_until(broken, 3, monkeypatch)

    def never(*_: object) -> None:
        raise AssertionError("the entries are in the checkpoint")

    monkeypatch.setattr(inlay.SparseDelta, "prepare", never)
    train(broken, resume=True, progress=False)
    assert same_adapters(broken, whole)


def test_a_choice_made_before_is_named_by_its_file(make_run: Callable[..., Run], tmp_path: Path) -> None:
    ready = prepare(make_run(), show=False)
    chosen = inlay.select(ready.model, training_batches(ready)(), 30, batches=2)
    path = chosen.save(tmp_path / "chosen.safetensors")
    run = make_run(method={"kind": "sparse", "subset": str(path)}, train={"max_steps": 2})
    record = train(run, progress=False)
    assert record.trainable_parameters == 30 + NEW
    assert Subset.read(path) == chosen
    assert json.loads((Path(run.out) / "record.json").read_text())["method"]["subset"] == str(path)


@pytest.mark.parametrize("score", ["lottery", "l0"])
def test_searches_run_in_a_run(make_run: Callable[..., Run], score: str) -> None:
    method = {"kind": "sparse", "budget": 50, "score": score, "search_steps": 4}
    record = train(make_run(method=method, train={"max_steps": 2}), progress=False)
    assert record.trainable_parameters == 50 + NEW


def test_several_processes_are_refused(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="SparseDelta has to see data before training, which one process does alone"):
        prepare(make_run(method=SPARSE))
