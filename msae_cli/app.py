"""The command line, `msae`: thin functions, one per command.

Exit status: 0 done, 1 the run failed, 2 the input was wrong, 130 or 143 stopped by a signal. An
error is one line on standard error; `--debug` shows the traceback.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup
from typing_extensions import override

from msae_cli.arguments import (
    ArgumentMistake,
    OutputOption,
    SetOption,
    SkipMissingOption,
    check_config,
    check_folder,
    check_output,
    check_reference,
)
from msae_cli.compare import compare, report
from msae_cli.hub import download, publish
from msae_cli.scale import cache, sweep
from msae_cli.terminal import continued_later, errors, other_rank, results, say
from msae_cli.train import train
from msae_cli.tune import tune

EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_INTERRUPTED = 130


class _ReportingGroup(TyperGroup):
    """Turns exceptions of any command into one line and an exit status."""

    @override
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # `--debug` is accepted anywhere on the line, as users write it.
        words = joined_seeds([word for word in args if word != "--debug"])
        return super().parse_args(ctx, ["--debug", *words] if "--debug" in args else words)

    @override
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ArgumentMistake as error:
            status, message = EXIT_INPUT, f"error: {error}"
            _show_traceback_if_debugging()
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
    # Imported here: an error of a command comes after the command's own imports.
    from msae_plugin.common.errors import InputError, MissingInputError, RunFailure

    if isinstance(error, MissingInputError):
        for item in error.items:
            say(f"missing: {item}")
        return EXIT_INPUT, f"error: {error.summary}"
    if isinstance(error, InputError):
        return EXIT_INPUT, f"error: {error}"
    if isinstance(error, RunFailure):
        return EXIT_FAILED, f"failed: {error}"
    first_line = next(iter(str(error).strip().splitlines()), "")
    return EXIT_FAILED, f"failed: {type(error).__name__}: {first_line} (--debug shows where)"


app = typer.Typer(
    name="msae",
    cls=_ReportingGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Multi-scale orthogonal sparse autoencoders: train, export, inspect.",
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


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and more of the log.")
    ] = False,
) -> None:
    global _debug  # noqa: PLW0603 - one process, one command line
    _debug = _debug or debug
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


app.command()(train)


@app.command()
def info(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="A run, an export or a checkpoint.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A recipe: what would its run cost?")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Say what a checkpoint is, or what a run will cost in memory and tokens."""
    if (folder is None) == (config is None):
        raise ArgumentMistake(
            "give either a folder or --config: msae info DIR, msae info --config FILE"
        )
    if folder is not None:
        if set_:
            raise ArgumentMistake("--set changes a recipe and needs --config")
        check_folder(folder)
    elif config is not None:
        check_config(config)
    # As in train: heavy imports.
    from msae_plugin.reporting.info import describe_config, describe_folder

    if folder is not None:
        results.print(describe_folder(folder))
    elif config is not None:
        results.print(describe_config(config, set_ or []))


@app.command(name="eval")
def evaluate_command(
    references: Annotated[
        list[str],
        typer.Argument(
            metavar="SAE...",
            help="Run folder, export, its jumprelu twin, any SAELens checkpoint folder, "
            "user/repo:folder, or release:sae_id.",
            show_default=False,
        ),
    ],
    config: Annotated[
        Path,
        typer.Option("--config", "-c", help="Protocol: a YAML file, or the name of a shipped one."),
    ],
    output: OutputOption,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds in place of the protocol's: --seeds 0,1,2.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the protocol."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Language model in place of the checkpoint's.")
    ] = None,
    hook: Annotated[str | None, typer.Option(help="Hook in place of the checkpoint's.")] = None,
    skip_missing: SkipMissingOption = False,
) -> None:
    """Evaluate SAEs with SAEBench: core, sparse probing, sae-probes, unlearning and others."""
    check_config(config)
    check_output(output)
    for reference in references:
        check_reference(reference)
    # As in train: heavy imports.
    from msae_plugin.common.errors import RunFailure
    from msae_plugin.common.progress import step_reporter
    from msae_plugin.evaluation.evaluate import evaluate
    from msae_plugin.evaluation.recipe import EvalConfig
    from msae_plugin.reporting.terminal import summary_for_terminal
    from msae_plugin.saes.load import load_saes
    from msae_plugin.training.plans import default_device

    changes = list(set_ or [])
    if seeds is not None:
        changes.append(f"seeds=[{seeds.replace(' ', ',')}]")
    if model is not None:
        changes.append(f"model.name={model}")
    if hook is not None:
        changes.append(f"hook={hook}")
    protocol = EvalConfig.load(config, changes)
    broken: dict[str, str] = {}
    subjects = load_saes(
        references,
        device=default_device(protocol.model.device),
        hook=protocol.hook,
        model_name=protocol.model.name,
        on_broken=broken.__setitem__,
    )
    with step_reporter(errors) as report:
        result = evaluate(
            protocol, subjects, output, skip_missing=skip_missing, broken=broken, report=report
        )
    results.print(summary_for_terminal(result.summary))
    results.print(Text(f"summary: {output / 'summary.json'}, {output / 'summary.csv'}"))
    if not any(entry["status"] == "measured" for entry in result.summary["results"]):
        raise RunFailure("nothing was measured: see the lines above")
    if not result.complete:
        raise RunFailure("not everything was measured: see the lines above")


