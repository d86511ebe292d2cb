"""What happens around the steps: controllers are called, the curve is written, progress is shown, Ctrl-C is heard."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from inlay.engine.controller import Controller
from inlay.train.files import disk_full, write_text
from inlay.train.record import duration


class Controllers(TrainerCallback):
    """Calls the methods' controllers, and restores them when a run goes on."""

    def __init__(self, controllers: Sequence[Controller], saved: Sequence[dict[str, Any]] | None = None) -> None:
        self.controllers, self.saved = list(controllers), saved

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for controller in self.controllers:
            controller.prepare(state.max_steps)
        for controller, saved in zip(self.controllers, self.saved or (), strict=False):
            controller.load_state_dict(saved)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any
    ) -> None:
        for controller in self.controllers:
            controller.before_step(around["optimizer"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any
    ) -> None:
        for controller in self.controllers:
            controller.after_step(around["optimizer"])


class Curve(TrainerCallback):
    """`metrics.jsonl`: a line for each optimiser step (loss, learning rate) and one for each evaluation.

    `step_loss` is set by the trainer. When a run goes on from step n, the lines after n are dropped first, so that the
    file reads as if the run had never stopped.
    """

    def __init__(self, path: Path, resumed_at: int = 0) -> None:
        self.path = path
        self.step_loss = 0.0
        self.lines = [line for line in read_curve(path) if line["step"] <= resumed_at] if resumed_at else []
        self.learning_rate = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any
    ) -> None:
        self.learning_rate = float(around["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            epoch = round(state.epoch or 0.0, 6)
            self.add(
                {"step": state.global_step, "epoch": epoch, "loss": self.step_loss, "learning_rate": self.learning_rate}
            )

    def add(self, line: dict[str, Any]) -> None:
        """Append one line."""
        self.lines.append(line)
        with disk_full(f"writing {self.path}"), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that was cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


class Stop(TrainerCallback):
    """Ctrl-C (or a cluster's SIGTERM) ends the run after its step, with a checkpoint; a second one ends it now."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block the signals are heard; only the main thread of a program can do that."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step, with a checkpoint (Ctrl-C again: at once, without one)", file=sys.stderr)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.asked:
            control.should_training_stop = True
            # At the end of an epoch the evaluation that is due comes first: a checkpoint before it would skip it.
            control.should_save = control.should_save or not _epoch_is_over(state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.asked:
            over = _epoch_is_over(state)
            control.should_evaluate = control.should_evaluate and over
            control.should_save = over


def _epoch_is_over(state: TrainerState) -> bool:
    return float(state.epoch or 0.0).is_integer()


class Progress(TrainerCallback):
    """A tqdm bar on a terminal; elsewhere a line now and then, with the time that is left."""

    def __init__(self, curve: Curve, stream: TextIO | None = None) -> None:
        self.curve, self.stream = curve, stream or sys.stderr
        self.bar: Any = None
        self.first_step, self.started = 0, 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.first_step, self.started = state.global_step, time.monotonic()
        if state.is_world_process_zero and self.stream.isatty():
            from tqdm.auto import tqdm

            total, done = state.max_steps, state.global_step
            self.bar = tqdm(
                total=total, initial=done, desc="training", unit="step", file=self.stream, dynamic_ncols=True
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {self.curve.step_loss:.4f}", refresh=False)
            self.bar.update(1)
        elif state.global_step % max(1, state.max_steps // 10) == 0 or state.global_step == state.max_steps:
            self.say(self.line(state))

    def line(self, state: TrainerState) -> str:
        """`step 40/400 (10%)  loss 0.6931  12.3 steps/s  29s left`."""
        done, total = state.global_step, state.max_steps
        rate = (done - self.first_step) / max(time.monotonic() - self.started, 1e-9)
        left = duration((total - done) / rate) if rate else "?"
        return (
            f"step {done}/{total} ({done / max(total, 1):.0%})  loss {self.curve.step_loss:.4f}  "
            f"{rate:.1f} steps/s  {left} left"
        )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any) -> None:
        if state.is_world_process_zero:
            figures = {name.removeprefix("eval_"): value for name, value in around.get("metrics", {}).items()}
            shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, float))
            self.say(f"epoch {state.epoch or 0:.2f}  validation  {shown}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Put the bar away, also when training ends with an error."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def say(self, text: str) -> None:
        """A line that does not tear the bar."""
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)
