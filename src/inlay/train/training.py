"""`train(run)`: from a description to a folder with an adapter, its measurements and how it came about."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from inlay.engine.adapters import attach
from inlay.engine.checkpoint import load, save
from inlay.engine.summary import Summary, summary
from inlay.errors import ConfigError, InlayError, TrainingError
from inlay.train import arguments, loaded
from inlay.train.activations import ActivationBudget
from inlay.train.around import Around
from inlay.train.cache import FrozenCache
from inlay.train.callbacks import Curve, Progress, Stop
from inlay.train.chart import loss_chart
from inlay.train.checkpoints import checkpoints, last_checkpoint, recover, step_of
from inlay.train.files import MARKER, folder_bytes, staged, write_json, write_text
from inlay.train.head_at_labels import HeadAtLabels
from inlay.train.head_loss import ChunkedHeadLoss
from inlay.train.optimisation import Optimisation
from inlay.train.options import Options
from inlay.train.prepare import Prepared, prepare, same_run, whole_modules
from inlay.train.record import (
    ADAPTER,
    CARD_FILE,
    CHART_FILE,
    CHECKPOINTS,
    CURVE_FILE,
    LEFT_BY_A_RUN,
    RECORD_FILE,
    RUN_FILE,
    TASK_FILE,
    Record,
    device_name,
    measured,
    model_card,
    peak_memory_bytes,
    versions,
)  # fmt: skip
from inlay.train.run import Run
from inlay.train.trainer import BEST_FILE, Trainer, read_best


class Interrupted(TrainingError):
    """The run was stopped by the user, with a checkpoint to go on from."""


def train(run: Run, *, resume: bool = False, overwrite: bool = False, progress: bool = True) -> Record:
    """Train an adapter as `run` says. Left in `run.out`: run.yaml, task.json, metrics.jsonl, loss.svg, checkpoints/,
    adapter/ (the best by the task's primary metric), record.json and README.md.

    `resume` goes on from the last complete checkpoint; the loss curve is then the one of an unbroken run. `overwrite`
    replaces an earlier run. Raises ConfigError, DataError, TargetError … before training for what cannot work,
    TrainingError when the loss is no number or the disk is full, and Interrupted on Ctrl-C.
    """
    out = Path(run.out)
    if resume:
        run = resumed_run(run, out)
    else:
        refuse_to_mix(out, overwrite)
    checkpoint = last_checkpoint(out / CHECKPOINTS) if resume else None
    ready = prepare(run, show=checkpoint is None, say=_say if progress else None)
    if checkpoint is not None:
        load(ready.model, checkpoint, trainable=True)
    else:
        attach(ready.model, ready.methods, modules_to_save=whole_modules(ready.model, run))
    loaded.arrange(ready.model, run)
    counts = summary(ready.model)
    if progress:
        print(f"{ready.task.describe()}\n{counts}", file=sys.stderr, flush=True)
    trainer, stop = make_trainer(ready, out, checkpoint, progress)
    main = trainer.is_world_process_zero()  # where several processes train together, one of them writes
    if main:
        if not resume:
            clear(out)
        write_text(out / RUN_FILE, ready.run.to_yaml())
        write_json(out / TASK_FILE, ready.task.to_dict())
        if not resume:
            loaded.keep(run, loaded.sources(run))
    with _nothing_left_of_no_start(trainer, out, resume):
        fit(trainer, stop, out)
    if any(row.ranks for row in counts.rows):  # which training has decided
        counts = summary(ready.model)
    best = finish(ready, trainer, out)
    record = _recorded(ready, trainer, out, counts, best)
    if main:
        name = record.primary_metric
        write_text(out / CHART_FILE, loss_chart(trainer.curve.lines, name, f"{out.name}: loss and {name}"))
        write_text(out / CARD_FILE, model_card(record, ready.run, str(counts)))
        record.write()
    return record


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _nothing_left_of_no_start(trainer: Trainer, out: Path, resume: bool) -> Iterator[None]:
    """Where the first batch shows that a setting cannot be used, the run never began, and its folder goes."""
    try:
        yield
    except InlayError as error:
        began = resume or trainer.state.global_step > 0 or isinstance(error, TrainingError)
        if not began and trainer.is_world_process_zero():
            clear(out)
            with contextlib.suppress(OSError):  # not empty, or the working directory
                out.rmdir()
        raise


def _recorded(ready: Prepared, trainer: Trainer, out: Path, counts: Summary, best: int) -> Record:
    """The run in numbers; its metrics are measured here, on the adapter as it was saved."""
    return Record(
        method=ready.run.to_dict()["method"],
        model=ready.run.model,
        task=ready.task.to_dict(),
        metrics=measure(ready, trainer, out),
        primary_metric=ready.task.primary_metric[0],
        trainable_parameters=counts.trainable_parameters,
        total_parameters=counts.total_parameters,
        adapter_bytes=folder_bytes(out / ADAPTER),
        seconds=round(trainer.seconds, 3),
        peak_memory_bytes=peak_memory_bytes(),
        steps=trainer.state.global_step,
        best_step=best,
        rows={split: len(rows) for split, rows in ready.splits.items()},
        seed=ready.run.seed,
        device=device_name(trainer.args.device),
        versions=versions(),
        out=str(out),
    )


def refuse_to_mix(out: Path, overwrite: bool) -> None:
    """Raise ConfigError when a new run would mix with an earlier one, or write over files that no run left."""
    there = _there(out)
    if there and RUN_FILE not in there:
        raise ConfigError(f"{out} holds {', '.join(there)}, which no run left there: choose another --out")
    if there and not overwrite:
        begun = not (out / RECORD_FILE).exists() and checkpoints(out / CHECKPOINTS)
        go_on = ", or --resume to go on with it" if begun else ""
        raise ConfigError(
            f"{out} already holds a run ({', '.join(there)}): choose another --out, --overwrite to replace it{go_on}"
        )
    if out.is_file():
        raise ConfigError(f"--out {out} is a file; it has to be a folder")


def clear(out: Path) -> None:
    """Take a run away: an earlier one, now that nothing else can keep the new one from starting; one that could not."""
    for path in (out / name for name in LEFT_BY_A_RUN):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _there(out: Path) -> list[str]:
    """What a run leaves behind, as far as it is in the folder; empty folders do not count."""
    paths = [out / name for name in LEFT_BY_A_RUN]
    return [path.name for path in paths if path.is_file() or (path.is_dir() and any(path.iterdir()))]


def resumed_run(given: Run, out: Path) -> Run:
    """The run that began in `out`, if it is the given one and has not ended."""
    if not (out / RUN_FILE).is_file():
        raise TrainingError(f"there is no run in {out} to resume (no {RUN_FILE}): leave --resume out to start one")
    stored = Run.from_yaml(out / RUN_FILE).replace(out=str(out))
    same_run(given, stored, out)
    if (out / RECORD_FILE).exists():
        raise TrainingError(f"the run in {out} has ended (its {RECORD_FILE} is there): nothing is left to resume")
    return stored


def make_trainer(ready: Prepared, out: Path, checkpoint: Path | None, progress: bool) -> tuple[Trainer, Stop]:
    """The trainer of a prepared run, whose model has its adapter."""
    task, tokenizer, model = ready.task, ready.tokenizer, ready.model
    args = arguments.training_arguments(ready.run, out / CHECKPOINTS, task.primary_metric)
    recover(out / CHECKPOINTS)
    kwargs = args.gradient_checkpointing_kwargs
    if args.gradient_checkpointing and isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
        # The reentrant kind passes no gradient to a block whose inputs need none, and frozen embeddings need none.
        model.enable_input_require_grads()
    curve, stop = Curve(out / CURVE_FILE, step_of(checkpoint) if checkpoint is not None else 0), Stop()

    def evaluate(model: Any) -> Mapping[str, float]:
        rows = ready.splits["validation"]
        return measured(task.evaluate(model, tokenizer, rows, batch_size=args.per_device_eval_batch_size))

    bars = [Progress(curve)] if progress else []

    def say(line: str) -> None:
        for bar in bars:
            bar.say(line)

    trainer = Trainer(
        model=model,
        args=args,
        features=task.features(ready.splits["train"], tokenizer, train=True),
        collator=task.collator(tokenizer, model),
        curve=curve,
        evaluate_with=evaluate if "validation" in ready.splits else None,
        metric=task.primary_metric,
        resume=checkpoint,
        callbacks=[stop, *bars],
        around=[HeadAtLabels()] * task.few_labels + around_forward(Options.of(ready.run.train), say),
        optimisation=Optimisation.of(ready.run.train),
        say=say,
    )
    return trainer, stop


def around_forward(options: Options, say: Callable[[str], None]) -> list[Around]:
    """What the run's settings put around each training forward, innermost first."""
    around: list[Around] = [ChunkedHeadLoss()] if options.chunked_loss else []
    around.append(FrozenCache(options, say))
    if options.activation_budget is not None:
        around.append(ActivationBudget(options.activation_budget, say))
    return around


def fit(trainer: Trainer, stop: Stop, out: Path) -> None:
    """Run the loop. Raises Interrupted when it was stopped before its end."""
    config: Any = trainer.adapted.config
    use_cache = getattr(config, "use_cache", None)
    bars = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Progress)]
    try:
        with stop.listening():
            trainer.run()
    finally:
        for bar in bars:
            bar.close()
        config.use_cache = use_cache  # the Trainer turns it off for its own ends
    done, total = trainer.state.global_step, trainer.state.max_steps
    if stop.asked and done < total:
        raise Interrupted(
            f"stopped at step {done} of {total}, with a checkpoint; go on with: "
            f"inlay train --resume --out {shlex.quote(str(out))}"
        )
    for around in trainer.around:
        around.close()


