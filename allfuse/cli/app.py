"""The program: its verbs, and how errors end it."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from allfuse.base.errors import AllfuseError, WorkerFailed
from allfuse.cli import diff, evaluate, join, merge, plan, predict, run, train, verify
from allfuse.cli.options import if_interrupted, print_json

app = typer.Typer(
    name="allfuse",
    help="Train one PyTorch model on all the machines you have, fuse what they learn, and predict "
    "with the result.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"allfuse {version('allfuse')}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Train one PyTorch model on all the machines you have, fuse what they learn, and predict with
    the result.
    """


def told(command: Callable[..., None]) -> Callable[..., None]:
    """A command that says so where Ctrl-C ends it: Typer itself would end without a word."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        with if_interrupted():
            command(**given)

    return run


app.command("train", no_args_is_help=True)(told(train.train))
app.command("join", no_args_is_help=True)(told(join.join))
app.command("run", no_args_is_help=True)(told(run.run))
app.command("verify", no_args_is_help=True)(told(verify.verify))
app.command("evaluate", no_args_is_help=True)(told(evaluate.evaluate))
app.command("predict", no_args_is_help=True)(told(predict.predict))
app.command("merge", no_args_is_help=True)(told(merge.merge))
app.command("diff", no_args_is_help=True)(told(diff.diff))
app.command("plan", no_args_is_help=True)(told(plan.plan))


def main() -> None:
    """Run a command. Errors end it with one clear message and their exit code."""
    try:
        app(standalone_mode=True)
    except AllfuseError as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, WorkerFailed) and error.trace:
            print(error.trace.rstrip(), file=sys.stderr)
        kind = "" if error.exit_code in (2, 130) else f"{type(error).__name__}: "
        print(f"allfuse: {kind}{error}", file=sys.stderr)
        if "--json" in sys.argv:
            print_json({"ok": False, "error": str(error), "exit_code": error.exit_code})
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # before there was a command
        print("allfuse: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO) or error.filename is not None:
            raise
        with contextlib.suppress(OSError):
            print(f"allfuse: the output cannot be written: {error}", file=sys.stderr)
        os._exit(1)  # Python would try to write it again
