"""The verbs. Each parses, calls one library function of the same name, and prints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inlay.cli.fewshot import explain, fewshot
from inlay.fewshot.run import is_few_shot

if TYPE_CHECKING:
    from inlay.train.run import Run

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any setting: method.r=16, train.learning_rate=1e-3."),
]
Columns = Annotated[
    str | None, typer.Option(metavar="ROLE=COLUMN,…", help="Which column is what, such as text=sentence,label=y.")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder, as `inlay train --out` made it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Config = Annotated[Path | None, typer.Argument(metavar="[RUN.YAML]", help="A run's settings; flags override them.")]
Model = Annotated[str | None, typer.Option(help="The base model: a folder or a hub id.")]
TaskKind = Annotated[str | None, typer.Option("--task", help="text-classification (default), token-classification, …")]
Data = Annotated[str | None, typer.Option(help="A folder with train/validation/test files, or a hub id.")]
Train = Annotated[str | None, typer.Option("--train", metavar="FILE", help="Rows to train on.")]
Validation = Annotated[str | None, typer.Option(metavar="FILE", help="Rows that choose the best checkpoint.")]
Test = Annotated[str | None, typer.Option(metavar="FILE", help="Rows to measure on at the end.")]
MethodKind = Annotated[
    list[str] | None, typer.Option("--method", help="lora (default), ia3, … (`inlay methods`); repeat it to combine.")
]
Out = Annotated[str | None, typer.Option(help="The folder to leave everything in (default runs/TASK-METHOD).")]
Seed = Annotated[int | None, typer.Option(help="Of initialisation, order and dropout (default 0).")]
Load = Annotated[str | None, typer.Option(help="How the base is held: auto (default), 4bit (QLoRA), 8bit.")]
Layers = Annotated[
    str | None,
    typer.Option(metavar="RANGES", help="A deeper base of its own layers: [[0, 4], [2, 6]], each [first, last + 1]."),
]
MaxLength = Annotated[int | None, typer.Option(help="Tokens kept of each text.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows at a time.")]
Others = Annotated[
    list[str] | None,
    typer.Option(
        "--adapters", metavar="NAME=DIR", help="An adapter of another run, loaded first and frozen; repeat it."
    ),
]
Compose = Annotated[
    str | None,
    typer.Option(
        metavar="TREE", help="How adapters run: a name, or {stack: [sst2, default]} (`default`: the run's own)."
    ),
]
TaskIdColumn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The column that says which task a row is of, for methods of several tasks."),
]
TaskId = Annotated[str | None, typer.Option(metavar="NAME", help="The task of all rows, for methods of several tasks.")]
Rows = Annotated[str | None, typer.Option("--data", help="The rows: a file, a folder or a hub id.")]
Split = Annotated[str | None, typer.Option(help="Which split, where --data has several.")]
WhichSeed = Annotated[int | None, typer.Option("--seed", help="Which seed of a few-shot run (default: its first).")]


def quickstart(
    out: Annotated[Path, typer.Option(help="The folder to leave the run in.")] = Path("runs/quickstart"),
    method: Annotated[str, typer.Option(help="The method to try.")] = "lora",
) -> None:
    """Fine-tune a real model on real data, here, now, offline; compare it with frozen features."""
    from inlay.train import quickstart

    quickstart(out, method=method)


def train(
    config: Config = None,
    model: Model = None,
    task: TaskKind = None,
    data: Data = None,
    training: Train = None,
    validation: Validation = None,
    test: Test = None,
    columns: Columns = None,
    method: MethodKind = None,
    out: Out = None,
    seed: Seed = None,
    max_length: MaxLength = None,
    load: Load = None,
    layer_replication: Layers = None,
    adapters: Others = None,
    compose: Compose = None,
    task_id_column: TaskIdColumn = None,
    changes: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint in --out.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train an adapter, from a YAML file or from flags; leaves a folder that describes itself."""
    if resume and config is None and model is None and out is not None:
        config = Path(out) / "run.yaml"
    sizes = (seed, max_length, load, layer_replication, adapters, compose, task_id_column)
    run = _run(config, model, task, data, training, validation, test, columns, method, out, *sizes, changes)
    from inlay.train import train

    record = train(run, resume=resume, overwrite=overwrite)
    from inlay.cli.printing import print_record

    print_record(record)


