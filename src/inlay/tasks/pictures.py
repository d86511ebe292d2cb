"""Images as a model's image processor wants them: from files, encoded bytes, or lists of pixels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoImageProcessor

from inlay.errors import ConfigError, DataError, MissingExtraError
from inlay.tasks.data import place
from inlay.tasks.loading import quiet
from inlay.tasks.media import beside, read, shown

if TYPE_CHECKING:
    from PIL.Image import Image

EXTRA = "vision"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's names of what a model with so many channels reads."""


def need_pillow(purpose: str) -> None:
    """Raise MissingExtraError where Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("Pillow", EXTRA, purpose) from error


def load_processor(model: str | Path) -> Any:
    """The image processor kept with a model, the one that computes with Pillow: the same numbers on every machine."""
    need_pillow("reading images")
    path = Path(model).expanduser()
    if path.is_dir() and not any(
        (path / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")
    ):
        raise ConfigError(
            f"{model} has no preprocessor_config.json, which says how its images are to be resized and normalised: "
            "write one with image_processor.save_pretrained(…)"
        )
    try:
        with quiet():
            return AutoImageProcessor.from_pretrained(str(path), backend="pil")  # type: ignore[no-untyped-call]
    except Exception as error:  # transformers raises a different class for nearly every cause
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"no image processor can be loaded from {model}: {reason}") from error


def check_pictures(rows: Dataset, cells: Dataset) -> None:
    """Raise DataError for the first row (of column "image" in `cells`) that is no image, judged by its first bytes."""
    for index, row in enumerate(cells):
        try:
            _opened(row["image"], whole=False)
        except DataError as error:
            raise DataError(f"{place(rows, index)}: {error}") from error.__cause__


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Collator: images decoded, brought to the model's channels, and put through its processor; labels beside them."""

    processor: Any
    mode: str
    """Pillow's, such as "RGB"."""
    dtype: torch.dtype
    """Of the pixels, which is the model's."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """pixel_values (rows, channels, height, width), and what else the rows have, such as labels."""
        images = [_opened(row["image"]).convert(self.mode) for row in rows]
        try:
            batch = dict(self.processor(images, return_tensors="pt"))
        except ValueError as error:
            sizes = ", ".join(sorted({f"{image.width}×{image.height}" for image in images})[:4])
            raise DataError(f"the image processor makes no batch of images of {sizes}: {error}") from error
        batch = {name: cell.to(self.dtype) if cell.is_floating_point() else cell for name, cell in batch.items()}
        return batch | beside(rows, "image")


def _opened(cell: Any, *, whole: bool = True) -> Image:
    """The image at a path, in bytes, or of pixels; `whole`: decoded, and turned as its camera was held."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(cell, list):
        return _of_pixels(cell)

    def reader(stream: BinaryIO) -> Image.Image:
        image = Image.open(stream)
        _check_depth(image, shown(cell))
        return _of_8_bits(ImageOps.exif_transpose(image)) if whole else image

    try:
        return read(cell, reader)  # type: ignore[no-any-return]
    except UnidentifiedImageError as error:
        raise DataError(f"{shown(cell)} is not an image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, for damaged files
        raise DataError(f"{shown(cell)} is a damaged image ({error}): fetch or write it again") from error


def _check_depth(image: Image, name: str) -> None:
    """Raise DataError for numbers of which nothing says where black and white lie."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # a PNG has 16 bits, whatever its mode
        what = "real numbers" if image.mode == "F" else "32 bits"
        raise DataError(f"{name} is an image of {what}, without a black and a white: write it with 8 or 16 bits")


def _of_8_bits(image: Image) -> Image:
    """A grey image of 16 bits with 8; others as they are. (Pillow's `convert` would make all above 255 white.)"""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))


def _of_pixels(cell: list[Any]) -> Image:
    """Rows of grey values, or of colours with 3 or 4 channels, each 0 to 255."""
    from PIL import Image

    wanted = "rows × columns, or rows × columns × 3 or 4, of whole numbers from 0 to 255, is needed"
    try:
        pixels = np.array(cell)
    except ValueError as error:
        raise DataError(f"its lists of pixels are not of one length; {wanted}") from error
    fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if not fits or pixels.size == 0 or pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 255:
        raise DataError(f"its pixels are {pixels.dtype} of shape {pixels.shape}; {wanted}")
    return Image.fromarray(pixels.astype(np.uint8))
