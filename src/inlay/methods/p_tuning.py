"""P-tuning: a prompt whose vectors a small network computes, so that they are trained together.

Liu et al. (2021), "GPT Understands, Too", arXiv:2103.10385; deep (P-tuning v2): Liu et al. (2022), arXiv:2110.07602.

    E' = [p_1 … p_n ; E(x)],   p = MLP(e)   or   p = MLP(biLSTM(e)),   e: n trained vectors
    deep: a prompt in every layer, which is prefix tuning
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from inlay.engine.piece import Method, Piece, trainable_dtype
from inlay.engine.prompts.entry import peft_fields, prompt_of, prompt_pieces, prompt_sites, take_prompt
from inlay.engine.prompts.virtual_tokens import Prompt
from inlay.errors import CheckpointError, ConfigError
from inlay.methods.prefix_tuning import PrefixTuning
from inlay.pieces.prompts.checks import check_counts, check_start
from inlay.pieces.prompts.encoded import EncodedPrompt
from inlay.pieces.prompts.files import take_all
from inlay.pieces.prompts.saved import starting_vectors

if TYPE_CHECKING:
    from inlay.engine.sites import Site, SiteIndex


@dataclasses.dataclass(frozen=True, kw_only=True)
class PTuning(Method):
    """n input vectors computed by an encoder (d: width of the token embedding, h: hidden_size, k: num_layers).

    Parameters:

        None    n·d
        "mlp"   n·d + h(d + 1) + h(h + 1) + d(h + 1)
        "lstm"  n·d + 8h(d + h + 2) + (k − 1)·8h(3h + 2) + 2h(2h + 1) + d(2h + 1)

    It is HF peft's P_TUNING, which saves the vectors only; here the encoder is kept in the second file: training goes
    on. With `deep`, everything is as in PrefixTuning(projection_size=hidden_size).
    `torch.compile` has no LSTM in a full graph, unless torch._dynamo.config.allow_rnn says so.
    """

    kind = "p_tuning"
    hosts = frozenset({"module", "embedding"})
    peft_type = "P_TUNING"
    paper = "Liu et al. 2021, arXiv:2103.10385"

    num_virtual_tokens: int = 20
    """n, the vectors of the prompt."""
    encoder: Literal["mlp", "lstm"] | None = "mlp"
    """What computes the vectors: three linears, a bidirectional LSTM and two linears, or nothing. Deep: no meaning."""
    hidden_size: int | None = None
    """h, the width of the encoder; None: d. Deep: m, the width of PrefixTuning's projection; None: no projection."""
    num_layers: int = 2
    """k, the layers of the LSTM."""
    dropout: float = 0.0
    """Between the layers of the LSTM."""
    deep: bool = False
    """P-tuning v2: a prompt in every layer, of which `targets`, `exclude` and `layers` may choose."""
    init_from: str | tuple[str, ...] | None = None
    """Folder of an adapter, or of a run, whose prompt this one starts from: one with the same encoder, which is taken
    over; without an encoder, any prompt, or the mean of several."""
    init_weights: tuple[float, ...] | None = None
    """For several: what each counts in the mean; None: the same."""

    def __post_init__(self) -> None:
        check_start(self)
        check_counts(self, "num_virtual_tokens", "num_layers", optional="hidden_size")
        if self.encoder not in ("mlp", "lstm", None):
            raise ConfigError(f"PTuning(encoder={self.encoder!r}): choose 'mlp', 'lstm' or None")
        if not 0 <= self.dropout < 1 or (self.dropout and (self.encoder != "lstm" or self.num_layers < 2)):
            raise ConfigError(
                f"PTuning(dropout={self.dropout}): it acts between the layers of an LSTM, and lies in [0, 1)"
            )
        if self.deep and self.encoder == "lstm":
            raise ConfigError("PTuning(deep=True) has no LSTM: P-tuning v2 gave it up")
        if not self.deep and (self.targets is not None or self.exclude is not None or self.layers is not None):
            raise ConfigError(
                "PTuning sits at the model's entry: it has targets, exclude and layers with deep=True only"
            )
        if self.overrides:
            raise ConfigError("PTuning has no overrides: there is one prompt")
        if self.deep:
            _ = self.prefix  # which checks its fields

    @property
    def prefix(self) -> PrefixTuning:
        """The method that deep prompts are."""
        names = ("num_virtual_tokens", "targets", "exclude", "layers", "init_from", "init_weights")
        fields = {name: getattr(self, name) for name in names}
        return PrefixTuning(projection_size=self.hidden_size, **fields)

    def sites(self, index: SiteIndex) -> list[Site]:
        """The model, its encoder if it is an encoder–decoder, and the token embedding that reads the text; deep: the
        self-attentions.
        """
        return self.prefix.sites(index) if self.deep else prompt_sites(index, "PTuning")

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        """The encoder, and the pieces that put its vectors in."""
        if self.deep:
            return self.prefix.build(model, sites)
        n, d = self.num_virtual_tokens, sites[-1].out_features
        prompt: nn.Module
        if self.encoder is not None:
            prompt = EncodedPrompt(self, n, d)
            if isinstance(self.init_from, str):
                prompt.start_from(model, self.init_from, self.encoder)
        elif self.init_from is not None:
            prompt = Prompt(starting_vectors(model, self.init_from, self.init_weights, (n, d), 1, prefix=False))
        else:
            prompt = Prompt(torch.randn(n, d))
        return prompt_pieces(sites, prompt.to(sites[-1].device, trainable_dtype(sites[-1].dtype)), n)

    def for_file(self) -> Method:
        """The method as a file describes it: how the prompt started no longer matters."""
        return self.replace(init_from=None, init_weights=None)

    def on_attach(self, model: nn.Module, pieces: Sequence[tuple[Site, Piece]]) -> None:
        """As prefix tuning, if deep."""
        if self.deep:
            self.prefix.on_attach(model, pieces)

    def on_detach(self, model: nn.Module, pieces: Sequence[tuple[Site, Piece]]) -> None:
        """As prefix tuning, if deep."""
        if self.deep:
            self.prefix.on_detach(model, pieces)

    def export(self, pieces: Sequence[tuple[Site, Piece]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`prompt_embeddings` (n, d), what the encoder gives; beside it, the encoder."""
        if self.deep:
            return self.prefix.export(pieces)
        prompt = prompt_of(pieces)
        training = prompt.training
        with torch.no_grad():
            vectors = prompt.eval()()
        prompt.train(training)
        return {"prompt_embeddings": vectors}, {} if self.encoder is None else prompt.state_dict(keep_vars=True)

    def import_(
        self, pieces: Sequence[tuple[Site, Piece]], tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> None:
        """Take the encoder from the second file; without an encoder, the vectors from the first."""
        if self.deep:
            self.prefix.import_(pieces, tensors, extra)
            return
        expected, encoder = self.export(pieces)
        vectors = take_prompt(tensors, expected["prompt_embeddings"].shape)
        if self.encoder is None:
            encoder, extra = {"vectors": prompt_of(pieces)()}, {"vectors": vectors}
        elif not extra:
            raise CheckpointError(
                "the second file, with the encoder behind the prompt, is missing: put it beside the first"
            )
        take_all(encoder, extra)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        """peft's PromptEncoderConfig, or PrefixTuningConfig if deep."""
        if self.deep:
            return {"peft_type": PrefixTuning.peft_type, **self.prefix.to_peft(sites, index)}
        return {
            **peft_fields(self.num_virtual_tokens, sites, index),
            "encoder_reparameterization_type": (self.encoder or "mlp").upper(),
            "encoder_hidden_size": self.hidden_size or sites[-1].out_features,
            "encoder_num_layers": self.num_layers,
            "encoder_dropout": self.dropout,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> list[Method]:
        """Plain vectors: the encoder behind them is not in the file."""
        warnings.warn(
            "HF peft saves no P-tuning encoder: the prompt is loaded, and trained, as plain vectors", stacklevel=2
        )
        return [cls(num_virtual_tokens=config["num_virtual_tokens"], encoder=None)]