def check(
    config: Config = None,
    model: Model = None,
    task: TaskKind = None,
    data: Data = None,
    training: Train = None,
    validation: Validation = None,
    test: Test = None,
    columns: Columns = None,
    method: MethodKind = None,
    out: Out = None,
    seed: Seed = None,
    max_length: MaxLength = None,
    load: Load = None,
    layer_replication: Layers = None,
    adapters: Others = None,
    compose: Compose = None,
    task_id_column: TaskIdColumn = None,
    changes: Set = None,
) -> None:
    """Resolve a run, read its first rows, list the matched modules and the trainable share; run nothing."""
    sizes = (seed, max_length, load, layer_replication, adapters, compose, task_id_column)
    run = _run(config, model, task, data, training, validation, test, columns, method, out, *sizes, changes)
    from inlay.cli.printing import print_check
    from inlay.train import check

    print_check(check(run))


def evaluate(
    folder: Folder,
    data: Rows = None,
    split: Split = None,
    batch_size: Batch = 32,
    adapters: Others = None,
    compose: Compose = None,
    task_id: TaskId = None,
    task_id_column: TaskIdColumn = None,
    seed: WhichSeed = None,
    as_json: Json = False,
) -> None:
    """Measure a run's adapter on a file (default: the run's own test rows)."""
    if is_few_shot(folder):
        from inlay.fewshot.saved import evaluate as evaluate_few_shot

        _for_few_shot(folder, adapters=adapters, compose=compose, task_id=task_id, task_id_column=task_id_column)
        _print_figures(evaluate_few_shot(folder, data, split=split, seed=seed, batch_size=batch_size), as_json)
        return
    from inlay.train import evaluate

    _no_seed(folder, seed)
    more = {**_others(adapters, compose), "task_id": task_id, "task_id_column": task_id_column}
    figures = evaluate(folder, data, split=split, batch_size=batch_size, progress=not as_json, **more)
    _print_figures(figures, as_json)


def _for_few_shot(folder: Path, **others: Any) -> None:
    """Raise ConfigError for options that runs of `inlay train` alone have."""
    from inlay.errors import ConfigError

    for name, value in others.items():
        if value is not None and value != []:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{folder} is a few-shot run, and {flag} is for runs of `inlay train`: leave it out")


def _no_seed(folder: Path, seed: int | None) -> None:
    from inlay.errors import ConfigError

    if seed is not None:
        raise ConfigError(
            f"--seed {seed} chooses among the seeds of a few-shot run, and {folder} is none: leave it out"
        )


def _print_figures(figures: Mapping[str, float], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(figures))
    else:
        for name, value in figures.items():
            typer.echo(f"{name:<16} {value:.4f}")


