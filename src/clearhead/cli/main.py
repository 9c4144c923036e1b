"""The command `clearhead`: its verbs, and how errors reach the person who typed it."""

import os
import sys
from typing import Annotated

import typer

from clearhead.cli import (
    bench,
    card,
    chat,
    compare,
    convert,
    doctor,
    evaluate,
    explain,
    generate,
    look,
    report,
    retrofit,
    scale,
    tokenize,
    train,
)
from clearhead.cli.console import Interrupted, fail, interruptible

INTERRUPTED = 130
app = typer.Typer(
    help="Train attention twins on real text and see which one attends better.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (
    compare,
    scale,
    tokenize,
    train,
    evaluate,
    report,
    look,
    generate,
    explain,
    bench,
    convert,
    retrofit,
    card,
    chat,
    doctor,
):
    app.command(verb.__name__.rpartition(".")[2])(verb.command)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"clearhead {version('clearhead')}, torch {version('torch')}")
        raise typer.Exit()


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Train attention twins on real text and see which one attends better."""


def main() -> None:
    """Entry point. Errors a person can mend end in one sentence and exit code 2, an interruption in 130."""
    _speak_utf8()
    debug = "--debug" in sys.argv
    # Taken wherever it stands in the line: whoever adds it does so at the end.
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        with interruptible("interrupted"):
            app(arguments, prog_name="clearhead")
    except SystemExit as ended:
        # Typer's own word for Ctrl-C, which it says nothing of.
        if ended.code == INTERRUPTED:
            fail("interrupted", code=INTERRUPTED)
        raise
    except Interrupted as interruption:
        fail(str(interruption), code=INTERRUPTED)
    except KeyboardInterrupt:
        fail("interrupted", code=INTERRUPTED)
    except (ValueError, OSError) as error:
        if debug:
            raise
        fail(" ".join(str(error).split()) or type(error).__name__, code=2)


def _speak_utf8() -> None:
    """Begin again in UTF-8 where the locale knows only ASCII: no library takes names that it cannot write."""
    if sys.getfilesystemencoding().lower() in ("utf-8", "utf8"):
        return
    environment = {**os.environ, "PYTHONUTF8": "1"}
    os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], environment)
