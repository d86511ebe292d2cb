"""The few-shot systems, one file each; a file's name is the system's, with _ for -."""

from __future__ import annotations

import importlib
import pkgutil

from inlay.errors import ConfigError, did_you_mean
from inlay.fewshot.problem import System


def kinds() -> list[str]:
    """The names of all systems."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def system_class(kind: str) -> type[System]:
    """The system of this name. Raises ConfigError, naming the nearest, when there is none."""
    name = kind.lower().replace("_", "-")
    if name not in kinds():
        raise ConfigError(f"there is no few-shot method {kind!r}{did_you_mean(name, kinds())}; there are: "
                          f"{', '.join(kinds())}")  # fmt: skip
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, System) and value is not System and value.kind == name
    )
