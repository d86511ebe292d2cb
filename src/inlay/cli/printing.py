"""How results look on a terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from inlay.train.checking import Check
from inlay.train.inspect import AdapterFolder, MethodRow, Places
from inlay.train.record import Record, duration


def print_record(record: Record) -> None:
    """What a run came to, where it lies, and what to do with it."""
    for split, figures in record.metrics.items():
        typer.echo(f"{split:<11} " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    share = record.trainable_parameters / max(record.total_parameters, 1)
    typer.echo(f"trained     {record.trainable_parameters:,} of {record.total_parameters:,} parameters ({share:.2%})")
    typer.echo(f"adapter     {size(record.adapter_bytes)}, from step {record.best_step} of {record.steps}")
    memory = size(record.peak_memory_bytes)
    typer.echo(f"took        {duration(record.seconds)}, at most {memory} of memory, on {record.device}")
    typer.echo(f"folder      {Path(record.out).resolve()}")
    typer.echo(f"next        inlay predict {record.out} --data FILE --out predictions.jsonl")


def print_check(found: Check) -> None:
    """What a run would do."""
    rows = ", ".join(f"{split} {count:,}" for split, count in found.rows.items())
    typer.echo(f"rows        {rows}")
    for line in found.task.splitlines():
        typer.echo(f"task        {line}")
    if found.tokens:
        typer.echo(f"tokens      {', '.join(map(str, found.tokens))} in the first rows")
    for method, patterns in found.matched.items():
        for number, pattern in enumerate(patterns):
            typer.echo(f"{method if number == 0 else '':<11} {pattern}")
    share = found.trainable_parameters / max(found.total_parameters, 1)
    typer.echo(f"trainable   {found.trainable_parameters:,} of {found.total_parameters:,} parameters ({share:.3%})")
    typer.echo(f"steps       {found.steps:,}")
    typer.echo("\n" + found.run.to_yaml().rstrip())


def print_shown(found: AdapterFolder | list[Places]) -> None:
    """An adapter folder, or a model's places."""
    if isinstance(found, AdapterFolder):
        reader = "Inlay" if found.peft_type == "INLAY" else f"Inlay and HF peft ({found.peft_type})"
        typer.echo(f"folder      {found.folder}")
        for number, method in enumerate(found.methods):
            typer.echo(f"{'method' if number == 0 else '':<11} {method}")
        typer.echo(f"base        {found.base_model}")
        held = f"{found.parameters:,} parameters in {found.tensors} tensors"
        typer.echo(f"weights     {held} ({', '.join(found.dtypes)}), {size(found.bytes)}")
        if found.quantised is not None:
            sizes = [size(found.quantised[name]) for name in ("bytes", "plain_bytes")]
            error, worst = found.quantised["relative_error"], found.quantised["largest_error"]
            held = f"{found.quantised['kind']}: {found.quantised['tensors']} matrices in {sizes[0]}, plain {sizes[1]}"
            typer.echo(f"quantised   {held}; relative error {error:.2%}, at most {worst:.2%}")
        if found.modules_to_save:
            typer.echo(f"whole       {', '.join(found.modules_to_save)}")
        for number, (name, origin) in enumerate(found.adapters.items()):
            typer.echo(f"{'made on' if number == 0 else '':<11} {name} (from {origin})")
        if found.compose is not None:
            typer.echo(f"compose     {json.dumps(found.compose)}")
        typer.echo(f"read by     {reader}")
        if found.record is not None:
            print_record(found.record)
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("place", "count", "kind", "shape", "roles"):
        table.add_column(heading, justify="right" if heading == "count" else "left", no_wrap=heading != "roles")
    for row in found:
        table.add_row(row.pattern, str(row.count), row.kind, "×".join(map(str, row.shape)), ", ".join(row.roles))
    _wide().print(table, markup=False)


def print_methods(found: Sequence[MethodRow], fields: bool) -> None:
    """The methods, two lines each; with `fields`, their fields and defaults."""
    for row in found:
        counted = "" if row.parameters is None else f"{row.parameters:,} parameters"
        typer.echo(f"{row.kind:<24} {row.name:<24} {row.peft_type or '-':<24} {row.paper:<48} {counted}".rstrip())
        typer.echo(f"    {row.what}")
        if row.uncounted is not None:
            typer.echo(f"    not counted: {row.uncounted}")
        if fields:
            typer.echo("")
            for name, default in row.fields.items():
                typer.echo(f"    {name} = {default}")


def as_plain(found: Any) -> Any:
    """Dataclasses as JSON can hold them."""
    if isinstance(found, list | tuple):
        return [as_plain(entry) for entry in found]
    return dataclasses.asdict(found)


def size(count: int) -> str:
    """`311 kB`, `1.2 MB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} bytes"


def _wide() -> Console:
    """A console that does not cut names short when it is piped."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)
