"""IncreLoRA's part in the training loop: which places get more ranks, when, and how new numbers begin to learn.

New parameters go into the optimiser's group of those that they stand beside, right behind them: that is where an
optimiser made anew would have them, so that its saved state fits after a resume. Their own warm-up is a share of each
step, w = n / warm-up at their n-th step: the same as a learning rate of w times the group's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inlay.engine.controller import Controller
from inlay.errors import ConfigError, TrainingError, UnsupportedError
from inlay.pieces.lora.growing import GrowingLoRAPiece
from inlay.pieces.lora.importance import orthogonality_loss, take_in


class RankGrowth(Controller):
    """Watches how much the loss depends on each ΔW, and lets those grow on which it depends most.

    `method` has the fields that decide how, described in `methods/increlora.py`.
    """

    def __init__(self, method: Any, pieces: Sequence[GrowingLoRAPiece]) -> None:
        self.method = method
        self.pieces = list(pieces)
        self.step = 0
        self.rounds: range | None = None
        """The steps after which ranks are added; None until `prepare`."""
        self.new_warmup = 0
        self.sensitivity, self.uncertainty = (torch.zeros(len(self.pieces)) for _ in range(2))
        self.newcomers: list[tuple[int, str, int, int]] = []
        """(place, name of the blocks, number of the block, step when it came) of each parameter in its warm-up."""
        self.before: dict[nn.Parameter, Tensor] | None = None

    # -- the plan ----------------------------------------------------------------------------------------------------

    @property
    def target(self) -> int:
        """Ranks there are to be at the end, over all places."""
        return int(self.method.target_r) * len(self.pieces)

    @property
    def rank(self) -> int:
        """Ranks there are."""
        return sum(piece.current_rank for piece in self.pieces)

    @property
    def growing(self) -> bool:
        """Whether ranks are still to come; an adapter that is not trained keeps those that it has."""
        return self.rank < self.target and self.pieces[0].lora_A[0].requires_grad

    def prepare(self, total_steps: int) -> None:
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several and torch.distributed.get_world_size() > 1:
            raise UnsupportedError("IncreLoRA adds parameters, which several processes would not share: use one")
        method, places = self.method, len(self.pieces)
        rounds = math.ceil(places * (method.target_r - method.init_r) / (min(method.top_h, places) * method.added))
        first = max(1, total_steps // 20) if method.warmup is None else method.warmup
        interval = max(1, (total_steps // 2 - first) // max(1, rounds)) if method.interval is None else method.interval
        start = (first // interval + 1) * interval
        self.rounds = range(start, start + rounds * interval, interval)
        self.new_warmup = interval if method.new_warmup is None else method.new_warmup
        if self.growing and self.rounds[-1] >= total_steps:
            raise ConfigError(
                f"IncreLoRA(target_r={method.target_r}, top_h={method.top_h}, grow_by={method.added}) grows in "
                f"{rounds} rounds, the last of them after step {self.rounds[-1]} of a run of {total_steps}: train "
                f"longer, lower warmup (now {first}) or interval (now {interval}), or raise top_h or grow_by"
            )
        for piece in self.pieces:
            piece.watch(self.growing)

    # -- around a step -----------------------------------------------------------------------------------------------

    def extra_loss(self) -> Tensor | None:
        if not self.method.orthogonality or not self.pieces or not torch.is_grad_enabled():
            return None
        joined = [piece.joined() for piece in self.pieces]
        return float(self.method.orthogonality) * orthogonality_loss([m for a, b, _ in joined for m in (a, b.t())])

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        if self.rounds is None:
            raise TrainingError("IncreLoRA needs the run's length: call the controller's prepare(total_steps) first")
        if self.growing:
            for place, piece in enumerate(self.pieces):
                if not piece.reserve:
                    self.put_by(place, optimizer)
        self.before = {parameter: parameter.clone() for parameter, _ in self.warming()}

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        if self.before is None and (self.newcomers or self.growing):
            raise TrainingError("IncreLoRA's controller is called before each optimizer.step() too: before_step")
        self.step += 1
        for parameter, share in self.warming():
            parameter.copy_(torch.lerp((self.before or {})[parameter], parameter, share))
        self.newcomers = [one for one in self.newcomers if self.step - one[3] < self.new_warmup]
        self.before = None
        if self.growing:
            self.score()
            if self.step in (self.rounds or ()):
                self.grow(optimizer)

    def warming(self) -> list[tuple[nn.Parameter, float]]:
        """The parameters in their warm-up, and what share of their step they take: none of the first, as usual."""
        now = self.step if self.before is None else self.step - 1
        return [
            (getattr(self.pieces[place], name)[number], (now - since) / self.new_warmup)
            for place, name, number, since in self.newcomers
        ]

    def score(self) -> None:
        """Take this step's importance of each place into the averages."""
        probes = [piece.probe for piece in self.pieces]
        if all(probe is None or probe.grad is None for probe in probes):
            raise TrainingError("IncreLoRA's controller was called with no backward pass since the last step")
        found = []
        for piece, probe in zip(self.pieces, probes, strict=True):
            total = 0.0 if probe is None or probe.grad is None else float(probe.grad)
            found.append(total / math.sqrt(math.prod(piece.shape)))
            if probe is not None:
                probe.grad = None
        take_in(torch.tensor(found), self.sensitivity, self.uncertainty, self.method.beta1, self.method.beta2)

    def grow(self, optimizer: Optimizer) -> None:
        """Let the reserves of the most important places count, but no more than the budget has room for."""
        order = (self.sensitivity * self.uncertainty).argsort(descending=True, stable=True)
        for place in order[: self.method.top_h].tolist():
            piece, left = self.pieces[place], self.target - self.rank
            if left:
                self.shorten(piece, left, optimizer)
                piece.admit()
                self.join(place, "lora_E", optimizer)
                if self.rank < self.target:
                    self.put_by(place, optimizer)
        if self.rank == self.target:
            for piece in self.pieces:
                piece.watch(False)
                if piece.reserve:
                    self.leave(piece, optimizer)

    # -- the optimiser -----------------------------------------------------------------------------------------------

    def put_by(self, place: int, optimizer: Optimizer) -> None:
        """Give a place a new reserve, whose A and B are trained from the next step on."""
        self.pieces[place].extend(self.method.added)
        self.join(place, "lora_A", optimizer)
        self.join(place, "lora_B", optimizer)

    def join(self, place: int, name: str, optimizer: Optimizer) -> None:
        """The newest of these blocks goes behind the one before it, and into its warm-up."""
        blocks = getattr(self.pieces[place], name)
        group, index = found_in(optimizer, blocks[-2])
        group["params"].insert(index + 1, blocks[-1])
        if self.new_warmup:
            self.newcomers.append((place, name, len(blocks) - 1, self.step))

    def leave(self, piece: GrowingLoRAPiece, optimizer: Optimizer) -> None:
        """Take a reserve out of model and optimiser."""
        place = self.pieces.index(piece)
        last = len(piece.lora_A) - 1
        for blocks in (piece.lora_A, piece.lora_B):
            group, index = found_in(optimizer, blocks[-1])
            del group["params"][index]
            optimizer.state.pop(blocks[-1], None)
        piece.drop()
        self.newcomers = [one for one in self.newcomers if one[:1] != (place,) or one[1] == "lora_E" or one[2] < last]

    @staticmethod
    def shorten(piece: GrowingLoRAPiece, most: int, optimizer: Optimizer) -> None:
        """Leave the first `most` ranks of a reserve, in the optimiser's state too where that is a number for each."""
        if piece.reserve <= most:
            return
        for blocks, dim in ((piece.lora_A, 0), (piece.lora_B, 1)):
            old = blocks[-1]
            new = nn.Parameter(old.detach().narrow(dim, 0, most).clone())
            group, index = found_in(optimizer, old)
            group["params"][index] = blocks[-1] = new
            state = optimizer.state.pop(old, {})
            held = [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
            if all(value.shape == old.shape and value.is_floating_point() for value in held):  # not so: begin anew
                for key, value in state.items():
                    whole = isinstance(value, Tensor) and value.dim()
                    optimizer.state[new][key] = value.narrow(dim, 0, most).clone() if whole else value

    # -- resuming ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        newcomers = [list(one) for one in self.newcomers]
        return {
            "step": self.step,
            "sensitivity": self.sensitivity.clone(),
            "uncertainty": self.uncertainty.clone(),
            "newcomers": newcomers,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        self.sensitivity, self.uncertainty = state["sensitivity"].clone(), state["uncertainty"].clone()
        self.newcomers = [(int(place), str(name), int(n), int(since)) for place, name, n, since in state["newcomers"]]


def found_in(optimizer: Optimizer, parameter: nn.Parameter) -> tuple[dict[str, Any], int]:
    """The group of a parameter and its number there. Raises TrainingError where the optimiser does not have it."""
    for group in optimizer.param_groups:
        for index, one in enumerate(group["params"]):
            if one is parameter:
                return group, index
    raise TrainingError(
        "IncreLoRA adds ranks beside those that the optimiser trains, and this one trains not all of them: make it "
        "from every parameter of the model that requires gradients"
    )
