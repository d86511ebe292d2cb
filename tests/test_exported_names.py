"""The public surface is written down, sorted, complete, and every name on it is there."""

from __future__ import annotations

import inspect

import inlay
import inlay.train
from inlay.engine.registry import all_methods

VERBS = {
    "attach",
    "detach",
    "activate",
    "using",
    "disabled",
    "trainable",
    "merge",
    "unmerge",
    "summary",
    "save",
    "load",
    "controllers",
    "density",
    "combine",
    "for_tasks",
    "fuse",
    "galore",
    "hot_swap",
    "lora_plus",
    "nearest_prompts",
    "pack",
    "per_row",
    "select",
    "reconstruction_error",
    "replicate_layers",
    "restore_layers",
    "riemannian",
    "prompt_similarity",
    "split_base",
    "standalone_shadow",
    "switchable",
    "to_lora",
    "trim_vocabulary",
    "weigh",
    "warmup_stable_decay_constant",
}


def test_all_is_sorted_and_without_doubles() -> None:
    assert list(inlay.__all__) == sorted(set(inlay.__all__))


def test_every_public_name_is_there_and_documented() -> None:
    for name in inlay.__all__:
        assert inspect.getdoc(getattr(inlay, name)), name


def test_every_method_and_verb_is_public() -> None:
    methods = {cls.__name__ for cls in all_methods() if cls.__module__.startswith("inlay.methods.")}
    assert methods | VERBS <= set(inlay.__all__)


def test_dir_lists_the_public_names() -> None:
    assert set(inlay.__all__) <= set(dir(inlay))


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(inlay, "Lora")
    assert not hasattr(inlay.train, "trian")


def test_the_training_room_exports_what_it_says() -> None:
    assert inlay.train.__all__ == sorted(inlay.train.__all__, key=lambda name: (name.islower(), name))
    for name in inlay.train.__all__:
        first, second = getattr(inlay.train, name), getattr(inlay.train, name)
        assert first is second
        assert inspect.getdoc(first), name
        assert not inspect.ismodule(first), name