def predict(
    folder: Folder,
    data: Annotated[str, typer.Option(help="The rows: a file, a folder or a hub id.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help=".jsonl, .json or .csv; default: print JSON Lines.")
    ] = None,
    split: Split = None,
    batch_size: Batch = 32,
    adapters: Others = None,
    compose: Compose = None,
    task_id: TaskId = None,
    task_id_column: TaskIdColumn = None,
    seed: WhichSeed = None,
) -> None:
    """Predict for each row of a file."""
    if is_few_shot(folder):
        from inlay.fewshot.saved import predict as predict_few_shot

        _for_few_shot(folder, adapters=adapters, compose=compose, task_id=task_id, task_id_column=task_id_column)
        found = predict_few_shot(folder, data, out=out, split=split, seed=seed, batch_size=batch_size)
        _print_predictions(found, out)
        return
    from inlay.train import predict

    _no_seed(folder, seed)
    more = {**_others(adapters, compose), "task_id": task_id, "task_id_column": task_id_column}
    found = predict(folder, data, out, split=split, batch_size=batch_size, progress=out is not None, **more)
    _print_predictions(found, out)


def _print_predictions(found: Sequence[Mapping[str, Any]], out: Path | None) -> None:
    if out is None:
        for row in found:
            typer.echo(json.dumps(row, ensure_ascii=False))
    else:
        typer.echo(f"{len(found)} predictions in {out}")


def merge(
    folder: Folder,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write the plain transformers model to.")],
    tolerance: Annotated[float | None, typer.Option(min=0.0, help="Largest logit difference to accept.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Fold the adapter into its base, write a plain transformers folder, and check that it answers the same."""
    from inlay.train import merge

    merged = merge(folder, out, tolerance=tolerance, overwrite=overwrite)
    typer.echo(
        f"{merged.out}: a plain transformers model; read back, its logits on {merged.texts} examples differ by "
        f"at most {merged.largest_difference:.2g} (allowed: {merged.tolerance:.2g})"
    )
    if merged.quantisation:
        typer.echo(f"merged into the plain weights: the quantised base's logits differ by {merged.quantisation:.2g}")


def show(
    place: Annotated[str, typer.Argument(metavar="DIR|MODEL", help="An adapter or run folder, or a model.")],
    as_json: Json = False,
) -> None:
    """Show what is in an adapter folder, or a model's places and roles (to choose targets from)."""
    from inlay.cli.printing import as_plain, print_shown
    from inlay.train import show

    found = show(place)
    if as_json:
        typer.echo(json.dumps(as_plain(found), ensure_ascii=False))
    else:
        print_shown(found)


def methods(
    kind: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="One method, with its fields.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A folder or hub id: count each method's parameters in it, at its defaults.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods: kind, class, HF peft's name, paper, what they compute; or one of them with its fields."""
    from inlay.cli.printing import as_plain, print_methods
    from inlay.train import methods

    found = methods(kind, model)
    if as_json:
        typer.echo(json.dumps(as_plain(found), ensure_ascii=False))
    else:
        print_methods(found, fields=kind is not None)


def convert(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An adapter folder, from Inlay or HF peft.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="The base model, to check shapes against and to fingerprint.")
    ] = None,
    quantise: Annotated[
        str | None, typer.Option(metavar="int8|nf4", help="Store its matrices as codes; read by Inlay only.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Check an adapter and write it anew in the format that Inlay and HF peft share."""
    from inlay.train import convert

    done = convert(folder, out, model=model, quantise=quantise, overwrite=overwrite)
    reader = "Inlay only" if done.peft_type == "INLAY" else f"Inlay and HF peft ({done.peft_type})"
    typer.echo(f"{done.out}: {done.tensors} tensors, {done.renamed} keys renamed; read by {reader}")


def trim(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The base model: a folder or a hub id.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write the smaller model to.")],
    data: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Texts whose tokens stay; repeat it for several languages.")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="COLUMN", help="Which column has the text.")] = None,
    min_count: Annotated[int, typer.Option(min=1, help="How often a token has to occur in the data to stay.")] = 1,
    script: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A script whose tokens stay, such as Latin; repeatable.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Drop the tokens that some languages never use from a multilingual model; their text is computed as before."""
    from inlay.train import trim

    done = trim(model, data or [], out, text=text, min_count=min_count, scripts=script, overwrite=overwrite)
    typer.echo(f"{done.out}: a plain transformers model\n{done.report}")


VERBS = (quickstart, check, train, evaluate, predict, merge, show, methods, convert, trim, fewshot, explain)
NEED_ARGUMENTS = frozenset({check, train, evaluate, predict, merge, show, convert, trim, fewshot, explain})


def _run(
    config: Path | None,
    model: str | None,
    task: str | None,
    data: str | None,
    training: str | None,
    validation: str | None,
    test: str | None,
    columns: str | None,
    method: list[str] | None,
    out: str | None,
    seed: int | None,
    max_length: int | None,
    load: str | None,
    layer_replication: str | None,
    adapters: list[str] | None,
    compose: str | None,
    task_id_column: str | None,
    changes: list[str] | None,
) -> Run:
    from inlay.train.run import Run
    from inlay.train.settings import yaml_value

    named = {"path": data, "train": training, "validation": validation, "test": test}
    flags: dict[str, Any] = {
        "model": model,
        "task": task,
        "data": {key: value for key, value in named.items() if value is not None},
        "columns": _pairs(columns),
        "method": method[0] if method and len(method) == 1 else method,
        "out": out,
        "seed": seed,
        "max_length": max_length,
        "load": load,
        "layer_replication": None if layer_replication is None else yaml_value(layer_replication),
        "task_id_column": task_id_column,
        **_others(adapters, compose),
    }
    return Run.from_yaml(config, flags, changes or ())


def _others(adapters: list[str] | None, compose: str | None) -> dict[str, Any]:
    from inlay.errors import ConfigError
    from inlay.train.settings import yaml_value

    named: dict[str, str] = {}
    for text in adapters or ():
        name, equals, folder = (piece.strip() for piece in text.partition("="))
        if not (name and equals and folder):
            raise ConfigError(f"--adapters takes NAME=DIR, such as sst2=runs/sst2; got {text!r}")
        if name in named:
            raise ConfigError(f"--adapters names {name!r} twice ({named[name]} and {folder}): choose another name")
        named[name] = folder
    return {"adapters": named or None, "compose": None if compose is None else yaml_value(compose)}


def _pairs(columns: str | None) -> dict[str, str]:
    from inlay.errors import ConfigError

    pairs = {}
    for part in (columns or "").split(","):
        role, equals, column = (piece.strip() for piece in part.partition("="))
        if part.strip() and not (role and equals and column):
            raise ConfigError(f"--columns takes ROLE=COLUMN,…, such as text=sentence,label=y; got {columns!r}")
        if role:
            pairs[role] = column
    return pairs
