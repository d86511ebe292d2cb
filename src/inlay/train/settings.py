"""How settings are read: YAML, `--set key=value`, the names of transformers' training arguments. Imports no torch."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Union

import yaml

from inlay.engine.field_types import check_type
from inlay.errors import ConfigError, did_you_mean

ALIASES = {
    "model_name_or_path": "model",
    "base_model": "model",
    "output_dir": "out",
    "task_name": "task",
    "methods": "method",
    "replicate_layers": "layer_replication",
    "column_mapping": "columns",
    "max_seq_length": "max_length",
    "training": "train",
}
"""Other libraries' names for a run's settings."""

DATA_ALIASES = {"train_file": "train", "validation_file": "validation", "test_file": "test", "dataset_name": "path"}
"""The same for the `data:` section, where they stand at the top level elsewhere."""

METHOD_ALIASES = {
    "name": "kind",
    "type": "kind",
    "peft_type": "kind",
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
}
"""Other libraries' names for a method's fields."""

TRAIN_ALIASES = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "loraplus_lr_ratio": "lora_plus_ratio",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
}
"""Names that transformers has dropped, or that other libraries use, for what it has under another name."""


OWN_ARGUMENTS: dict[str, str] = {
    "cache_frozen": "str",
    "cache_frozen_budget": "int | str",
    "cache_frozen_dtype": "str",
    "frozen_dropout": "bool",
    "activation_budget": "int | str",
    "chunked_loss": "bool",
    "lora_plus_ratio": "float",
    "riemannian_damping": "float",
    "galore_rank": "int",
    "galore_update_every": "int",
    "galore_scale": "float",
}
"""Settings of the `train:` section that are Inlay's own, each with its type; they never reach TrainingArguments.

What they may be is checked in `options.py` and `optimisation.py`."""


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number (YAML 1.1 wants a dot in it, and nobody writes one), and no key comes twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping. YAMLError where the last of two entries would have won."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in rules if tag != _BOOL]
    for key, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 also reads yes, no, on and off as truths, but `eval_strategy: no` is transformers' own spelling.
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def yaml_value(text: str) -> Any:
    """One value as YAML reads it: `16` is a number, `true` a truth, `[1, 2]` a list, `query,value` a string."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with one more number format
    except yaml.YAMLError:
        return text


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file. Raises ConfigError when the file is missing, damaged or no mapping."""
    path = Path(path)
    if not path.is_file():
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.y*ml"))) if path.parent.is_dir() else ""
        raise ConfigError(f"there is no file {str(path)!r}{near}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise ConfigError(f"{path} should hold `name: value` settings, but holds {found}")
    return content


def put(tree: dict[str, Any], assignment: str) -> None:
    """Apply one `a.b.c=value` to nested settings, making the mappings on the way.

    In a list (several methods) a step is an index or the `kind` of an entry.
    """
    key, equals, text = assignment.partition("=")
    steps = key.strip().split(".")
    if not equals or not all(steps):
        raise ConfigError(f"--set takes name=value, such as method.r=16; got {assignment!r}")
    node: Any = tree
    for step in steps[:-1]:
        node = _step(node, step, assignment)
    if isinstance(node, list):
        raise ConfigError(f"--set {assignment}: there are several here; say which, such as {steps[0]}.0.{steps[-1]}=…")
    node[steps[-1]] = yaml_value(text)


def _step(node: Any, step: str, assignment: str) -> Any:
    if isinstance(node, list):
        kinds = [entry.get("kind", "") if isinstance(entry, dict) else str(entry) for entry in node]
        place = int(step) if step.isdigit() and int(step) < len(node) else kinds.index(step) if step in kinds else None
        if place is None:
            have = ", ".join(f"{i} ({kind})" for i, kind in enumerate(kinds))
            raise ConfigError(f"--set {assignment}: no entry {step!r} among {have}{did_you_mean(step, kinds)}")
        if not isinstance(node[place], dict):
            node[place] = {"kind": node[place]}
        return node[place]
    child = node.setdefault(step, {})
    if child is None:
        child = node[step] = {}
    if isinstance(child, str) and step == "method":
        child = node[step] = {"kind": child}
    if not isinstance(child, dict | list):
        raise ConfigError(f"--set {assignment}: {step} is the single value {child!r}, with nothing inside it to set")
    return child


@functools.cache
def training_arguments() -> Mapping[str, str]:
    """The fields of the installed transformers' TrainingArguments, each with its annotation as text.

    Read from its source, because importing it would import torch, and a misspelt key should not take three seconds.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("transformers is not installed: pip install inlay")
    source = Path(spec.submodule_search_locations[0], "training_args.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            return {
                item.target.id: ast.unparse(item.annotation)
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
    raise ConfigError("this version of transformers has no TrainingArguments where Inlay looks for it")


def renamed(settings: Mapping[str, Any], aliases: Mapping[str, str], section: str) -> dict[str, Any]:
    """The settings under their own names. The same thing given twice with different values is a ConfigError."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        name = aliases.get(key, key)
        if name in result and result[name] != value:
            raise ConfigError(f"{section} has both {key!r} and {name!r}, with different values; keep one")
        result[name] = value
    return result


def known_only(names: Iterable[Any], known: Iterable[str], section: str) -> None:
    """Raise ConfigError for the first key that is not known, with its section and the nearest keys, or all of a few."""
    known = list(known)
    has = f"; it has: {', '.join(known)}" if 0 < len(known) <= 20 else ""
    for name in names:
        if name not in known:
            raise ConfigError(f"{section} has no setting {name!r}{did_you_mean(str(name), known)}{has}")


_BASIC: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str, "None": None}


def typed(value: Any, annotation: str, key: str) -> Any:
    """The value, if it fits a simple annotation (`float`, `int | None`, …); others are left to their owner."""
    parts = [part.strip() for part in annotation.split("|")]
    if set(parts) <= set(_BASIC):
        check_type(value, Union[*(_BASIC[part] for part in parts)], key)
    return value
