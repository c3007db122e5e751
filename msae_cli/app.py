"""The command line, `msae`: thin functions, one per command.

Exit status: 0 done, 1 the run failed, 2 the input was wrong, 130 or 143 stopped by a signal. An
error is one line on standard error; `--debug` shows the traceback.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typing_extensions import override

from msae_cli.compare import compare, sweep, tune
from msae_cli.evaluate import evaluate, saebench_script, saelens_script
from msae_cli.hub import download, export, import_, publish
from msae_cli.show import latents, look, report, serve
from msae_cli.start import demo, info, init, recipes
from msae_cli.terminal import be_quiet, errors, other_rank, say
from msae_cli.train import cache, train
from msae_plugin import __version__
from msae_plugin.common.errors import InputError, MissingInputError, RunFailure

EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_INTERRUPTED = 130
_OTHERS = {"saebench", "saelens"}
# A folder where a file has to be, or the other way round; no permission; an impossible name.
_UNUSABLE_PATH = {
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


class _ReportingGroup(TyperGroup):
    """Turns exceptions of any command into one line and an exit status."""

    @override
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # These are accepted anywhere on the line, as users write them; what follows the name of
        # another program's command line is that program's.
        ours = args if not _OTHERS & set(args[:1]) else []
        first = [word for word in ("--debug", "--quiet") if word in ours]
        words = joined_seeds([word for word in args if word not in first])
        return super().parse_args(ctx, [*first, *words])

    @override
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            status, message = EXIT_INTERRUPTED, f"interrupted{f': {error}' if str(error) else ''}"
            _show_traceback_if_debugging()
        except (typer.Exit, typer.Abort):
            raise
        # The outermost handler: whatever a library raises must not reach the user as a traceback.
        except Exception as error:
            if type(error).__module__.startswith(("click", "typer")):
                raise
            if isinstance(error, BrokenPipeError) and _reader_is_gone():
                raise typer.Exit(EXIT_FAILED) from error
            status, message = _status_and_message(error)
            _show_traceback_if_debugging()
        say(message)
        raise typer.Exit(status)


def _reader_is_gone() -> bool:
    """Whether standard output goes to a program that has ended, as `head` does."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still in the buffer would be written, and reported, when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _status_and_message(error: Exception) -> tuple[int, str]:
    if isinstance(error, MissingInputError):
        for item in error.items:
            say(f"missing: {item}")
        return EXIT_INPUT, f"error: {error.summary}"
    if isinstance(error, InputError):
        return EXIT_INPUT, f"error: {error}"
    if isinstance(error, RunFailure):
        return EXIT_FAILED, f"failed: {error}"
    first_line = next(iter(str(error).strip().splitlines()), "")
    # What `Path.resolve` says about a link to itself before Python 3.13.
    if isinstance(error, RuntimeError) and first_line.startswith("Symlink loop"):
        return EXIT_INPUT, f"error: {first_line}: give a path that leads somewhere"
    if isinstance(error, OSError) and error.errno in _UNUSABLE_PATH and error.filename:
        return EXIT_INPUT, (
            f"error: {str(error.filename)!r} cannot be used ({error.strerror}): move it away, or "
            "give another path"
        )
    return EXIT_FAILED, f"failed: {type(error).__name__}: {first_line} (--debug shows where)"


app = typer.Typer(
    name="msae",
    cls=_ReportingGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Multi-scale orthogonal sparse autoencoders: train, evaluate, compare, publish.",
)

_debug = False


def _show_traceback_if_debugging() -> None:
    if _debug:
        errors.print_exception()


class _LineHandler(logging.Handler):
    """One log record, one line on standard error, above a running progress bar."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}")


def _format_warning(message: Warning | str, *_place: object, **_source: object) -> str:
    return str(message)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"msae {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and more of the log.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Show no progress: results, warnings and errors alone.")
    ] = False,
    _: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    global _debug  # noqa: PLW0603 - one process, one command line
    _debug = _debug or debug
    if quiet:
        be_quiet()
    logging.basicConfig(
        # Of several processes the first one warns for all.
        level=logging.INFO if _debug else logging.ERROR if other_rank() else logging.WARNING,
        handlers=[_LineHandler()],
        force=True,
    )
    # Warnings of libraries as one line each, in place of file, line number and source.
    warnings.formatwarning = _format_warning
    logging.captureWarnings(True)
    for noise in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", noise)


_BEGIN, _TRAIN, _MEASURE, _SHOW, _OTHER = (
    "Begin",
    "Train",
    "Evaluate and compare",
    "Report and publish",
    "Other command lines, with multiscale registered",
)
# In the order of work: name, function, group, example.
COMMANDS: list[tuple[str, Callable[..., None], str, str]] = [
    ("demo", demo, _BEGIN, "demo --output runs/demo"),
    ("recipes", recipes, _BEGIN, "recipes"),
    ("init", init, _BEGIN, "init smollm2 mine.yaml"),
    ("info", info, _BEGIN, "info --config gemma-2-2b"),
    ("import", import_, _BEGIN, "import layers.9 --output saes/theirs"),
    ("train", train, _TRAIN, "train --config smollm2 --output runs/smollm2"),
    ("cache", cache, _TRAIN, "cache --config smollm2 --output runs/activations"),
    ("eval", evaluate, _MEASURE, "eval runs/smollm2 --config offline --output runs/smollm2-eval"),
    ("compare", compare, _MEASURE, "compare --config compare_smollm2 --output runs/compare"),
    ("tune", tune, _MEASURE, "tune --config compare_smollm2 --rates 2e-3,4e-3 --output runs/rates"),
    ("sweep", sweep, _MEASURE, "sweep --config compare_smollm2 --jobs 4 --output runs/compare"),
    ("report", report, _SHOW, "report runs/smollm2 runs/smollm2-eval --output runs/report"),
    ("latents", latents, _SHOW, "latents runs/smollm2 --output runs/latents"),
    ("look", look, _SHOW, 'look runs/smollm2/multiscale "The cat sat on the mat."'),
    ("serve", serve, _SHOW, "serve runs/smollm2/multiscale"),
    ("publish", publish, _SHOW, "publish runs/smollm2 --repo you/smollm2-saes --dry-run"),
    ("download", download, _SHOW, "download you/smollm2-saes --output saes"),
    ("export", export, _SHOW, "export runs/smollm2 --to delphi --output delphi"),
    ("saebench", saebench_script, _OTHER, "saebench core --help"),
    ("saelens", saelens_script, _OTHER, "saelens --architecture multiscale -k 32 --d_sae 16384"),
]
for _name, _function, _group, _example in COMMANDS:
    _passed_on = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(
        name=_name,
        rich_help_panel=_group,
        epilog=f"Example: msae {_example}",
        context_settings=_passed_on if _name in _OTHERS else None,
        add_help_option=_name not in _OTHERS,
    )(_function)


def joined_seeds(words: list[str]) -> list[str]:
    """`--seeds 0 1 2` as `--seeds 0,1,2`: click has no options of any number of values."""
    joined: list[str] = []
    for word in words:
        if joined[-2:-1] == ["--seeds"] and word.isdecimal():
            joined[-1] += f",{word}"
        else:
            joined.append(word)
    return joined


def main() -> None:
    """Entry point of the `msae` command."""
    app(prog_name="msae")


if __name__ == "__main__":
    main()
