"""AdaMSS: adaptive multi-subspace fine-tuning (Zheng et al. 2025, openreview 8ZdWmpYxT0).

    [W′ b′] = [W b] + C,     rows k of C: B_k A_k N,     N = the r first right singular vectors of [W b]

The rows of W fall into K clusters by their left singular vectors (k-means), and each cluster gets a change of rank
subspace_rank within the space of N, which is frozen. All of them together are one LoRA of rank K · subspace_rank, whose
second factor is block-diagonal up to the order of its rows: it runs as that, and N is multiplied into the first factor.
The B_k start at zero, so the model starts as the base.

With `use_asa` training goes on in fewer and fewer clusters: those of the highest sensitivity times uncertainty in the
whole model, down to `asa_target_subspaces`; the others keep what they have learnt.

Parameters: K · subspace_rank · r + subspace_rank · out, where every cluster has subspace_rank rows or more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from inlay.engine.controller import Controller
from inlay.engine.piece import Piece, take
from inlay.engine.sites import Site
from inlay.errors import CheckpointError, ConfigError, UnsupportedError
from inlay.pieces.clustered import AdaMSSPiece
from inlay.pieces.linear import LinearMethod, named
from inlay.pieces.projections import Placed
from inlay.pieces.subspace_budget import Schedule, SubspaceBudget


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaMSS(LinearMethod):
    """A small change for each cluster of W's rows, within the space of W's first singular vectors."""

    kind = "adamss"
    default_targets = "query,value"
    peft_type = "ADAMSS"
    paper = "Zheng et al. 2025, openreview 8ZdWmpYxT0"
    peft_conv1d = False

    r: int = named("r", 100)
    """How many singular vectors of [W b] the changes lie in."""
    num_subspaces: int = named("num_subspaces", 5)
    """K, the number of clusters."""
    subspace_rank: int = named("subspace_rank", 1)
    """Rank of each cluster's change."""
    random_seed: int = named("random_seed", 0)
    """Seed of the random projection that finds the singular vectors."""
    use_dynamic_rank: bool = named("use_dynamic_rank", False)
    """Give a cluster no more rank than it has singular values above svd_threshold times its largest."""
    svd_threshold: float = named("svd_threshold", 0.1)
    """That threshold."""
    use_asa: bool = named("use_asa", False)
    """Train fewer and fewer clusters."""
    asa_target_subspaces: int = named("asa_target_subspaces", 50)
    """How many clusters of the whole model are trained at the end."""
    init_warmup: int = named("init_warmup", 50)
    """The optimiser step at which their number begins to fall."""
    final_warmup: int = named("final_warmup", 1000)
    """The step at which it has fallen."""
    mask_interval: int = named("mask_interval", 100)
    """Steps between two choices."""
    asa_importance_beta: float = named("asa_importance_beta", 0.85)
    """How much of the average sensitivity is kept at each step."""
    asa_uncertainty_beta: float = named("asa_uncertainty_beta", 0.85)
    """How much of the average uncertainty is kept at each step."""
    asa_schedule_exponent: float = named("asa_schedule_exponent", 3.0)
    """How the number falls: as what is left of the schedule to this power."""

    def __post_init__(self) -> None:
        self.check_whole("r", "num_subspaces", "subspace_rank", "asa_target_subspaces", "final_warmup", "mask_interval")
        self.check_whole("random_seed", "init_warmup", least=0)
        self.check_rate("svd_threshold", "asa_importance_beta", "asa_uncertainty_beta")
        self.check_number("asa_schedule_exponent")
        if self.use_asa and self.init_warmup >= self.final_warmup:
            raise ConfigError(
                f"AdaMSS(init_warmup={self.init_warmup}, final_warmup={self.final_warmup}): the first has to be less"
            )

    def piece(self, site: Site) -> Piece:
        weight = site.module._parameters.get("weight")
        if weight is None or not weight.is_floating_point():
            stored = "quantised" if weight is not None else "parametrised"
            raise UnsupportedError(f"AdaMSS cannot sit at {site.name}: it factors W, and W is {stored}; use LoRA there")
        return AdaMSSPiece(
            self, site, r=self.r, count=self.num_subspaces, rank=self.subspace_rank, seed=self.random_seed,
            threshold=self.svd_threshold if self.use_dynamic_rank else 0.0,
        )  # fmt: skip

    def controller(self, pieces: Mapping[str, Piece]) -> Controller | None:
        own = {name: piece for name, piece in pieces.items() if isinstance(piece, AdaMSSPiece)}
        schedule = Schedule(
            self.asa_target_subspaces, self.init_warmup, self.final_warmup, self.mask_interval,
            self.asa_importance_beta, self.asa_uncertainty_beta, self.asa_schedule_exponent,
        )  # fmt: skip
        return SubspaceBudget(schedule, own) if self.use_asa else None

    # -- files -------------------------------------------------------------------------------------------------------

    def export(self, pieces: Placed) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        tensors, _ = super().export(pieces)
        return tensors, {self.file_key(site, "clusters"): piece.get_buffer("clusters") for site, piece in pieces}

    def import_(self, pieces: Placed, tensors: dict[str, Tensor], extra: dict[str, Tensor]) -> None:
        for site, piece in pieces:
            assert isinstance(piece, AdaMSSPiece)
            key = self.file_key(site, "clusters")
            rows = take(extra, key, piece.clusters.shape) if key in extra else piece.found(site)[1]
            ranks = [len(tensors.get(self.file_key(site, f"adamss_A.{k}"), ())) for k in range(int(rows.max()) + 1)]
            piece.resize(rows, ranks)
            sizes = [len(tensors.get(self.file_key(site, f"adamss_B.{k}"), ())) for k in range(len(ranks))]
            if all(sizes) and sizes != [len(b) for b in piece.adamss_B]:
                raise CheckpointError(
                    f"the AdaMSS file has clusters of {sizes} rows at {site.name}, and those of this base have "
                    f"{[len(b) for b in piece.adamss_B]}; HF peft's files do not say which rows they are, so it can be "
                    "read only on the weights that it was made on, with the same version of torch and scikit-learn"
                )
        super().import_(pieces, tensors, extra)
