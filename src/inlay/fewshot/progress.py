"""What a few-shot run shows while it goes on: its stages as lines, and the steps of the one that trains as a bar.

Where the stream is no terminal, a stage that trains for long says a line now and then instead.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TextIO

from inlay.train.record import duration

EachStep = Callable[[int, float], None]
"""Told of a training step, from 1, and its loss."""
Watch = Callable[[str, int], AbstractContextManager[EachStep]]
"""(a stage's name, its steps) -> what is told of each of them, for as long as the stage trains."""


def unwatched(name: str, steps: int) -> AbstractContextManager[EachStep]:
    """Shows nothing."""
    return contextlib.nullcontext(lambda step, loss: None)


class Progress:
    """Lines and bars on a stream, standard error by default; `every`: seconds between two lines about one stage."""

    def __init__(self, stream: TextIO | None = None, every: float = 30.0) -> None:
        self.stream, self.every = stream or sys.stderr, every
        self.bar: Any = None

    def say(self, line: str) -> None:
        """A line that does not tear the bar."""
        if self.bar is not None:
            self.bar.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)

    @contextlib.contextmanager
    def watch(self, name: str, steps: int) -> Iterator[EachStep]:
        """Show the steps of a stage within the block; a bar goes when the block ends, however it does."""
        if steps == 0 or not self.stream.isatty():
            yield self._lines(name, steps)
            return
        from tqdm.auto import tqdm

        with tqdm(total=steps, desc=name, unit="step", file=self.stream, dynamic_ncols=True, leave=False) as bar:
            self.bar = bar
            try:
                yield self._on_the_bar
            finally:
                self.bar = None

    def _on_the_bar(self, step: int, loss: float) -> None:
        self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self.bar.update(1)

    def _lines(self, name: str, steps: int) -> EachStep:
        """`seed 2 of 5, pattern-0: step 40/400 (10%)  loss 0.6931  1.3 steps/s  4m 37s left`."""
        begun = last = time.monotonic()

        def told(step: int, loss: float) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < self.every:
                return
            last, rate = now, step / max(now - begun, 1e-9)
            left, share = duration((steps - step) / rate), f"{step}/{steps} ({step / steps:.0%})"
            self.say(f"{name}: step {share}  loss {loss:.4f}  {rate:.1f} steps/s  {left} left")

        return told
