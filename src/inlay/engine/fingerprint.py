"""What a base model is, in a few numbers: enough to refuse an adapter made for another one and to say what differs."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from inlay.engine.host import CHILD
from inlay.errors import BaseModelError

CONFIG_FACTS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
SAMPLED, VALUES = 8, 4
TOLERANCE = 2.0**-7
"""Relative; sampled weights may differ by a rounding to bfloat16 and still be the same model."""


def fingerprint(model: nn.Module, leave_out: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Class, config facts, a digest of parameter names and shapes, and a few weights spread over the model.

    `leave_out` names parameters that are not the base's business (new heads that the adapter brings along).
    """
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if CHILD not in name.split(".") and name not in leave_out
    }
    shapes = "\n".join(f"{name} {tuple(parameter.shape)}" for name, parameter in sorted(parameters.items()))
    config = getattr(model, "config", None)
    return {
        "class": type(model).__name__,
        "config": {fact: getattr(config, fact) for fact in CONFIG_FACTS if isinstance(getattr(config, fact, None), int | str)},
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "shapes": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "weights": _samples(parameters),
    }


@torch.no_grad()
def _samples(parameters: dict[str, nn.Parameter]) -> dict[str, list[float]]:
    """A few values of the first matrices spread evenly over the model (vectors often start alike in all models)."""
    names = [
        name
        for name, p in parameters.items()
        if p.dim() >= 2 and p.is_floating_point() and p.numel() >= VALUES and not p.is_meta
    ]
    step = max(1, len(names) // SAMPLED)
    found: dict[str, list[float]] = {}
    for name in names[::step][:SAMPLED]:
        flat = parameters[name].detach().reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, VALUES + 2, device=flat.device).long()[1:-1]
        found[name] = [float(value) for value in flat[places].float().cpu()]
    return found


def compare(stored: dict[str, Any], model: nn.Module, leave_out: frozenset[str] = frozenset()) -> None:
    """Raise BaseModelError saying what differs between the model a file was made for and this one."""
    found = fingerprint(model, leave_out)
    differences = [
        f"{fact} is {found['config'].get(fact)!r} here, {value!r} there"
        for fact, value in stored.get("config", {}).items()
        if found["config"].get(fact) != value
    ]
    if not differences and stored.get("shapes") != found["shapes"]:
        differences.append(
            f"parameter names or shapes differ ({found['parameters']:,} parameters of {found['class']} here, "
            f"{stored.get('parameters', 0):,} of {stored.get('class')} there)"
        )
    if not differences:
        current = dict(model.named_parameters())
        for name, values in stored.get("weights", {}).items():
            here = _samples({name: current[name]}).get(name) if name in current else None
            if here is not None and not _close(here, values):
                differences.append(f"the weights of {name} differ ({here[0]:.5g} here, {values[0]:.5g} there)")
                break
    if differences:
        raise BaseModelError(
            "this adapter was made for another base model: " + "; ".join(differences) + ". Load it on the base it names, "
            "or insist with strict=False"
        )


def _close(here: list[float], there: list[float]) -> bool:
    return all(abs(a - b) <= TOLERANCE * max(abs(a), abs(b), 1e-3) for a, b in zip(here, there, strict=True))
