"""transformers' Trainer, taught to save adapters instead of models and to go on exactly where a run stopped.

What is changed: a checkpoint is the adapter with its heads (never the base), whole or not there at all; evaluation is
the task's own; the methods' extra losses are added; a loss that is not a number stops the run; what a collator draws at
random depends on the seed, the epoch and the rows alone, so a resumed run sees the very batches of an unbroken one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from inlay.engine.adapters import controllers
from inlay.engine.checkpoint import save
from inlay.errors import ConfigError, TrainingError
from inlay.train.around import Around
from inlay.train.callbacks import Controllers, Curve
from inlay.train.checkpoints import STATE_FILE, keep_last
from inlay.train.companions.applied import optimised
from inlay.train.files import staged, write_json
from inlay.train.optimisation import PLAIN, Optimisation
from inlay.train.schedules import warmup_stable_decay_constant

ROW = "inlay_row"
BEST_FILE = "best.json"


@contextlib.contextmanager
def _as_adapted(model: Any) -> Iterator[None]:
    """transformers refuses to train a quantised model unless it sees an adapter of its own kind on it."""
    quantised = getattr(model, "is_quantized", False)
    if quantised:
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if quantised:
            del model._hf_peft_config_loaded


class Trainer(transformers.Trainer):
    """Trains the adapter that is attached to `model`.

    `evaluate_with(model)` gives the metrics of the validation rows (None: there are none), and `metric` is the name of
    the one that chooses the best checkpoint, with whether greater is better. Checkpoints go to `args.output_dir`.
    `resume` is a checkpoint whose adapter the model already holds. `around` stand around each forward pass, the last
    one outermost. `optimisation` is what is done to optimiser and schedule, and `say` is told about it.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        features: Sequence[Mapping[str, Any]],
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        curve: Curve,
        evaluate_with: Callable[[nn.Module], Mapping[str, float]] | None = None,
        metric: tuple[str, bool] = ("loss", False),
        resume: Path | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        around: Sequence[Around] = (),
        optimisation: Optimisation = PLAIN,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        saved = torch.load(resume / STATE_FILE, weights_only=True) if resume is not None else {}
        collate = SeededCollator(collator, args.seed)
        called = Controllers(controllers(model), saved.get("controllers"))
        with _as_adapted(model):
            super().__init__(
                model=model,
                args=args,
                train_dataset=Numbered(features),
                eval_dataset=Numbered(()) if evaluate_with is not None else None,  # never read: see `evaluate`
                data_collator=collate,
                callbacks=[called, curve, collate.epochs, *callbacks],
            )
        self.remove_callback(PrinterCallback)
        self.adapted = model  # transformers may put wrappers around it; this is the one that we were given
        self.curve, self.evaluate_with, self.metric, self.resume = curve, evaluate_with, metric, resume
        self.around = list(around)
        self.optimisation, self.say = optimisation, say
        self.started = time.monotonic() - saved.get("seconds", 0.0)
        self.folder = Path(cast(str, args.output_dir))
        self._staging: Path | None = None
        self._loss = 0.0

    def run(self) -> None:
        """Train to the end, from the start or from the checkpoint."""
        self.train(resume_from_checkpoint=str(self.resume) if self.resume is not None else None)

    @property
    def seconds(self) -> float:
        """Time spent so far, the time before a resume included."""
        return float(time.monotonic() - self.started)

    # -- optimiser and schedule --------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """transformers' optimiser, and what the run's own settings do to it."""
        if self.optimizer is None:
            try:
                made = super().create_optimizer(model)
            except (ImportError, ValueError) as error:
                raise ConfigError(f"train.optim={self.args.optim} cannot be used here: {error}") from error
            self.optimizer = optimised(made, self.adapted, self.args, self.optimisation, self.say)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """transformers' schedule, or the one that it has not."""
        if self.lr_scheduler is None and self.optimisation.schedule is not None:
            made: Any = optimizer or self.optimizer
            warmup = self.args.get_warmup_steps(num_training_steps)
            options = self.optimisation.schedule
            self.lr_scheduler = warmup_stable_decay_constant(made, warmup, num_training_steps, **options)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # -- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss, and what the methods add to it."""
        compute = super().compute_loss

        def forward(inputs: Mapping[str, Any]) -> Any:
            return compute(model, dict(inputs), True, num_items_in_batch)

        for around in self.around:
            forward = functools.partial(around, self, forward)
        loss, outputs = forward(inputs)
        extra = [term for c in controllers(model) if (term := c.extra_loss()) is not None]
        if extra:
            # Where the model has already averaged over the accumulated batches, nobody divides by their number again.
            averaged = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            loss = loss + sum(extra, torch.zeros_like(loss)) / (
                self.current_gradient_accumulation_steps if averaged else 1
            )
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward pass. TrainingError, before the optimiser steps, when the loss is no number."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(self._not_a_number(value))
        self._loss += value
        if self.accelerator.sync_gradients:
            self.curve.step_loss, self._loss = self._loss, 0.0
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Nothing: the Trainer's estimate takes all parameters for trained, and walks over them at every step."""
        return 0

    def _not_a_number(self, value: float) -> str:
        last = sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        kept = f"the last good checkpoint is {last[-1]}" if last else "no checkpoint had been written yet"
        rate = self.optimizer.param_groups[0]["lr"] if self.optimizer is not None else self.args.learning_rate
        return (
            f"the loss became {value} at step {self.state.global_step + 1} (learning rate {rate:.2g}); {kept}. "
            f"Lower train.learning_rate (now {self.args.learning_rate:g}), raise train.warmup_steps, or use train.bf16 "
            "instead of fp16"
        )

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The task's metrics on the validation rows; random states are left as they were. Keeps the best adapter."""
        if self.evaluate_with is None:
            return {}
        with untouched_random_states(), contextlib.ExitStack() as stack:
            for around in self.around:
                stack.enter_context(around.evaluating(self))
            figures = {name: float(value) for name, value in self.evaluate_with(self.adapted).items()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.is_world_process_zero():
            epoch = round(self.state.epoch or 0.0, 6)
            self.curve.add({"step": self.state.global_step, "epoch": epoch, "validation": figures})
            self._keep_best(figures)
        return metrics

    def _keep_best(self, figures: Mapping[str, float]) -> None:
        name, greater = self.metric
        best = read_best(self.folder)
        if (
            name in figures
            and math.isfinite(figures[name])
            and (best is None or (figures[name] > best["value"] if greater else figures[name] < best["value"]))
        ):
            with staged(self.folder / "best", "saving the best adapter to", marker=True) as folder:
                save(self.adapted, folder)
                write_json(folder / BEST_FILE, {"step": self.state.global_step, "metric": name, "value": figures[name]})

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter and its heads; the base is not written."""
        if self.args.should_save:
            folder = Path(output_dir or self.folder)
            folder.mkdir(parents=True, exist_ok=True)
            save(self.adapted, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """transformers' checkpoint, made in a staging folder that takes its place when all of it is there."""
        final = self.folder / f"checkpoint-{self.state.global_step}"
        whole = staged(final, "saving the checkpoint", marker=True)
        with whole if self.args.should_save else contextlib.nullcontext() as folder:
            self.accelerator.wait_for_everyone()
            self._staging = final.with_name(f".{final.name}.part")
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.accelerator.wait_for_everyone()
            if folder is not None:
                for path in (folder / final.name).iterdir():
                    os.replace(path, folder / path.name)
                (folder / final.name).rmdir()
                states = [controller.state_dict() for controller in controllers(self.adapted)]
                torch.save({"controllers": states, "seconds": self.seconds}, folder / STATE_FILE)
        if self.args.should_save:
            keep_last(self.folder, max(self.args.save_total_limit or 0, 1))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the model was given with the checkpoint's adapter in it."""


def read_best(folder: Path) -> dict[str, Any] | None:
    """Step, metric and value of the best adapter so far."""
    path = folder / "best" / BEST_FILE
    return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


class Numbered(Dataset[dict[str, Any]]):
    """Features that carry their row's number."""

    def __init__(self, features: Sequence[Mapping[str, Any]]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.features[row], ROW: row}


class SeededCollator:
    """A collator whose randomness (masking, say) is a function of the seed, the epoch and the rows of the batch."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], seed: int) -> None:
        self.collator, self.seed = collator, seed
        self.epochs = Epochs()

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of these features."""
        rows = [feature.pop(ROW) for feature in features]
        with untouched_random_states(devices=False):  # in a loader's worker a GPU must not even be asked
            seed = hash((self.seed, self.epochs.epoch, *rows)) % 2**32  # integers hash the same in every process
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002 - the state that others draw from
            random.seed(seed)
            return self.collator(features)


class Epochs(TrainerCallback):
    """Knows which epoch it is, also in the workers of a data loader."""

    epoch = 0

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count."""
        self.epoch = int(state.epoch or 0)


@contextlib.contextmanager
def untouched_random_states(devices: bool = True) -> Iterator[None]:
    """Whatever the block draws, Python's, numpy's and torch's generators go on as if it had drawn nothing."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if devices else ()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
