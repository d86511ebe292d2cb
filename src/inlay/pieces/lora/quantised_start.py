"""A low-rank change that starts from what quantising a weight loses, so that Q + s·B A is nearer to W than Q is.

    loftq     Q given, or Q = q(W − s·B A) in turns with      s·B A = SVD_r(W − Q)
    qpissa    s·B A = SVD_r(W) first, then                    Q = q(W − s·B A)

SVD_r keeps the r largest singular values, so no s·B A of rank r comes nearer to W − Q. LoftQ: Li et al. 2023,
arXiv:2310.08659, and its one step with codes left alone is HF peft's `replace_lora_weights_loftq`. QPiSSA: Meng et al.
2024, arXiv:2404.02948, section 3 and appendix. q is NF4 in blocks of 64.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.adapters import adapters_of, attach, base_model, detach
from inlay.engine.checkpoint import base_name
from inlay.engine.codes import rounded
from inlay.engine.host import inlays_of
from inlay.engine.piece import Method
from inlay.engine.sites import Site
from inlay.errors import BaseModelError, ConfigError, UnsupportedError

HOW = ("loftq", "qpissa")


def largest_part(matrix: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with s·B A = SVD_r(matrix), the singular values shared between both."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = torch.sqrt(s[:r] / scale)
    return (root[:, None] * v[:r]).contiguous(), (u[:, :r] * root).contiguous()


def split(weight: Tensor, r: int, scale: float, how: str, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q (out, in), on NF4's grid, A and B; as in the papers, loftq ends with A and B, and qpissa with Q."""
    if how == "loftq":
        a, b = weight.new_zeros(r, weight.shape[1]), weight.new_zeros(weight.shape[0], r)
        for _ in range(iterations):
            q = rounded(weight - scale * (b @ a), "nf4")
            a, b = largest_part(weight - q, r, scale)
        return q, a, b
    a, b = largest_part(weight, r, scale)
    for _ in range(iterations - 1):
        a, b = largest_part(weight - rounded(weight - scale * (b @ a), "nf4"), r, scale)
    return rounded(weight - scale * (b @ a), "nf4"), a, b


# -- a base whose codes are there already ------------------------------------------------------------------------------


def is_quantised(weight: Tensor) -> bool:
    """Whether this holds codes."""
    return not weight.is_floating_point()


