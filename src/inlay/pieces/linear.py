"""What the methods on linears share: W becomes W + ΔW, and HF peft's names for fields, places and files.

A method says what HF peft calls its fields (`named`). Its piece says what ΔW is: two thin factors
(`DeltaPiece.factors`) or a matrix (`DeltaPiece.form`). A piece's parameters are named as in peft's files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.peft_names import overrides_from_peft, peft_pattern, peft_targets, targets_from_peft
from inlay.engine.piece import Method, Piece, trainable_dtype
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import UnsupportedError
from inlay.kernels import dense
from inlay.kernels import lora as kernel
from inlay.pieces.checks import CheckedMethod


def named(theirs: str, default: Any, pattern: str | None = None) -> Any:
    """A field that HF peft's config calls `theirs`; `pattern`: the entry by which it may differ from place to place."""
    return dataclasses.field(default=default, metadata={"peft": theirs, "pattern": pattern})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearMethod(CheckedMethod):
    """A method on linears whose fields have names in HF peft."""

    peft_constants: ClassVar[tuple[tuple[str, Any], ...]] = ()
    """Entries of its config that always read the same; a file that has them otherwise is refused."""
    peft_conv1d: ClassVar[bool] = True
    """Whether peft has the method on transformers' Conv1D."""
    peft_convolutions: ClassVar[frozenset[int]] = frozenset()
    """Over how many dimensions peft's convolutions go."""

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        transposed = any(site.transposed for site in sites)
        if transposed and not self.peft_conv1d:
            raise UnsupportedError(f"HF peft has no {type(self).__name__} on transformers' Conv1D")
        beyond = {site.weight.dim() - 2 for site in sites if site.kind == "conv"} - self.peft_convolutions
        if beyond:
            raise UnsupportedError(f"HF peft has no {type(self).__name__} on {beyond.pop()}-D convolutions")
        entries = {**peft_targets(sites, index), **dict(self.peft_constants)}
        entries |= {"fan_in_fan_out": transposed} if self.peft_conv1d else {}
        for field in self.peft_fields():
            theirs, pattern = field.metadata["peft"], field.metadata["pattern"]
            usual, here = getattr(self, field.name), {site: getattr(self.at(site), field.name) for site in sites}
            if pattern is not None:
                entries[pattern] = peft_pattern(here, usual)
            elif any(value != usual for value in here.values()):
                raise UnsupportedError(f"HF peft has one {theirs} for all places")
            entries[theirs] = usual
        return entries

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of this dataclass that a peft config gives. Raises UnsupportedError for what is not here."""
        for name, value in cls.peft_constants:
            if config.get(name, value) != value:
                raise UnsupportedError(
                    f"this {cls.__name__} adapter has {name}={config[name]!r}, and Inlay has only {name}={value!r}"
                )
        given, patterns = {}, {}
        for field in cls.peft_fields():
            if config.get(field.metadata["peft"]) is not None:
                given[field.name] = config[field.metadata["peft"]]
            if field.metadata["pattern"] is not None:
                patterns[field.name] = field.metadata["pattern"]
        return {**targets_from_peft(config), **given, "overrides": overrides_from_peft(config, patterns)}

    @classmethod
    def peft_fields(cls) -> list[dataclasses.Field[Any]]:
        """The fields that peft has too."""
        return [field for field in dataclasses.fields(cls) if "peft" in field.metadata]

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> list[Method]:
        return [cls(**cls.fields_from_peft(config))]


class DeltaPiece(Piece):
    """ΔW at one place: as two thin factors, which run in LoRA's kernel, or as a matrix, formed anew whenever needed."""

    def __init__(self, method: Method, site: Site) -> None:
        super().__init__()
        self.dropout = float(getattr(method, "dropout", 0.0))
        self.kind = site.kind
        self.weight_shape = (site.out_features, site.in_features) if site.kind == "linear" else site.weight.shape
        self.shape = self.weight_shape[0], math.prod(self.weight_shape[1:])
        self.place: dict[str, Any] = {"dtype": trainable_dtype(site.dtype), "device": site.device}

    def start(self, *shape: int, value: float | None = None) -> nn.Parameter:
        """A trained tensor of this shape, filled with `value`; None: He's uniform start, as HF peft has it."""
        tensor = torch.empty(shape, **self.place)
        if value is None:
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        else:
            tensor.fill_(value)
        return nn.Parameter(tensor)

    # -- one of these two --------------------------------------------------------------------------------------------

    # `factors`: A (r, in), B (out, r) and s with ΔW = s · B A; None where there are none, or none that are thin.

    def form(self, *tensors: Tensor) -> Tensor:
        """ΔW (out, in) from the tensors of `formed_from`; for convolutions, in is channels times kernel."""
        raise NotImplementedError

    def formed_from(self) -> list[Tensor]:
        """What `form` takes: by default all parameters, in order."""
        return list(self.parameters())

    # -- what follows from it ----------------------------------------------------------------------------------------

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rate = self.dropout if self.training else 0.0
        found = self.factors() if self.kind == "linear" else None
        if found is not None:
            a, b, scale = found
            return kernel.adapted(inner, x, a, b, scale, rate)
        if self.kind == "linear" and not rate:
            return dense.changed(inner, x, self.form, self.formed_from())
        y, dropped, delta = inner(x), F.dropout(x, rate) if rate else x, self.delta().to(x.dtype)
        host = inner.module
        return y + (F.linear(dropped, delta) if self.kind == "linear" else host._conv_forward(dropped, delta, None))

    def delta(self) -> Tensor:
        """ΔW in the shape of the weight."""
        found = self.factors()
        if found is None:
            return self.form(*self.formed_from()).view(self.weight_shape)
        a, b, scale = found
        return (scale * (b @ a)).view(self.weight_shape)

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.delta()
