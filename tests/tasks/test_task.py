"""Tasks by name, their plain form, and base models that are missing, damaged or of the wrong kind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from inlay.errors import CheckpointError, ConfigError, DataError
from inlay.tasks.batches import evaluating
from inlay.tasks.data import read_splits
from inlay.tasks.task import SUPPORT, Task, kinds, make_task, task_class

KINDS = [
    "audio-classification",
    "causal-lm",
    "image-classification",
    "image-to-text",
    "masked-lm",
    "seq2seq",
    "text-classification",
    "token-classification",
]
LABELS = ("no", "yes")


def test_tasks_are_found_by_the_names_of_their_files() -> None:
    assert kinds() == KINDS
    folder = Path(sys.modules["inlay.tasks.task"].__file__ or "").parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files - SUPPORT == {kind.replace("-", "_") for kind in KINDS}, "a new support file belongs into SUPPORT"
    assert all(task_class(kind).kind == kind for kind in KINDS)


def test_naming_tasks_imports_no_torch() -> None:
    code = (
        "from inlay.tasks.task import kinds; kinds(); import sys; assert not {'torch', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("text-clasification", {}, "there is no task 'text-clasification'; did you mean 'text-classification'"),
        ("text-classification", {"max_lenght": 3}, "has no field 'max_lenght'; did you mean 'max_length'"),
        ("text-classification", {"columns": {"txt": "a"}}, "no column role 'txt'; did you mean 'text'"),
        ("text-classification", {"columns": "text"}, "columns must be a mapping"),
        ("text-classification", {"labels": "a"}, "labels must be a list"),
        ("text-classification", {"problem_type": "multilabel"}, "is none of .*did you mean 'multi_label"),
        ("text-classification", {"max_length": "many"}, "max_length must be int, not 'many'"),
        ("text-classification", {"max_length": 1}, "max_length must be at least 2"),
        ("token-classification", {"scheme": "iob"}, "neither 'bio' nor 'plain'"),
        ("masked-lm", {"mask_probability": 1.5}, "mask_probability must lie in"),
        ("causal-lm", {"packing": 1}, "packing must be bool"),
        ("causal-lm", {"metrics": ["rogue"]}, "no text metric 'rogue'; did you mean 'rouge'"),
        ("seq2seq", {"num_beams": 0}, "num_beams must be at least 1"),
    ],
)
def test_what_a_task_cannot_be(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task(kind, **fields)


def test_underscores_serve_and_lists_become_tuples() -> None:
    task = make_task("text_classification", labels=["a", "b"], threshold=1)
    assert task.kind == "text-classification"
    assert task == make_task("text-classification", labels=("a", "b"), threshold=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_form_goes_through_json_and_back(kind: str) -> None:
    task = make_task(kind, max_length=7)
    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_from_dict_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match="a task needs a kind"):
        Task.from_dict({"max_length": 3})
    with pytest.raises(ConfigError, match="has no field 'colour'"):
        Task.from_dict({"kind": "masked-lm", "colour": 1})


def test_nothing_works_before_the_columns_are_known(bert: Path) -> None:
    task = make_task("text-classification")
    with pytest.raises(ConfigError, match="does not know its labels yet: call resolve"):
        task.load_model(bert)
    with pytest.raises(ConfigError, match="does not know its text column yet"):
        make_task("masked-lm").features(Dataset.from_list([{"text": "a"}]), task.load_tokenizer(bert), train=True)
    with pytest.raises(DataError, match="no data to resolve"):
        task.resolve({})


# -- base models -------------------------------------------------------------------------------------------------------


def classifier() -> Task:
    return make_task("text-classification", labels=LABELS, problem_type="single_label_classification")


def test_a_new_head_is_named_not_warned_about(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = classifier().load_model(bert)
    assert model.fresh_parameters == (
        "bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight",
    )  # fmt: skip
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert model.config.label2id == {"no": 0, "yes": 1}
    assert capfd.readouterr() == ("", "")


def test_a_head_for_other_classes_is_replaced(bert: Path, tmp_path: Path) -> None:
    task = make_task("text-classification", labels=("a", "b", "c"), problem_type="single_label_classification")
    task.load_model(bert).save_pretrained(tmp_path)
    model = classifier().load_model(tmp_path)
    assert model.fresh_parameters == ("classifier.bias", "classifier.weight")
    assert model.classifier.out_features == 2


def test_extra_arguments_reach_from_pretrained(bert: Path) -> None:
    assert classifier().load_model(bert, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["causal-lm", "seq2seq"])
def test_an_encoder_cannot_generate(bert: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"\(?bert\)? (cannot do {kind}|models)|cannot do {kind}"):
        make_task(kind).load_model(bert)


def test_a_base_without_a_language_model_head_is_an_error_unless_one_is_asked_for(bert: Path, tmp_path: Path) -> None:
    classifier().load_model(bert).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot do masked-lm: cls.predictions.bias and \d+ more tensors"):
        make_task("masked-lm").load_model(tmp_path)
    fresh = make_task("masked-lm", new_head=True).load_model(tmp_path).fresh_parameters
    assert all(name.startswith("cls.") for name in fresh)


def test_a_decoder_has_no_mask_token(llama: Path) -> None:
    with pytest.raises(ConfigError, match="has no mask token"):
        make_task("masked-lm").load_tokenizer(llama)


def test_models_that_are_not_there(bert: Path, tmp_path: Path) -> None:
    task = classifier()
    with pytest.raises(ConfigError, match=r"there is no model folder .*did you mean 'bert'"):
        task.load_model(bert.parent / "brt")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"has no config.json; it holds: notes.txt"):
        task.load_model(tmp_path)
    with pytest.raises(ConfigError, match="as a hub model it cannot be had"):
        task.load_model("no-such-model-here")


def test_weights_that_are_missing_pickled_damaged_or_incomplete(bert: Path, tmp_path: Path) -> None:
    task, weights = classifier(), tmp_path / "model.safetensors"
    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    tensors = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        task.load_model(tmp_path)
    save_file({name: tensor for name, tensor in tensors.items() if "layer.1.attention.self.query" not in name}, weights)
    with pytest.raises(CheckpointError, match=r"do not fit its config.json: 2 tensors .*layer.1.attention.self.query"):
        task.load_model(tmp_path)
    save_file(tensors | {"bert.encoder.layer.0.output.dense.weight": torch.zeros(3, 3)}, weights)
    with pytest.raises(CheckpointError, match=r"another shape, bert.encoder.layer.0.output.dense.weight"):
        task.load_model(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        task.load_model(tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only as pytorch_model.bin, a pickle file.* refused"):
        task.load_model(tmp_path)


def test_a_folder_without_a_tokenizer(bert: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(bert / name, tmp_path / name)
    with pytest.raises(ConfigError, match="the folder has no tokenizer files"):
        classifier().load_tokenizer(tmp_path)


def test_tokenizer_and_model_must_fit(bert: Path, llama: Path, gpt2: Path) -> None:
    task = classifier()
    with pytest.raises(ConfigError, match="do not belong together"):
        task.collator(task.load_tokenizer(llama), task.load_model(bert))
    long = make_task("text-classification", labels=LABELS, problem_type="single_label_classification", max_length=300)
    tokenizer, model = long.load_tokenizer(gpt2), long.load_model(gpt2)
    long.collator(tokenizer, model)  # the tokenizer says 256, and cuts there
    tokenizer.model_max_length = 10**9
    with pytest.raises(ConfigError, match="max_length=300 is more than the 256 positions"):
        long.collator(tokenizer, model)


def test_evaluating_leaves_every_training_flag_as_it_was(bert: Path) -> None:
    model = classifier().load_model(bert)
    model.train()
    model.bert.encoder.layer[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == before


def test_progress_is_lines_where_there_is_no_terminal(
    bert: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from inlay.tasks import batches

    ticks = iter(range(0, 1000, 15))
    monkeypatch.setattr(batches.time, "monotonic", lambda: float(next(ticks)))
    assert list(batches.track([1, 2, 3], "evaluating", True)) == [1, 2, 3]
    assert capfd.readouterr().err.splitlines()[-1].startswith("evaluating: 2 of 3 batches, about ")


def test_describe_names_the_guess_and_how_to_change_it(write: Callable[..., Path]) -> None:
    splits = read_splits(write("train.jsonl", [{"sentence": "a", "y": "p"}, {"sentence": "b", "y": "q"}]))
    guessed = make_task("text-classification").resolve(splits).describe().splitlines()
    assert guessed[0] == "columns: text=sentence, label=y (guessed; change with --columns text=…,label=…)"
    assert guessed[1] == "labels: p, q (single_label_classification)"
    given = make_task("text-classification", columns={"text": "sentence", "label": "y"}).resolve(splits)
    assert given.describe().startswith("columns: text=sentence, label=y (as given)")
