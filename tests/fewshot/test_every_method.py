"""Every PEFT method in few-shot learning, and every system with methods of every make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fewshot import toys
from fewshot.writers import WORDS, llama, t5, whole_words

from inlay.engine.registry import kinds
from inlay.errors import ConfigError, TargetError, UnsupportedError
from inlay.fewshot import FewShotRun, evaluate, explain, fewshot, predict
from inlay.fewshot.systems import kinds as systems

SETTINGS: dict[str, dict[str, Any]] = {
    "alora": {"invocation_tokens": [9]},
    "bitfit": {"add_missing": True},
    "c3a": {"block_size": 4},
    "cpt": {"token_ids": [9, 10]},
    "fourierft": {"n_frequency": 50},
    "freezing": {"top_k": 1},
    "increlora": {"target_r": 1, "top_h": 2, "warmup": 1},
    "kasa": {"r": 2},
    "miss": {"r": 4},
    "oft": {"block_size": 8},
    "psoft": {"r": 4},
    "qalora": {"group_size": 8},
    "road": {"group_size": 8},
    "shira": {"r": 2},
    "sparse": {"budget": 0.01},
    "trainable_tokens": {"token_indices": [9, 10]},
    "vblora": {"vector_length": 8},
    "waveft": {"n_frequency": 50},
}
"""What a method cannot do without, or cannot have as it is by default in a model this small."""
NOWHERE = {
    ("density", "bert"), ("density", "llama"), ("density", "t5"),  # a loss beside other methods
    ("head", "bert"), ("head", "llama"), ("head", "t5"),  # no new head here
    ("vl_pet", "bert"), ("vl_pet", "llama"),  # encoder–decoders
    ("unipelt", "llama"),  # gates that look both ways
    ("alora", "t5"), ("cpt", "t5"), ("shadow", "t5"),  # models of one stack
}  # fmt: skip
"""Where a method has no place, and says so."""
MAKES: dict[str, dict[str, Any]] = {
    "lora": {},  # at a linear
    "sparse": {"budget": 0.01},  # chosen by the labelled rows
    "adapter": {},  # behind a sub-layer
    "compacter": {},  # pieces that share a part
    "prompt_tuning": {},  # before the text
    "bitfit": {},  # copies of parameters, the head's among them
    "full": {},
    "adalora": {},  # with a controller
    "meft": {},  # reversible blocks
    "poly": {},  # rows of tasks
}
OPTIONS: dict[str, dict[str, Any]] = {
    "pet": {"repetitions": 1, "final": {"steps": 2}},
    "ipet": {"repetitions": 2, "generations": 2, "grow": 1, "final": {"steps": 2}},
    "lm-bff": {"sets": 2, "checks": 1},
    "list": {"sessions": 1, "epochs": 1, "student": {"steps": 4, "batch_size": 4}},
}
UNTRAINED, WRITERS = ("icl",), ("t-few",)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked language model, a decoder, and an encoder with a decoder, on disk."""
    folder = tmp_path_factory.mktemp("models")
    tokenizers = {"bert": toys.wordpiece(), "llama": whole_words(["<s>", "$A"]), "t5": whole_words(["$A", "</s>"])}
    bert = toys.tiny_bert(len(tokenizers["bert"]))
    for name, model in {"bert": bert, "llama": llama(len(WORDS)), "t5": t5(len(WORDS))}.items():
        model.save_pretrained(folder / name)
        tokenizers[name].save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(models: Path, tmp_path: Path) -> Callable[..., FewShotRun]:
    """A short run on one of the models."""
    rows = [{"text": text, "label": label} for text, label in (("good film", "pos"), ("a bad movie", "neg")) * 4]
    for name in ("train", "test", "unlabelled"):
        lines = [{"text": row["text"]} if name == "unlabelled" else row for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")

    def made(system: str, peft: dict[str, Any], model: str = "bert", **changes: Any) -> FewShotRun:
        return FewShotRun.from_settings({
            "train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl"),
            "unlabelled": str(tmp_path / "unlabelled.jsonl"), "model": str(models / model),
            "templates": ["{text} It was {mask}"], "verbalizer": {"neg": "bad", "pos": "good"}, "shots": 2,
            "method": {"kind": system, **OPTIONS.get(system, {})}, "peft": [peft], "max_length": 32,
            "recipe": {"steps": 3, "batch_size": 2}, "baseline": False, "out": str(tmp_path / "out"), **changes,
        })  # fmt: skip

    return made


def stays_what_it_was(run: FewShotRun) -> None:
    """A run is measured, costs something, and answers the same from its files."""
    (found,) = fewshot(run).seeds
    assert found.flops > 0
    assert found.trainable_parameters > 0
    assert evaluate(run.out) == found.test


@pytest.mark.parametrize("model", ["bert", "llama", "t5"])
@pytest.mark.parametrize("kind", kinds())
def test_every_method_learns_from_few_labels(kind: str, model: str, run: Callable[..., FewShotRun]) -> None:
    made = run("prompt" if model == "bert" else "t-few", {"kind": kind, **SETTINGS.get(kind, {})}, model)
    if (kind, model) in NOWHERE:
        with pytest.raises((ConfigError, TargetError, UnsupportedError)):
            fewshot(made)
        assert not Path(made.out).exists()
    else:
        stays_what_it_was(made)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("system", [kind for kind in systems() if kind not in (*UNTRAINED, *WRITERS, "prompt")])
def test_every_system_trains_methods_of_every_make(system: str, make: str, run: Callable[..., FewShotRun]) -> None:
    soft = {"templates": ["{text} {soft:2} It was {mask}"]} if system == "p-tuning" else {}
    made = run(system, {"kind": make, **MAKES[make]}, **soft)
    if soft and make == "sparse":
        with pytest.raises(ConfigError, match="looks at rows before anything is trained"):
            fewshot(made)
    else:
        stays_what_it_was(made)
        assert {row["prediction"] for row in predict(made.out, ["good film", "bad"])} <= {"neg", "pos"}
        prompt = explain(made.out, ["good film"])[0].prompt
        assert "good film" in prompt
        assert prompt.count("[soft]") == (2 if soft else 0)


def test_every_system_is_here() -> None:
    assert {*UNTRAINED, *WRITERS, *OPTIONS, "prompt", "standard", "content", "p-tuning"} == set(systems())
