"""Methods by name. A method's file is found by its name and imported on first use, so adding one edits nothing here."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from inlay.engine.catalogue import combining, kinds, module_of
from inlay.engine.field_types import check_fields
from inlay.engine.piece import KINDS, Method
from inlay.errors import ConfigError, did_you_mean


def method_class(kind: str) -> type[Method]:
    """The `Method` subclass registered as `kind`. Raises ConfigError, naming the nearest, when there is none."""
    if kind not in KINDS:
        module = module_of(kind)
        if module is None:
            hint = did_you_mean(kind, kinds())
            raise ConfigError(f"there is no method {kind!r}{hint} (`inlay methods` lists them all)")
        importlib.import_module(module)
    return KINDS[kind]


def all_methods() -> list[type[Method]]:
    """Every method, in the order of their kinds. Imports them all."""
    return [method_class(kind) for kind in kinds()]


def over_adapters() -> list[type[Method]]:
    """Every method over other adapters, in the order of their kinds. Imports them all."""
    return [method_class(kind) for kind in combining()]


def make_method(kind: str, fields: Mapping[str, Any] | None = None) -> Method:
    """A method from its kind and fields, as a run's YAML or an adapter's JSON gives them."""
    cls = method_class(kind)
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields or {}:
        if name not in known:
            hint = did_you_mean(name, known)
            hint = f"{hint} It" if hint else "; it"
            raise ConfigError(f"method {kind} has no field {name!r}{hint} has: {', '.join(known)}")
    check_fields(cls, fields or {}, f"method {kind}")
    return cls(**dict(fields or {}))