def what_was_lost(site: Site) -> Tensor:
    """W − Q (out, in) in float32: W from the base's own file, Q from the codes in memory, which stay as they are.

    Raises UnsupportedError for codes that cannot be read here.
    """
    weight: Any = site.weight
    state = getattr(weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        raise UnsupportedError(
            f"init='loftq' reads the codes of bitsandbytes' 4-bit linears as they were loaded, and {site.name} holds "
            f"{'none' if state is None else 'them packed for inference'}: load with load='4bit', and attach before the "
            "first forward"
        )
    from bitsandbytes.functional import dequantize_4bit

    values: Tensor = dequantize_4bit(weight.data, state).float()
    plain = _PLAIN.get()
    assert plain is not None, "LoRA.build says which model this is"
    return plain(site).to(values.device, torch.float32) - values


_PLAIN: contextvars.ContextVar[PlainWeights | None] = contextvars.ContextVar("plain weights", default=None)


@contextlib.contextmanager
def plain_weights_of(model: nn.Module) -> Iterator[None]:
    """Within, `what_was_lost` knows where this model's weights were read from."""
    token = _PLAIN.set(PlainWeights(model))
    try:
        yield
    finally:
        _PLAIN.reset(token)


class PlainWeights:
    """The weights that a quantised model was made from, in the safetensors files that it was loaded from."""

    def __init__(self, model: nn.Module) -> None:
        self.source = base_name(base_model(model))
        self._keys: dict[str, Path] | None = None

    def __call__(self, site: Site) -> Tensor:
        """The weight at a site. Raises BaseModelError where it cannot be found, or has another shape."""
        from safetensors import safe_open

        keys = self.keys()
        key = self._key(f"{site.path}.{site.parameter or 'weight'}", keys)
        with safe_open(keys[key], framework="pt") as file:
            found: Tensor = file.get_tensor(key)
        shape = tuple(site.weight.quant_state.shape)  # type: ignore[attr-defined]
        if tuple(found.shape) != shape:
            raise BaseModelError(
                f"{key} in {self.source} is {tuple(found.shape)}, and {site.name} {shape}: not its base"
            )
        return found

    def keys(self) -> dict[str, Path]:
        """Every tensor's name with the file that has it."""
        if self._keys is None:
            from safetensors import safe_open

            self._keys = {}
            for path in self._files():
                with safe_open(path, framework="pt") as file:
                    self._keys |= dict.fromkeys(file.keys(), path)
        return self._keys

    def _files(self) -> list[Path]:
        folder = Path(self.source) if self.source else None
        if folder is not None and not folder.is_dir():
            from huggingface_hub import try_to_load_from_cache

            names = ("model.safetensors.index.json", "model.safetensors")
            found = [try_to_load_from_cache(str(self.source), name) for name in names]
            folder = next((Path(path).parent for path in found if isinstance(path, str)), None)
        files = sorted(folder.glob("*.safetensors")) if folder is not None else []
        if not files:
            raise BaseModelError(
                f"init='loftq' reads the plain weights from where the model was loaded ({self.source or 'not said'}), "
                "and no safetensors are there: load it with from_pretrained from such a folder"
            )
        return files

    def _key(self, name: str, keys: dict[str, Path]) -> str:
        """The file's name for a parameter: the same, with the body's prefix, or without it."""
        if name in keys:
            return name
        near = [key for key in keys if key.endswith(f".{name}") or name.endswith(f".{key}")]
        if len(near) != 1:
            raise BaseModelError(f"{self.source} has {len(near)} tensors for {name}: it is not the base of this model")
        return near[0]


# -- a base that is to be quantised ------------------------------------------------------------------------------------


def split_base(
    model: nn.Module, method: Method, how: str = "qpissa", *, iterations: int = 5, name: str = "default"
) -> nn.Module:
    """Attach a LoRA to a plain model and split each adapted W into Q + s·B A, Q on NF4's grid; returns the same model.

    This CHANGES THE BASE: save both (`inlay.save(model, …)`, then detach and `save_pretrained`), load that base with
    load="4bit", which gives Q's codes, and the adapter with `inlay.load(…, trainable=True)`. The adapter fits that base
    alone, and `detach` does not bring the old weights back.

    Raises ConfigError and UnsupportedError for what cannot be split; the model is then as it was.
    """
    if how not in HOW:
        raise ConfigError(f"split_base(how={how!r}): choose one of {', '.join(HOW)}")
    if not isinstance(iterations, int) or iterations < 1:
        raise ConfigError(f"split_base(iterations={iterations!r}): a whole number of at least 1 is needed")
    attach(model, method, name=name)
    try:
        placed = _splittable(model, name)
    except BaseException:
        detach(model, name)
        raise
    with torch.no_grad():
        for site, piece in placed:
            weight = _original(site)
            values = weight.float().T if site.transposed else weight.float()
            q, a, b = split(values, piece.lora_A.shape[0], piece.scale, how, iterations)
            weight.copy_(q.T if site.transposed else q)
            piece.lora_A.copy_(a)
            piece.lora_B.copy_(b)
    return model


def _splittable(model: nn.Module, name: str) -> list[tuple[Site, Any]]:
    from inlay.pieces.lora.piece import LoRAPiece

    placed: list[tuple[Site, Any]] = []
    for site, piece in adapters_of(model).get(name).pieces():
        if piece.replaces:
            continue  # a head, which is trained whole
        if type(piece) is not LoRAPiece or piece.kind != "linear" or piece.start is not None:
            raise UnsupportedError(f"split_base is for a plain LoRA on linears, and at {site.name} sits something else")
        if is_quantised(_original(site)):
            raise UnsupportedError(f"{site.name} is quantised: split the plain model, and quantise what comes of it")
        if min(site.weight.shape) < piece.lora_A.shape[0]:
            raise ConfigError(f"r={piece.lora_A.shape[0]} is more directions than {site.name} has: choose a smaller r")
        placed.append((site, piece))
    weights = [_original(site).data_ptr() for site, _ in placed]
    if not placed or len(set(weights)) < len(weights):
        raise UnsupportedError("split_base needs a LoRA on linears of which no two share a weight")
    return placed


def _original(site: Site) -> Tensor:
    inlays = inlays_of(site.module)
    assert inlays is not None
    return inlays.original("weight")
