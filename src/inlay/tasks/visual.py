"""Images before text: features computed beforehand, projected to the width of an encoder–decoder and put first.

    encoder reads [ W v₁ + b ; … ; W vₙ + b ; E(x₁) ; … ]

W and b (`visual_prefix`) are the only new parameters. They are trained and saved whole, like a new head.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from inlay.errors import DataError
from inlay.tasks.data import place
from inlay.tasks.media import media, read, shown
from inlay.tasks.task import Collator

PREFIX = "visual_prefix"
SCALE_BOTH = ("fsmt",)
"""Kinds of model whose encoder multiplies embeddings too."""
NEEDED = "an array of (features, numbers), such as 36 × 512, is needed"


@functools.cache
def reading_images(base: type) -> type:
    """The class of encoder–decoders `base`, which also takes `visual`: features (rows, n, size), put before the text.

    The attention mask then covers both. Without `visual` it is what `base` is.
    """

    def __init__(self: Any, config: Any, visual_size: int) -> None:
        base.__init__(self, config)  # type: ignore[misc]
        self.visual_prefix = nn.Linear(visual_size, self.get_input_embeddings().embedding_dim)
        self.post_init()

    def joined(self: Any, visual: Tensor | None, given: dict[str, Any]) -> dict[str, Any]:
        if visual is None or given.get("encoder_outputs") is not None:
            return given
        text = given.get("inputs_embeds")
        if text is None:
            text = looked_up(self, given["input_ids"])
        projected = self.visual_prefix(visual.to(self.visual_prefix.weight.dtype)).to(text.dtype)
        return {**given, "input_ids": None, "inputs_embeds": torch.cat((projected, text), dim=1)}

    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None, visual: Any = None, **rest: Any) -> Any:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **rest}
        return base.forward(self, **joined(self, visual, given))  # type: ignore[attr-defined]

    def generate(self: Any, inputs: Any = None, visual: Any = None, **rest: Any) -> Any:
        if visual is None:
            return base.generate(self, inputs, **rest)  # type: ignore[attr-defined]
        given = joined(self, visual, {**rest, **({} if inputs is None else {"input_ids": inputs})})
        given.pop("input_ids", None)
        return base.generate(self, **given)  # type: ignore[attr-defined]

    signature = inspect.signature(base.forward)  # type: ignore[attr-defined]
    parameters = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    visual = inspect.Parameter("visual", inspect.Parameter.KEYWORD_ONLY, default=None)
    others = [one for one in signature.parameters.values() if one.kind is one.VAR_KEYWORD]
    forward.__signature__ = signature.replace(parameters=[*parameters, visual, *others])  # type: ignore[attr-defined]
    own = {"__init__": __init__, "forward": forward, "generate": generate, "__module__": base.__module__}
    return type(base.__name__, (base,), own)


def looked_up(model: Any, ids: Tensor) -> Tensor:
    """The rows of ids as the encoder reads them: some multiply these by √d and embeddings that they are given not."""
    table = model.get_input_embeddings()
    own = hasattr(table, "embed_scale") or model.config.model_type in SCALE_BOTH
    scale = 1.0 if own else float(getattr(model.get_encoder(), "embed_scale", 1.0))
    rows: Tensor = table(ids)
    return rows if scale == 1 else rows * scale


@dataclasses.dataclass(frozen=True)
class AutoReadingImages:
    """transformers' auto class for encoder–decoders, of models that also take features of this size."""

    size: int
    left_whole: ClassVar[tuple[str, ...]] = (PREFIX,)
    """What a quantised base leaves as it is, since it is trained."""

    def _class(self, config: Any) -> type:
        with torch.device("meta"):
            base: Any = type(AutoModelForSeq2SeqLM.from_config(config))  # type: ignore[no-untyped-call]
        return reading_images(base)

    def from_config(self, config: Any) -> Any:
        """A model with random weights."""
        return self._class(config)(config, visual_size=self.size)

    def from_pretrained(self, folder: str, **kwargs: Any) -> Any:
        """A model with the folder's weights; `visual_prefix` starts from random numbers where they have none."""
        made: Any = self._class(AutoConfig.from_pretrained(folder))
        return made.from_pretrained(folder, visual_size=self.size, **kwargs)


# -- rows --------------------------------------------------------------------------------------------------------------


def features_of(cell: Any) -> np.ndarray:
    """(n, size) numbers of a cell: an .npy file's, or nested lists. Raises DataError where it holds anything else."""
    try:
        found = np.array(cell) if isinstance(cell, list) else read(cell, functools.partial(np.load, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        what = "lists of different lengths" if isinstance(cell, list) else f"{shown(cell)}, which is no .npy file"
        raise DataError(f"are {what} ({error}); {NEEDED}") from error
    if not isinstance(found, np.ndarray) or found.ndim != 2 or 0 in found.shape or found.dtype.kind not in "fiu":
        shape = f"{found.dtype} of shape {found.shape}" if isinstance(found, np.ndarray) else "several arrays"
        raise DataError(f"are {shape}; {NEEDED}")
    if not np.isfinite(found).all():
        raise DataError("hold a number that is not finite")
    return found.astype(np.float32)


def check_features(rows: Dataset, column: str, shape: tuple[int, int]) -> tuple[tuple[int, int], Dataset]:
    """(the shape of every row's features, the cells). Raises DataError for a row of another; (0, 0) is any."""
    cells = media(rows, column, "visual")
    for index, row in enumerate(cells):
        try:
            found = features_of(row["visual"]).shape
        except DataError as error:
            raise DataError(f"{place(rows, index)}: the features (column {column!r}) {error}") from error.__cause__
        if shape == (0, 0):
            shape = (found[0], found[1])
        if found != shape:
            raise DataError(
                f"{place(rows, index)}: the features (column {column!r}) are {found[0]} × {found[1]} where others are "
                f"{shape[0]} × {shape[1]}: each row must have as many, of the same size"
            )
    return shape, cells


@dataclasses.dataclass(frozen=True)
class WithVisual:
    """Collator: text as `text` makes it, and `visual` (rows, n, size) beside it; the mask covers both."""

    text: Collator
    dtype: torch.dtype

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One batch."""
        visual = torch.from_numpy(np.stack([features_of(row["visual"]) for row in rows]))
        batch = self.text([{name: cell for name, cell in row.items() if name != "visual"} for row in rows])
        mask = batch["attention_mask"]
        batch["attention_mask"] = torch.cat((mask.new_ones(visual.shape[:2]), mask), dim=1)
        return batch | {"visual": visual.to(self.dtype)}
