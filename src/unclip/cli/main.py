"""The command `unclip`: its subcommands, exit codes and error messages.

It imports no heavy library, so that help is instant.
"""

import itertools
import platform
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from unclip import __version__
from unclip.cli import concepts, decode, embed, generate, info, inpaint, manipulate, options, rerun, serve, vary
from unclip.cli.convert import convert
from unclip.cli.data import data
from unclip.cli.defaults import EPILOG, config_file, defaults_for
from unclip.cli.evaluate import evaluate
from unclip.cli.messages import (
    detail,
    drop,
    error,
    flush,
    note,
    open_standard_streams,
    say_more,
    say_traceback,
    says_more,
    shown_warnings,
)
from unclip.cli.probe import probe
from unclip.cli.provenance import RecordedCommand
from unclip.cli.train import assemble, train
from unclip.cli.usage import say_usage
from unclip.errors import ConfigError, UnclipError

INTERRUPTED = 130
READER_GONE = 141
"""The exit code that a shell reports for a program whose output is closed."""
ASKS_HELP = "unclip.asks_help"
"""Whether the arguments of the command ask for its help, which a broken configuration file must not prevent."""

EXAMPLES = options.examples(
    'unclip generate "a red apple"         make a picture from a caption',
    "unclip vary photo.jpg -n 4            make four variations of a picture",
    "unclip inpaint a.png --mask m.png     regenerate a part of a picture",
    "unclip info unclip-emoji              show the components of a model",
    "unclip generate --help                all options of a command",
)


class Stopped(KeyboardInterrupt):
    """A signal to end the process. It is a KeyboardInterrupt, so that temporary files are removed first."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


class Commands(TyperGroup):
    """The commands, with every error turned into a message and an exit code."""

    def main(self, *arguments: Any, standalone_mode: bool = True, **more: Any) -> Any:
        """Parse the command line, run the command and exit."""
        if not standalone_mode:
            return super().main(*arguments, standalone_mode=False, **more)
        try:
            code = super().main(*arguments, standalone_mode=False, **more) or 0
        except typer.TyperException as problem:
            say_usage(problem)
            code = problem.exit_code
        except typer.Abort:
            code = 1
        except OSError as problem:
            code = _code_of(problem)
        problem = flush(sys.stdout)
        if problem is not None and not code:
            code = _code_of_stdout(problem)
        flush(sys.stderr)
        sys.exit(code)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        arguments = itertools.takewhile(lambda argument: argument != "--", ctx.args)
        ctx.meta[ASKS_HELP] = not {"--help", "-h"}.isdisjoint(arguments)
        with shown_warnings():
            try:
                return super().invoke(ctx)
            except (typer.Exit, typer.Abort, typer.TyperException):
                raise  # typer's own exits, such as for wrong usage
            except KeyboardInterrupt as problem:
                note("stopped; finished results are kept")
                raise typer.Exit(problem.exit_code if isinstance(problem, Stopped) else INTERRUPTED) from problem
            except (UnclipError, OSError) as problem:
                if (ctx.params.get("debug") or says_more()) and not isinstance(problem, BrokenPipeError):
                    say_traceback()
                code = _code_of(problem) if isinstance(problem, OSError) else 1
                if not isinstance(problem, OSError):
                    error(problem)
                raise typer.Exit(code) from problem
            except Exception as problem:
                say_traceback()
                error("this should not happen: please report it, with the command and the text above")
                note(f"(unclip {__version__}, Python {platform.python_version()}, {platform.platform()})")
                raise typer.Exit(1) from problem


def _code_of(problem: OSError) -> int:
    """Print an error of a file or of stdout. Returns: the exit code."""
    lost = flush(sys.stdout)
    if lost is not None or isinstance(problem, BrokenPipeError):
        return _code_of_stdout(lost or problem)
    error(problem)
    return 1


def _code_of_stdout(problem: OSError) -> int:
    drop(sys.stdout)
    if isinstance(problem, BrokenPipeError):
        return READER_GONE
    error(f"stdout cannot be written: {problem.strerror or problem}")
    return 1


app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _show_version(requested: bool) -> None:
    if requested:
        print(f"unclip {__version__}")
        raise typer.Exit


@app.callback(epilog=f"{EXAMPLES}\n\n{options.kept(EPILOG)}")
def unclip(
    ctx: typer.Context,
    version: Annotated[
        bool,
        options.option(None, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    debug: Annotated[bool, options.flag("--debug", "Show the traceback of an error (before the command).")] = False,
    verbose: Annotated[
        bool, options.option(None, "--verbose", "-v", help="Show details (also after the command).")
    ] = False,
) -> None:
    """Make pictures from captions, and variations of pictures, with unCLIP (DALL-E 2).

    A small model is built in; larger ones are loaded from a folder or from the Hugging Face hub. Results are printed
    to stdout, messages to stderr.
    """
    if verbose:
        say_more()
    if ctx.invoked_subcommand != "help":
        try:
            ctx.default_map = defaults_for(ctx.command)  # type: ignore[arg-type]
        except ConfigError:
            if not ctx.meta[ASKS_HELP]:
                raise
        if ctx.default_map is not None:
            detail(f"defaults of options from {config_file()}")


def show_help(
    ctx: typer.Context,
    command: Annotated[list[str] | None, options.argument("[COMMAND]")] = None,
) -> None:
    """Show the help of a command, like COMMAND --help.

    Args:
        command: A command, as in: data pack

    Examples:
        unclip help generate
        unclip help data pack
    """
    root = ctx.find_root()
    code = root.command.main([*(command or []), "--help"], prog_name=root.info_name, standalone_mode=False)
    raise typer.Exit(code or 0)


options.command(app, "generate", cls=RecordedCommand)(generate.generate)
options.command(app, "vary", cls=RecordedCommand)(vary.vary)
options.command(app, "decode", cls=RecordedCommand)(decode.decode)
options.command(app, "invert")(manipulate.invert)
options.command(app, "interpolate", cls=RecordedCommand)(manipulate.interpolate)
options.command(app, "edit", cls=RecordedCommand)(manipulate.edit)
options.command(app, "blend", cls=RecordedCommand)(manipulate.blend)
app.add_typer(probe, name="probe")
options.command(app, "inpaint", cls=RecordedCommand)(inpaint.inpaint)
options.command(app, "redraw", cls=RecordedCommand)(inpaint.redraw)
options.command(app, "embed")(embed.embed)
options.command(app, "rerun", context_settings=rerun.CONTEXT)(rerun.rerun)
options.command(app, "serve")(serve.serve)
options.command(app, "concepts")(concepts.concepts)
options.command(app, "info")(info.info)
app.add_typer(convert, name="convert")
app.add_typer(data, name="data")
app.add_typer(train, name="train")
options.command(app, "assemble")(assemble)
app.add_typer(evaluate, name="evaluate")
options.command(app, "help")(show_help)


def main() -> None:
    """Run the command that `sys.argv` names, and exit."""
    open_standard_streams()
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _stop)
    app(prog_name="unclip")


def _stop(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the removal of temporary files
    raise Stopped(number)
