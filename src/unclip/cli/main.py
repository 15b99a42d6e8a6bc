"""The command `unclip`: its parts, and what becomes of errors.

Knows the commands and the exit codes; knows nothing of models. Imports no heavy library, so that help is instant.
"""

import contextlib
import os
import platform
import signal
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from unclip import __version__
from unclip.cli import generate, info, inpaint, manipulate, options, train, vary
from unclip.cli.convert import convert
from unclip.cli.data import data
from unclip.cli.evaluate import evaluate
from unclip.cli.messages import error, note, shown_warnings
from unclip.cli.probe import probe
from unclip.errors import UnclipError

READER_GONE = 141
"""What a shell reports of a program whose output nobody reads any more."""

EXAMPLES = options.examples(
    'unclip generate "a red apple"         make a picture of a caption',
    "unclip vary photo.jpg -n 4            make four pictures like a given one",
    "unclip inpaint a.png --mask m.png     draw a part of a picture anew",
    "unclip info unclip-emoji              look into a model",
    "unclip generate --help                all options of a command",
)


class Terminated(KeyboardInterrupt):
    """The process was asked to end by signal `number`; unwinds as Ctrl-C does, so that temporary files are removed."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Commands(TyperGroup):
    """The commands, with every error turned into a message and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        with shown_warnings():
            try:
                return super().invoke(ctx)
            except (typer.Exit, typer.Abort, typer.TyperException):
                raise  # typer's own ways to leave, wrong usage among them
            except KeyboardInterrupt as problem:
                note("stopped; what was finished stays")
                number = problem.number if isinstance(problem, Terminated) else signal.SIGINT
                raise typer.Exit(128 + number) from problem
            except BrokenPipeError as problem:
                _drop_stdout()
                raise typer.Exit(READER_GONE) from problem
            except UnclipError as problem:
                if ctx.params.get("debug"):
                    traceback.print_exc()
                error(problem)
                raise typer.Exit(1) from problem
            except OSError as problem:  # a full disk, a place where one may not write
                if ctx.params.get("debug"):
                    traceback.print_exc()
                error(problem)
                raise typer.Exit(1) from problem
            except Exception as problem:
                traceback.print_exc()
                error("this should not happen: please report it, with the command and the text above")
                note(f"(unclip {__version__}, Python {platform.python_version()}, {platform.platform()})")
                raise typer.Exit(1) from problem


app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"unclip {__version__}")
        raise typer.Exit


@app.callback(epilog=EXAMPLES)
def unclip(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from (before the command).")] = False,
) -> None:
    """Make pictures of captions, and pictures like others, with unCLIP (DALL-E 2).

    A small model is built in; larger ones come from a folder or from the Hugging Face hub. Results go to stdout,
    messages to stderr.
    """


app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("vary", epilog=vary.EXAMPLES)(vary.vary)
app.command("invert", epilog=manipulate.INVERT_EXAMPLES)(manipulate.invert)
app.command("interpolate", epilog=manipulate.INTERPOLATE_EXAMPLES)(manipulate.interpolate)
app.command("edit", epilog=manipulate.EDIT_EXAMPLES)(manipulate.edit)
app.command("blend", epilog=manipulate.BLEND_EXAMPLES)(manipulate.blend)
app.add_typer(probe, name="probe")
app.command("inpaint", epilog=inpaint.INPAINT_EXAMPLES)(inpaint.inpaint)
app.command("redraw", epilog=inpaint.REDRAW_EXAMPLES)(inpaint.redraw)
app.command("info", epilog=info.EXAMPLES)(info.info)
app.add_typer(convert, name="convert")
app.add_typer(data, name="data")
app.command("train", epilog=train.TRAIN_EXAMPLES)(train.train)
app.command("assemble", epilog=train.ASSEMBLE_EXAMPLES)(train.assemble)
app.add_typer(evaluate, name="evaluate")


def main() -> None:
    """Run the command that `sys.argv` names, and exit."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a stream of another kind, or none
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")  # type: ignore[union-attr]
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _terminate)
    app(prog_name="unclip")


def _terminate(number: int, frame: Any) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the removal of temporary files
    raise Terminated(number)


def _drop_stdout() -> None:
    """Let nothing more be written to a pipe that is closed, not even at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