@app.command(
    name="saebench",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def saebench_script(
    context: typer.Context,
    evaluation: Annotated[str, typer.Argument(help="core, sparse_probing, unlearning, ...")],
) -> None:
    """Run SAEBench's own script of an evaluation with `multiscale` registered.

    Everything behind the evaluation's name is the script's: `msae saebench core --help`.
    """
    if evaluation in ("--help", "-h"):  # its own help; with an evaluation before it, SAEBench's
        typer.echo(context.get_help())
        raise typer.Exit
    # As in train: heavy imports.
    from msae_plugin.evaluation.saebench.command import run_saebench_script

    run_saebench_script(evaluation, context.args)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the run, the report and the figure.")
    ],
    tokens: Annotated[int | None, typer.Option(help="Training tokens.")] = None,
    d_sae: Annotated[int | None, typer.Option(help="Latents of each SAE.")] = None,
    k: Annotated[float | None, typer.Option(help="Active latents per token.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything.")] = None,
    model: Annotated[str | None, typer.Option(help="Language model, as in a recipe.")] = None,
    text: Annotated[str | None, typer.Option(help="Text, as data.source in a recipe.")] = None,
    hook: Annotated[str | None, typer.Option(help="Where the activations are read.")] = None,
    heldout_tokens: Annotated[int | None, typer.Option(help="Tokens to evaluate on.")] = None,
    loss_tokens: Annotated[
        int | None, typer.Option(help="How many of them the losses are measured on.")
    ] = None,
    saebench: Annotated[bool, typer.Option(help="End with SAEBench's core and sae-probes.")] = True,
    set_: SetOption = None,
) -> None:
    """Train multiscale beside batchtopk on a packaged language model and show what came out."""
    check_output(output)
    # As in train: heavy imports.
    from msae_plugin.common.errors import RunFailure
    from msae_plugin.common.progress import step_reporter
    from msae_plugin.demo import (
        HOW_TO_INSTALL,
        demo_for_terminal,
        demo_recipe,
        run_demo,
        saebench_is_installed,
    )

    given: dict[str, Any] = {
        "tokens": tokens,
        "d_sae": d_sae,
        "k": k,
        "seed": seed,
        "model": model,
        "text": text,
        "hook": hook,
        "heldout_tokens": heldout_tokens,
        "loss_tokens": loss_tokens,
    }
    options = {key: value for key, value in given.items() if value is not None}
    if saebench and not saebench_is_installed():
        say(f"SAEBench's evaluations are left out: {HOW_TO_INSTALL}")
        saebench = False
    recipe = demo_recipe(options, set_ or [], saebench=saebench)
    with continued_later(), step_reporter(errors) as progress:
        result = run_demo(recipe, output, progress)
    results.print(demo_for_terminal(result))
    if not result.complete:
        raise RunFailure("not everything was trained and measured: see the lines above")


for command in (cache, compare, tune, sweep, report, publish, download):
    app.command()(command)


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
