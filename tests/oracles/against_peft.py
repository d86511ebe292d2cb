"""HF peft as an oracle: the same tensors must give the same outputs and gradients, through files of either library.

    both_ways(Case(build, inputs, dict(target_modules=["q_proj"]), inlay.LoRA(targets="q_proj")), tmp_path)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay
from inlay.engine.adapters import adapters_of

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""fp32 outputs of order 1: the two libraries sum the same products in another order."""


@dataclasses.dataclass
class Case:
    """One adapter, as peft and as Inlay say it, on a model that `build` makes the same each time."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    config: dict[str, Any]
    """Fields of peft.LoraConfig."""
    method: inlay.Method | list[inlay.Method]
    modules_to_save: list[str] | None = None
    same_file: bool = True
    """Whether our file of peft's adapter has the same tensors as peft's file."""
    close: dict[str, float] = dataclasses.field(default_factory=lambda: dict(CLOSE))
    mend: Callable[[peft.PeftModel], str | None] = lambda theirs: None
    """Undo a known error of peft's in its model; gradients of keys with what it returns in them are not compared."""


def both_ways(case: Case, folder: Path) -> None:
    """peft's file here, our file of it there, and an adapter born here there; outputs and gradients each time."""
    theirs = randomised_peft(case.build(), case.config)
    wrong = case.mend(theirs)
    theirs.save_pretrained(folder / "theirs", save_embedding_layers=False)
    expected, their_gradients = run(theirs, case.inputs()), gradients_of_peft(theirs)
    base = case.build()
    ours = inlay.load(base, folder / "theirs", trainable=True)
    torch.testing.assert_close(run(ours, case.inputs()), expected, **case.close)
    our_gradients = gradients(ours)
    assert our_gradients.keys() == their_gradients.keys()
    for key, gradient in their_gradients.items():
        if wrong is not None and wrong in key:
            continue
        torch.testing.assert_close(our_gradients[key], gradient, **case.close, msg=lambda m, k=key: f"{k}: {m}")
    inlay.save(ours, folder / "ours")
    if case.same_file:
        same_tensors(folder / "theirs", folder / "ours")
    read_by_peft(case, folder / "ours", expected)
    inlay.merge(ours)
    torch.testing.assert_close(run(ours, case.inputs(), backward=False), expected, **case.close)
    born_here(case, folder / "born")


def born_here(case: Case, folder: Path) -> None:
    """An adapter that `attach` made, written here and read by peft."""
    ours = inlay.attach(case.build(), case.method, modules_to_save=case.modules_to_save)
    randomise(ours)
    inlay.save(ours, folder)
    read_by_peft(case, folder, run(ours, case.inputs(), backward=False))


def read_by_peft(case: Case, folder: Path, expected: Tensor) -> None:
    """Warnings are errors here, so peft finds every key that it looks for and no field that it does not know."""
    back = peft.PeftModel.from_pretrained(case.build(), folder)
    case.mend(back)
    torch.testing.assert_close(run(back, case.inputs(), backward=False), expected, **case.close)
    theirs = peft.get_peft_model_state_dict(back, save_embedding_layers=False)
    copies = {key for key in theirs if ".original_module." in key or ".modules_to_save." in key}  # with bias="all"
    assert set(load_file(folder / "adapter_model.safetensors")) == set(theirs) - copies


def randomised_peft(model: nn.Module, config: dict[str, Any]) -> peft.PeftModel:
    """peft's model with values that make every tensor matter."""
    theirs = peft.get_peft_model(model, peft.LoraConfig(**config)).eval()
    shift(p for p in theirs.parameters() if p.requires_grad)
    return theirs


def randomise(model: nn.Module, name: str = "default") -> None:
    """Move every parameter of an adapter away from where it started."""
    shift(adapters_of(model).get(name).parameters())


@torch.no_grad()
def shift(parameters: Iterable[nn.Parameter]) -> None:
    """Add noise to each parameter."""
    for parameter in parameters:
        parameter.add_(torch.randn_like(parameter) * 0.1)


def run(model: nn.Module, inputs: dict[str, Any], backward: bool = True) -> Tensor:
    """The model's first output; with gradients of a fixed weighted mean of it."""
    output = model(**inputs)
    output = getattr(output, "logits", None) if hasattr(output, "logits") else output
    output = output if isinstance(output, Tensor) else output[0]
    if backward:
        model.zero_grad()
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
        (output * weights).mean().backward()
    return output.detach()


def gradients_of_peft(theirs: nn.Module) -> dict[str, Tensor]:
    """By the keys that the file would have."""
    return {file_key(name): p.grad for name, p in theirs.named_parameters() if p.requires_grad and p.grad is not None}


def file_key(name: str) -> str:
    """A parameter's key in peft's file: its name without the adapter's."""
    name = name.replace(".modules_to_save.default", "").replace("magnitude_vector.default.weight", "magnitude_vector")
    return re.sub(r"\.default(?=\.|$)", "", name)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of what an adapter's file holds, by the keys there."""
    adapter = adapters_of(model).get("default")
    pairs = zip(adapter.methods, adapter.placed, strict=True)
    tensors = {key: tensor for method, placed in pairs for key, tensor in method.export(placed)[0].items()}
    return {key: tensor.grad for key, tensor in tensors.items() if tensor.is_leaf and tensor.grad is not None}


def same_tensors(theirs: Path, ours: Path) -> None:
    """Both files hold the same keys and the same bits."""
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (theirs, ours))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
