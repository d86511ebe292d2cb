"""What a base model is, in a few numbers: enough to refuse an adapter made for another one and to say what differs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.adapters import find_adapters
from inlay.engine.structure import join
from inlay.engine.walk import modules
from inlay.errors import BaseModelError

CONFIG_FACTS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size",
)  # fmt: skip
SAMPLED, VALUES = 8, 4
TOLERANCE = 2.0**-7
"""Relative; sampled weights may differ by a rounding to bfloat16 and still be the same model."""


def fingerprint(model: nn.Module, leave_out: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Class, config facts, a digest of parameter names and shapes, and a few weights spread over the model.

    `leave_out` names parameters that are not the base's business (new heads that the adapter brings along). A quantised
    base packs its weights, so its shapes say nothing (`shapes` is None).
    """
    return _fingerprint(model, base_parameters(model), leave_out)


def _fingerprint(model: nn.Module, parameters: Mapping[str, Tensor], leave_out: frozenset[str]) -> dict[str, Any]:
    parameters = {name: value for name, value in parameters.items() if name not in leave_out}
    shapes = "\n".join(f"{name} {tuple(parameter.shape)}" for name, parameter in sorted(parameters.items()))
    packed = any(not parameter.is_floating_point() for parameter in parameters.values())
    config = getattr(model, "config", None)
    facts = {fact: getattr(config, fact, None) for fact in CONFIG_FACTS}
    return {
        "class": type(model).__name__,
        "config": {fact: value for fact, value in facts.items() if isinstance(value, int | str)},
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "shapes": None if packed else hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "weights": {name: [list(parameters[name].shape), *_sample(parameters[name])] for name in _chosen(parameters)},
        "without": sorted(leave_out),
    }


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The base's own parameters by name, whatever is attached to it or merged into it."""
    adapters = find_adapters(model)
    merged = adapters.originals if adapters else {}
    parameters: dict[int, tuple[str, Tensor]] = {}  # by identity: one that is tied counts once
    for path, module in modules(model):
        before = merged.get(path, {})
        for name, parameter in module._parameters.items():
            own = before.get(name, parameter)
            if own is not None:
                parameters.setdefault(id(own), (join(path, name), own))
    return dict(parameters.values())


def _chosen(parameters: Mapping[str, Tensor]) -> list[str]:
    """The first matrices spread evenly over the model (vectors often start alike in all models)."""
    names = [
        name
        for name, p in parameters.items()
        if p.dim() >= 2 and p.is_floating_point() and p.numel() >= VALUES and not p.is_meta
    ]
    return names[:: max(1, len(names) // SAMPLED)][:SAMPLED]


@torch.no_grad()
def _sample(parameter: Tensor) -> list[float]:
    flat = parameter.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, VALUES + 2, device=flat.device).long()[1:-1]
    return [float(value) for value in flat[places].float().cpu()]


def compare(stored: Mapping[str, Any], model: nn.Module) -> None:
    """Raise BaseModelError saying what differs between the model a file was made for and this one."""
    here = base_parameters(model)
    found = _fingerprint(model, here, frozenset(stored["without"]))
    differences = [
        f"{fact} is {found['config'].get(fact)!r} here, {value!r} there"
        for fact, value in stored["config"].items()
        if found["config"].get(fact) != value
    ]
    if not differences:
        misfits = (_misfit(name, shape, here) for name, (shape, *_) in stored["weights"].items())
        differences = [misfit for misfit in misfits if misfit][:2]
    if not differences and None not in (stored["shapes"], found["shapes"]) and stored["shapes"] != found["shapes"]:
        differences.append(
            f"parameter names or shapes differ ({found['parameters']:,} parameters of {found['class']} here, "
            f"{stored['parameters']:,} of {stored['class']} there)"
        )
    if not differences:
        for name, (_, *there) in stored["weights"].items():
            readable = here[name].is_floating_point() and not here[name].is_meta
            if readable and not _close(ours := _sample(here[name]), there):
                differences = [f"the weights of {name} differ ({ours[0]:.5g} here, {there[0]:.5g} there)"]
                break
    if differences:
        raise BaseModelError(
            "this adapter was made for another base model: " + "; ".join(differences) + ". Load it on the base it was "
            "made for, or insist with strict=False"
        )


def _misfit(name: str, shape: list[int], here: Mapping[str, Tensor]) -> str:
    """What is wrong with one parameter's name or shape; nothing for one that is quantised here."""
    if name not in here:
        return f"there is no parameter {name} here"
    if here[name].is_floating_point() and list(here[name].shape) != shape:
        return f"{name} has shape {tuple(here[name].shape)} here, {tuple(shape)} there"
    return ""


def _close(here: list[float], there: list[float]) -> bool:
    return all(abs(a - b) <= TOLERANCE * max(abs(a), abs(b), 1e-3) for a, b in zip(here, there, strict=True))
