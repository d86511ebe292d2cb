"""`train.cache_frozen`: nothing frozen is computed twice.

Where nothing below block k trains, the hidden states that leave block k - 1 are computed once for each row and served
in every epoch, and in every evaluation after the first:

    FLOPs of an epoch:  all blocks forward, k … depth backward  →  k … depth forward and backward
    bytes:              Σ over rows of tokens · width · bytes of a number

States are computed before the first step, rows of like length together and in an order that the data alone decides, so
that a resumed run computes the same bits. A row served in a batch padded to another length has had other roundings: the
losses equal the uncached run's to about 1e-6 of themselves in fp32, and to the bit where all rows have one length.
Whether the cache applies is found on the run's first batch (see `frozen.py`), and tried on it: the loss with served
states must be the loss without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor

from inlay.engine.fingerprint import fingerprint
from inlay.errors import ConfigError
from inlay.train.around import Around, Forward
from inlay.train.files import staged
from inlay.train.frozen import Frozen, NotFixed, NothingFrozen, first_tensor, frozen_part, passing, states_of
from inlay.train.options import BUDGETS, Options, readable
from inlay.train.states import States, Unkeyed, row_keys
from inlay.train.trainer import Numbered, untouched_random_states

if TYPE_CHECKING:
    from inlay.train.trainer import Trainer

FOLDER = "frozen-states"
"""Inside the run's folder of checkpoints, until the run has ended."""
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
"""How much the loss may differ, relatively, when served states are tried; others are half precision and get 3e-2."""
OTHERWISE = "the rows come out of the collator otherwise each time (random masking, for example)"


