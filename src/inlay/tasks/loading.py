"""Base models and tokenizers from a local folder or the hub, with one clear error for each thing that can be wrong.

Nothing loaded here can run code: weights come from safetensors only, and code kept beside a model is never trusted.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from inlay.errors import CheckpointError, ConfigError, did_you_mean
from inlay.tasks.quantised import left_whole

Source = str | Path

_TOKENIZER_FILE = re.compile(r"tokenizer.*\.(json|model)|(vocab|merges|bpe).*|.*\.(model|spm|tiktoken)")


def load_tokenizer(model: Source, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer kept with a model. Where it has no padding token, its end-of-text token pads.

    Raises ConfigError when the folder is not there, or holds no tokenizer.
    """
    folder = folder_or_hub_id(model)
    advice = "a folder that tokenizer.save_pretrained(…) wrote, or at least its tokenizer.json, is needed"
    if folder.is_dir() and not any(_TOKENIZER_FILE.fullmatch(path.name) for path in folder.iterdir()):
        # transformers would make an empty tokenizer here and say nothing
        raise ConfigError(f"no tokenizer can be loaded from {model}: the folder has no tokenizer files; {advice}")
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), **kwargs)
    except Exception as error:  # transformers raises a different class for nearly every cause
        raise ConfigError(f"no tokenizer can be loaded from {model}: {_reason(error)}; {advice}") from error
    if tokenizer.pad_token_id is None:
        spare = tokenizer.eos_token or tokenizer.unk_token
        if spare is None:
            raise ConfigError(
                f"the tokenizer of {model} has neither a padding nor an end-of-text token: give it one "
                f"with tokenizer.add_special_tokens({{'pad_token': …}}) and save it again"
            )
        tokenizer.pad_token = spare
    return tokenizer


def load_pretrained(
    auto: Any,
    model: Source,
    *,
    purpose: str,
    new_head: bool,
    fits: Callable[[PreTrainedModel], bool] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """`auto.from_pretrained(model)` with what is missing from the file looked at instead of warned about.

    A head that the file does not have is normal where `new_head` says so, and an error where the task needs a trained
    one. The names of parameters that start from random numbers are kept in `model.fresh_parameters`.
    Raises ConfigError (no such model, or not for this purpose) and CheckpointError (damaged or incomplete files).
    """
    folder = folder_or_hub_id(model)
    try:
        with quiet():
            if "quantization_config" in kwargs:
                kwargs["quantization_config"].llm_int8_skip_modules = left_whole(auto, str(folder))
            loaded, info = auto.from_pretrained(
                str(folder), output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True, **kwargs
            )
    except SafetensorError as error:
        raise CheckpointError(
            f"the weights of {model} are damaged ({_reason(error)}): fetch or write them again"
        ) from error
    except Exception as error:
        raise _load_error(folder, model, purpose, error) from error
    fresh = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    body = f"{loaded.base_model_prefix}."
    lost = [name for name in fresh if name.startswith(body) and ".pooler." not in name]
    if lost:
        raise CheckpointError(
            f"the weights of {model} do not fit its config.json: {len(lost)} tensors are missing or of "
            f"another shape, {lost[0]} among them"
        )
    if (fresh and not new_head) or (fits is not None and not fits(loaded)):
        found = f"{fresh[0]} and {len(fresh) - 1} more tensors are not in its file" if fresh else "it sees both sides"
        raise ConfigError(f"{model} ({loaded.config.model_type}) cannot do {purpose}: {found}")
    if getattr(loaded.config, "pad_token_id", 0) is None:  # models of images know no tokens
        eos = loaded.config.eos_token_id
        loaded.config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    loaded.fresh_parameters = tuple(fresh)
    return loaded  # type: ignore[no-any-return]


def check_trial(auto: Any, model: PreTrainedModel, batch: dict[str, torch.Tensor], what: str) -> None:
    """Raise ConfigError where a model of this configuration refuses the batch, seen without weights or arithmetic."""
    try:
        with quiet(), torch.device("meta"), torch.no_grad():
            auto.from_config(model.config).to(model.dtype).eval()(**{key: one.to("meta") for key, one in batch.items()})
    except (ValueError, RuntimeError) as error:
        if "meta" in str(error).lower():  # it looks at numbers, which there are none of
            return
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items())
        raise ConfigError(
            f"this {model.config.model_type} model does not take {what} ({shapes}): {_reason(error)}"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' loading reports and bars; what matters in them is checked and raised instead."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def folder_or_hub_id(model: Source) -> Path:
    """The path of a local model, or the hub id unchanged. Raises ConfigError when it can be neither."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            held = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            raise ConfigError(f"{model} is not a model's folder: it has no config.json; it holds: {held}")
        return path
    parent_exists = path.parent != Path(".") and path.parent.is_dir()
    if isinstance(model, Path) or path.is_absolute() or len(path.parts) > 2 or parent_exists or model.startswith("."):
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"there is no model folder {model}{did_you_mean(path.name, names)}")
    return path


def _load_error(folder: Path, model: Source, purpose: str, error: Exception) -> Exception:
    text = str(error)
    if "Unrecognized configuration class" in text:
        found = re.search(r"configuration_(\w+)\.", text)
        kind = found[1] if found is not None else "such"
        return ConfigError(f"{model} cannot do {purpose}: transformers has no such head for {kind} models")
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            return CheckpointError(
                f"{model} has its weights only as {pickles[0]}, a pickle file, and reading a pickle "
                f"runs code: it is refused. Convert it to model.safetensors"
            )
        return CheckpointError(f"{model} has no weights: no model.safetensors lies in the folder")
    if not folder.is_dir():
        return ConfigError(f"there is no model folder {model}, and as a hub model it cannot be had ({_reason(error)})")
    return ConfigError(f"{model} cannot be loaded for {purpose}: {_reason(error)}")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
