"""A prompt of one task carried to another (PANDA), and a foundation prompt carried to many (as in Vega v2).

    for name, run in runs.items():
        transfer(run, "runs/foundation")

Zhong et al. (2022), "PANDA", arXiv:2208.10160; "Toward Efficient Language Model Pretraining and Downstream Adaptation
via Self-Evolution" (Vega v2, Zhong et al. 2022, arXiv:2212.01853).
"""

from __future__ import annotations

from pathlib import Path

from inlay.errors import ConfigError
from inlay.train.record import Record
from inlay.train.run import Run
from inlay.train.training import train

PROMPTS = ("prompt_tuning", "prefix_tuning")


def transfer_runs(run: Run, source: str | Path, weight: float | None = None) -> tuple[Run, Run]:
    """The two runs of PANDA: the teacher, which starts from the prompt in `source` and learns the run's task, in
    `<out>-teacher`; and `run` itself, which starts afresh and follows it.

    `weight`: what following counts in the loss; None: the similarity of the source's prompt and the teacher's, which is
    high where the task is near to the source's. Raises ConfigError unless the run's method is one prompt or prefix.
    """
    kinds = [method["kind"] for method in run.method]
    if len(kinds) != 1 or kinds[0] not in PROMPTS:
        raise ConfigError(f"transfer carries one prompt, and the run's method is {kinds}: use {' or '.join(PROMPTS)}")
    if any(field in run.method[0] for field in ("init_from", "distil_from")):
        raise ConfigError("transfer sets init_from and distil_from itself: leave them out of the run's method")
    out = Path(run.out)
    first = str(out.with_name(f"{out.name}-teacher"))
    start = ("init", "text", "labels", "tokenizer")
    fields = {name: value for name, value in run.method[0].items() if name not in start}
    teacher = run.replace(method=[{**fields, "init_from": str(source)}], out=first)
    taught = {"distil_from": first, "distil_weight": [str(source), first] if weight is None else weight}
    return teacher, run.replace(method=[{**run.method[0], **taught}])


def transfer(
    run: Run, source: str | Path, weight: float | None = None, *, overwrite: bool = False, progress: bool = True
) -> Record:
    """Train both runs of `transfer_runs`; returns the record of the second. Raises as `train` does."""
    teacher, student = transfer_runs(run, source, weight)
    train(teacher, overwrite=overwrite, progress=progress)
    return train(student, overwrite=overwrite, progress=progress)