class FrozenCache(Around):
    """Serves the hidden states of the frozen part; `say` gets one line on what was decided."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.options, self.say = options, say
        self.asked = options.cache_frozen in ("memory", "disk")
        self.decided = False
        self.part: Frozen | None = None
        self.states: States | None = None
        self.evaluated: dict[bytes, Tensor] = {}
        self.room = 0
        """Bytes of the budget that are left for the states of validation rows."""
        self.folder: Path | None = None

    def __call__(self, trainer: Trainer, forward: Forward, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The same, from served states where there are some."""
        if not self.decided:
            self.decided = True
            with untouched_random_states():
                self._decide(trainer, forward, inputs)
        if self.part is not None and not self.options.frozen_dropout:
            self.part.silence()
        states = self._find(inputs)
        if self.part is None or states is None:
            return forward(inputs)
        with passing(self.part, states):
            return forward(inputs)

    def close(self) -> None:
        """Let go of the states, in memory and on disk."""
        self.states, self.evaluated = None, {}
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    # -- whether -----------------------------------------------------------------------------------------------------

    def _decide(self, trainer: Trainer, forward: Forward, inputs: Mapping[str, Any]) -> None:
        if not self.options.frozen_dropout:
            self.part = self._silent_part(trainer, forward, inputs)
        if self.options.cache_frozen == "off":
            return
        try:
            refuse_early(trainer)
            self._refuse_one_epoch(trainer)
            part = self.part or frozen_part(trainer.adapted, lambda: forward(inputs))
            if part.draws:
                raise NotFixed(
                    f"the {len(part.blocks)} frozen blocks, or what is below them, draw random numbers in training "
                    "(dropout): train.frozen_dropout=false leaves it out there"
                )
            self.part = part
            refuse_random_collator(trainer)
            line = self._fill(trainer, forward, part)
            self._try(forward, inputs, part)
            self.say(line)
        except (NotFixed, Unkeyed) as why:
            self.states = None
            if self.asked:
                raise ConfigError(
                    f"train.cache_frozen={self.options.cache_frozen} cannot be used: {why}. Leave it out, or set auto"
                ) from why
            if not isinstance(why, NothingFrozen):
                self.say(f"cache_frozen: not used, because {why}")

    def _silent_part(self, trainer: Trainer, forward: Forward, inputs: Mapping[str, Any]) -> Frozen | None:
        """The frozen part in eval mode; None where nothing is frozen."""
        try:
            refuse_early(trainer)
            frozen_part(trainer.adapted, lambda: forward(inputs)).silence()
            return frozen_part(trainer.adapted, lambda: forward(inputs))
        except NothingFrozen as why:
            self.say(f"frozen_dropout: nothing to leave out, because {why}")
            return None
        except NotFixed as why:
            raise ConfigError(f"train.frozen_dropout=false cannot be used: {why}. Leave it out") from why

    def _refuse_one_epoch(self, trainer: Trainer) -> None:
        args, rows = trainer.args, len(trainer.train_dataset)  # type: ignore[arg-type]
        batch = args.train_batch_size * args.gradient_accumulation_steps
        once = args.max_steps * batch <= rows if args.max_steps > 0 else args.num_train_epochs <= 1
        if once and not self.asked:
            raise NothingFrozen("the run goes over its rows only once")

    def _try(self, forward: Forward, inputs: Mapping[str, Any], part: Frozen) -> None:
        """Compare the loss of the first batch with and without served states, from the same random numbers."""
        states = self._find(inputs)
        if states is None:
            raise NotFixed(OTHERWISE)
        with torch.no_grad():
            with untouched_random_states():
                computed = float(forward(inputs)[0])
            with untouched_random_states(), passing(part, states):
                served = float(forward(inputs)[0])
        half = self.options.cache_frozen_dtype != "exact" or torch.is_autocast_enabled(states.device.type)
        tolerance = 3e-2 if half else TOLERANCE.get(part.dtype, 3e-2)
        if not abs(served - computed) <= tolerance * max(abs(computed), 1e-3):
            raise NotFixed(f"the loss of the first batch would be {served:.6g} instead of {computed:.6g}")

    # -- computing ---------------------------------------------------------------------------------------------------

    def _fill(self, trainer: Trainer, forward: Forward, part: Frozen) -> str:
        """Compute the states of every training row, or read them back; returns a line that says so."""
        rows, collate = trainer.train_dataset, trainer.data_collator
        assert isinstance(rows, Numbered)
        if isinstance(rows.features, Dataset) and rows.features.format["type"] is None:
            # Reading a row of a table takes longer than what is left to compute of it; its tokens are small beside its
            # states.
            rows.features = rows.features.to_list()
        lengths = [self._length(rows[row], part) for row in range(len(rows))]
        dtype = part.dtype if self.options.cache_frozen_dtype == "exact" else torch.bfloat16
        place = "disk" if self.options.cache_frozen == "disk" else "memory"
        budget = self.options.cache_frozen_budget or BUDGETS[place]
        needed = sum(lengths) * part.width * dtype.itemsize
        if needed > budget:
            raise NotFixed(
                f"the states of {len(lengths)} rows take {readable(needed)}, more than train.cache_frozen_budget "
                f"({readable(budget)})"
            )
        self.room = budget - needed if place == "memory" else 0
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        size = trainer.args.train_batch_size
        groups = [order[start : start + size] for start in range(0, len(order), size)]

        def batches() -> Iterator[Mapping[str, Any]]:
            for group in groups:
                yield trainer._prepare_inputs(collate([rows[row] for row in group]))

        def compute(into: States) -> States:
            for batch in batches():
                keys, found = row_keys(batch)
                if not into.add(keys, found, states_of(part, lambda batch=batch: forward(batch))):  # type: ignore[misc]
                    raise NotFixed("rows come out of the collator longer than they went in")
            return into

        if place == "memory":
            self.states, done = compute(States(sum(lengths), part.width, dtype)), "computed once"
        else:
            self.folder = trainer.folder / FOLDER
            identity = self._identity(trainer, batches(), part, dtype)
            self.states, done = States.read(self.folder, identity, part.width, dtype), "read back"
            if self.states is None:
                with staged(self.folder, "keeping hidden states in", marker=True) as beside:
                    compute(States(sum(lengths), part.width, dtype, beside)).write_index(beside, identity)
                self.states, done = States.read(self.folder, identity, part.width, dtype), "computed once"
        assert self.states is not None
        return (
            f"cache_frozen: {len(part.blocks)} of {part.depth} blocks are frozen; the states of {len(lengths)} rows "
            f"are {done} ({readable(self.states.nbytes)} {'on disk' if place == 'disk' else 'in memory'})"
        )

    @staticmethod
    def _length(row: Mapping[str, Any], part: Frozen) -> int:
        return len(row["input_ids"]) if "input_ids" in row else part.tokens

    def _identity(
        self, trainer: Trainer, batches: Iterator[Mapping[str, Any]], part: Frozen, dtype: torch.dtype
    ) -> str:
        """A hash of the base, the rows, and how many blocks their states have gone through."""
        digest = hashlib.sha256(json.dumps(fingerprint(trainer.adapted), sort_keys=True, default=str).encode())
        digest.update(f"{len(part.blocks)} {part.dtype} {dtype} {torch.__version__}".encode())
        for batch in batches:
            digest.update(b"".join(row_keys(batch)[0]))
        return digest.hexdigest()

    def _find(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The served states of a batch; None where any row of it is not among them."""
        if self.states is None or self.part is None:
            return None
        try:
            keys, lengths = row_keys(inputs)
        except Unkeyed:
            return None
        mask = inputs["attention_mask"] if lengths is not None else None
        found = self.states.batch(keys, None if mask is None else mask.shape[1])
        device = next(iter(self.part.blocks[-1].parameters())).device
        return None if found is None else found.to(device, self.part.dtype)

    # -- evaluation --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def evaluating(self, trainer: Trainer) -> Iterator[None]:
        """Batches that an earlier evaluation had are served; others are computed, and kept while there is room."""
        if self.states is None or self.part is None:
            yield
            return
        evaluation = _Evaluation(self, self.part)
        model: Any = trainer.adapted
        handles = (
            model.register_forward_pre_hook(evaluation.before, with_kwargs=True),
            model.register_forward_hook(evaluation.after, with_kwargs=True, always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def refuse_early(trainer: Trainer) -> None:
    """Raise NotFixed where calls cannot be watched or passed over: several devices, compiled models, reentrance."""
    kwargs = trainer.args.gradient_checkpointing_kwargs
    if trainer.args.gradient_checkpointing and isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
        raise NotFixed("reentrant gradient checkpointing wants gradients for every block's input (use_reentrant=false)")
    if trainer.args.world_size > 1 or trainer.args.n_gpu > 1:
        raise NotFixed("several devices train together")
    if trainer.args.torch_compile:
        raise NotFixed("the model is compiled (train.torch_compile)")


def refuse_random_collator(trainer: Trainer) -> None:
    """Raise NotFixed when the first rows come out otherwise in another order, which the collator's draws depend on."""
    dataset: Any = trainer.train_dataset
    rows = range(min(len(dataset), 8))
    keys = [row_keys(trainer.data_collator([dataset[row] for row in order]))[0] for order in (rows, rows[::-1])]
    if keys[0] != keys[1][::-1]:
        raise NotFixed(OTHERWISE)


class _Evaluation:
    """Hooks around the model's calls while it is evaluated, whose batches are the same each time."""

    def __init__(self, cache: FrozenCache, part: Frozen) -> None:
        self.cache, self.part = cache, part
        self.now = contextlib.ExitStack()

    def before(self, model: Any, args: Any, inputs: dict[str, Any]) -> None:
        """Serve this call's states, or watch them being computed."""
        self.now = contextlib.ExitStack()
        try:
            keys, _ = row_keys(inputs)
        except Unkeyed:
            return
        if args or torch.is_grad_enabled() or self.part.blocks[0].training:
            return
        shapes = str([tuple(value.shape) for value in inputs.values() if isinstance(value, Tensor)])
        key = hashlib.blake2b(b"".join(keys) + shapes.encode(), digest_size=16).digest()
        states = self.cache.evaluated.get(key)
        if states is not None:
            self.now.enter_context(passing(self.part, states))
            return

        def keep(module: Any, args: Any, output: Any) -> None:
            states = first_tensor(output)
            if states.nbytes <= self.cache.room:
                self.cache.evaluated[key] = states.detach().clone()
                self.cache.room -= states.nbytes

        self.now.callback(self.part.blocks[-1].register_forward_hook(keep).remove)

    def after(self, model: Any, args: Any, inputs: dict[str, Any], output: Any) -> None:
        """The call is over, or has failed."""
        self.now.close()
