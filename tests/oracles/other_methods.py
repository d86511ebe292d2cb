"""The oracle of `against_peft` for configs other than LoRA's.

    both_ways(Case(build, inputs, {}, inlay.IA3()), peft.IA3Config(target_modules=["key"], ...), tmp_path)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from engine import tiny
from oracles.against_peft import Case, born_here, gradients, gradients_of_peft, read_by_peft, run, same_tensors
from torch import nn

import inlay


def both_ways(case: Case, config: peft.PeftConfig, folder: Path, merges: bool = True) -> None:
    """peft's file here, our file of it there, and an adapter born here there; outputs and gradients each time."""
    theirs = perturbed_peft(case.build(), config)
    theirs.save_pretrained(folder / "theirs", save_embedding_layers=False)
    expected, their_gradients = run(theirs, case.inputs()), gradients_of_peft(theirs)
    ours = inlay.load(case.build(), folder / "theirs", trainable=True)
    torch.testing.assert_close(run(ours, case.inputs()), expected, **case.close)
    our_gradients = gradients(ours)
    assert our_gradients.keys() >= their_gradients.keys()  # a file may hold one parameter twice
    assert their_gradients
    for key, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[key], gradient, **case.close, msg=lambda m, k=key: f"{k}: {m}")
    inlay.save(ours, folder / "ours")
    same_tensors(folder / "theirs", folder / "ours")
    read_by_peft(case, folder / "ours", expected)
    if merges:
        inlay.merge(ours)
        torch.testing.assert_close(run(ours, case.inputs(), backward=False), expected, **case.close)
    born_here(case, folder / "born")


def perturbed_peft(model: nn.Module, config: peft.PeftConfig) -> peft.PeftModel:
    """peft's model with values that make every tensor matter."""
    theirs = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return theirs


def model(name: str, head: str = "trunk", **changes: Any) -> Callable[[], nn.Module]:
    """A builder that gives the same tiny model each time."""
    return functools.partial(tiny.build, name, head, **changes)


def ids() -> dict[str, Any]:
    """Two texts of ten tokens."""
    return {"input_ids": torch.arange(2, 22).reshape(2, 10)}


def pairs_of_ids() -> dict[str, Any]:
    """The same for an encoder–decoder."""
    return {**ids(), "decoder_input_ids": torch.arange(30, 42).reshape(2, 6)}
