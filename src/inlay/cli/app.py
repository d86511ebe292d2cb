"""`inlay`: the entry point, and what errors look like. Nothing here imports torch before a verb runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.main

from inlay.cli import verbs
from inlay.errors import InlayError, did_you_mean

app = typer.Typer(
    name="inlay",
    help="Set small trainable pieces into a frozen pretrained model: fine-tune, measure, use, merge.",
    epilog="First time here? `inlay quickstart` fine-tunes a real model on real data, offline.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)
for verb in verbs.VERBS:
    app.command(no_args_is_help=verb in verbs.NEED_ARGUMENTS)(verb)


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Set small trainable pieces into a frozen pretrained model: fine-tune, measure, use, merge."""
    if version:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        try:
            typer.echo(f"inlay {installed('inlay')}")
        except PackageNotFoundError:
            typer.echo("inlay (not installed as a package)")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Exits with 0, with 2 for what the user can mend, with 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]  # may stand anywhere
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run(given, debug))


def run(arguments: list[str], debug: bool) -> int:
    """Run the command and return its exit code; errors are printed, or raised with `debug`."""
    command = typer.main.get_command(app)
    try:
        result = command.main(args=arguments, prog_name="inlay", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except InlayError as error:
        if debug:
            raise
        typer.echo(f"inlay: {error}", err=True)
        return 130 if type(error).__name__ == "Interrupted" else 2
    except (KeyboardInterrupt, EOFError):
        if debug:
            raise
        typer.echo("inlay: stopped", err=True)
        return 130
    except Exception as error:
        if debug or not hasattr(error, "format_message"):
            if type(error).__name__ == "Abort":  # how typer passes Ctrl-C on
                typer.echo("inlay: stopped", err=True)
                return 130
            raise
        if error.format_message():  # it is empty where the help was printed instead
            typer.echo(f"inlay: {_usage(error, command, arguments)}", err=True)
        return int(getattr(error, "exit_code", 2))


def _usage(error: Any, command: Any, arguments: list[str]) -> str:
    """typer's message about the command line, with the nearest flag or verb and where to look."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "inlay"
    message = error.format_message().strip()
    flag = getattr(error, "option_name", None)
    if flag is not None and context is not None:
        known = [name for parameter in context.command.params for name in getattr(parameter, "opts", ())]
        message = f"{where} has no option {flag}{did_you_mean(flag, known)}"
    elif message.startswith("No such command") and arguments:
        wrong = next((argument for argument in arguments if not argument.startswith("-")), arguments[0])
        message = f"there is no verb {wrong!r}{did_you_mean(wrong, command.commands)}"
    return f"{message.rstrip('.')} ({where} --help)"
