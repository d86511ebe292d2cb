"""The verbs of few-shot learning. Each parses, calls one library function of the same name, and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from inlay.errors import ConfigError

SETTINGS = ("method.", "recipe.", "dtype=", "load=", "dev=", "unlabelled_rows=")
"""What begins so is a setting, with or without --set before it: all else is a label with its word."""
WORDS = "Label and word, such as neg=terrible (or neg=terrible,awful); several may follow."


def fewshot(
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN.YAML] [LABEL=WORD]…", help="A run's settings; further words.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="standard, prompt (default), pet, ipet, lm-bff, list, …")] = None,
    model: Annotated[str | None, typer.Option(help="The base: a folder or hub id (default: embedded MiniLM).")] = None,
    train: Annotated[str | None, typer.Option(metavar="FILE", help="Labelled rows: a file, folder or hub id.")] = None,
    unlabeled: Annotated[str | None, typer.Option(metavar="FILE", help="Rows without labels.")] = None,
    test: Annotated[str | None, typer.Option(metavar="FILE", help="Rows to measure on.")] = None,
    template: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help='A pattern: "{text} It was {mask}."; repeatable.')
    ] = None,
    verbalizer: Annotated[list[str] | None, typer.Option(metavar="LABEL=WORD", help=WORDS)] = None,
    find_words: Annotated[int | None, typer.Option(metavar="N", help="Find so many words for each label.")] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help='What a head reads: "{a}{sep}{b}".')] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="The column of the labels.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, metavar="K", help="Labelled rows (default: all).")] = None,
    per: Annotated[str | None, typer.Option(metavar="class|total", help="What shots count (default class).")] = None,
    group_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="What rows belong to: no group is on two sides of a split.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N|S,S,…", help="How many splits, or which (default 1).")] = None,
    peft: Annotated[
        list[str] | None, typer.Option(metavar="METHOD", help="lora, ia3, bitfit, full, …; repeat it to combine.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Training steps of an adapter; 0: ask it as it is.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of an example at most.")] = None,
    baseline: Annotated[
        bool | None,
        typer.Option("--baseline/--no-baseline", help="In-context learning beside, as a baseline (default yes)."),
    ] = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="The folder (default runs/fewshot-METHOD).")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="recipe.learning_rate=1e-3, method.…=…; several may follow."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on behind the last finished stage in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Learn from a few labels by asking a pretrained model: PET, LM-BFF, T-Few, in-context learning, …"""
    from inlay.fewshot.prompts.verbalizer import Verbalizer
    from inlay.fewshot.run import FewShotRun

    file, further_words, further_settings = _told_apart(more or [])
    words = [*(verbalizer or []), *further_words]
    config: Any = file or (Path(out) / "fewshot.yaml" if resume and out and train is None else None)
    flags: dict[str, Any] = {
        "method": method, "model": model, "train": train, "unlabelled": unlabeled, "test": test, "templates": template,
        "find_words": find_words, "text": text, "label": label, "shots": shots, "per": per, "peft": peft,
        "max_length": max_length, "out": out, "group_column": group_column, "baseline": baseline,
        "seeds": _seeds(seeds), "verbalizer": Verbalizer.parse(words).words if words else None,
    }  # fmt: skip
    sets = [*(changes or []), *further_settings, *([f"recipe.steps={steps}"] if steps is not None else [])]
    run = FewShotRun.from_yaml(config, flags, sets)
    from inlay.fewshot import fewshot

    typer.echo(str(fewshot(run, resume=resume, overwrite=overwrite, progress=True)))
    typer.echo(f"folder       {Path(run.out).resolve()}")
    typer.echo(f"next         inlay predict {run.out} --data FILE --out predictions.jsonl")


def explain(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A few-shot run's folder.")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]…", help="Texts of the one column.")] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Rows to explain.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows of --data.")] = 3,
    top: Annotated[int, typer.Option(min=1, help="Words to show at a mask.")] = 5,
    seed: Annotated[int | None, typer.Option(help="Which seed's solution (default: the first).")] = None,
) -> None:
    """Show what a few-shot model reads, and its likeliest words at the mask."""
    from inlay.fewshot import explain

    if not texts and data is None:
        raise ConfigError('nothing to explain: give texts, inlay explain DIR "A fine film.", or --data FILE')
    for explanation in explain(folder, texts or data, seed=seed, top=top, rows=None if texts else rows):
        typer.echo(f"{explanation}\n")


def _told_apart(more: list[str]) -> tuple[str | None, list[str], list[str]]:
    """Of the arguments without a flag: the file of settings, further words of the labels, and what follows --set."""
    files = [entry for entry in more if "=" not in entry]
    if len(files) > 1:
        raise ConfigError(f"one file of settings can be given, not {len(files)} ({', '.join(files)})")
    given = [entry for entry in more if "=" in entry]
    settings = [entry for entry in given if entry.startswith(SETTINGS)]
    words = [entry for entry in given if entry not in settings]
    return next(iter(files), None), words, settings


def _seeds(given: str | None) -> Any:
    if given is None:
        return None
    parts = [part.strip() for part in given.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise ConfigError(f"--seeds takes a number of splits, or seeds such as 13,21; got {given!r}")
    return int(parts[0]) if len(parts) == 1 else [int(part) for part in parts]