def finish(ready: Prepared, trainer: Trainer, out: Path) -> int:
    """Put the best adapter, or the last where nothing chose, into `out/adapter`; returns the step it is from."""
    best = read_best(trainer.folder)
    step = int(best["step"]) if best is not None else trainer.state.global_step
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        _put_in_place(ready, trainer, out, best is not None)
    trainer.accelerator.wait_for_everyone()
    return step


def _put_in_place(ready: Prepared, trainer: Trainer, out: Path, best: bool) -> None:
    with staged(out / ADAPTER, "saving the adapter to") as folder:
        if not best:
            save(ready.model, folder)
        else:
            not_adapter = shutil.ignore_patterns(MARKER, BEST_FILE)
            shutil.copytree(trainer.folder / "best", folder, dirs_exist_ok=True, ignore=not_adapter)
        write_json(folder / TASK_FILE, ready.task.to_dict())
    shutil.rmtree(trainer.folder / "best", ignore_errors=True)


def measure(ready: Prepared, trainer: Trainer, out: Path) -> dict[str, dict[str, float]]:
    """The metrics of the adapter as it was saved: it is read back first, so a number here is a number of the file."""
    loaded.read_back(ready.model, ready.run, out / ADAPTER)
    size = trainer.args.per_device_eval_batch_size
    return {
        split: measured(ready.task.evaluate(ready.model, ready.tokenizer, ready.splits[split], batch_size=size))
        for split in ("validation", "test")
        if split in ready.splits and ready.task.labelled(ready.splits[split])  # GLUE's test rows have no labels
    }
