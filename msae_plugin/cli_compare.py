"""The commands that train many SAEs side by side and tell what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from msae_plugin.errors import RunFailure
from msae_plugin.terminal import errors, results, say


def compare(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="Recipe; see examples/compare_*.yaml.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The recipe's own short variant.")] = False,
    skip_missing: Annotated[
        bool,
        typer.Option("--skip-missing", help="Leave out what lacks data, keys or packages."),
    ] = False,
) -> None:
    """Train SAEs side by side, evaluate them at matched L0, and write comparison.json.

    The same command goes on where a killed comparison stopped; finished SAEs are kept.
    """
    # Imported here: SAELens and torch take ten seconds to import, `msae --help` must not.
    from msae_plugin.comparison.compare import compare as run_comparison
    from msae_plugin.comparison.compare_config import CompareConfig
    from msae_plugin.reporting.counter import step_reporter
    from msae_plugin.training.interruption import InterruptedBySignalError

    recipe = CompareConfig.load(config, set_ or [], quick=quick)
    try:
        with step_reporter(errors) as report:
            comparison = run_comparison(recipe, output, report=report, skip_missing=skip_missing)
    except InterruptedBySignalError as interruption:
        say(f"{interruption}; the same command continues from here")
        raise typer.Exit(interruption.exit_status) from interruption
    for name, reason in comparison.failures.items():
        say(f"{name}: {reason}")
    results.print(Text(f"comparison: {output / 'comparison.json'}"), soft_wrap=True)
    results.print(Text(f"page: msae report {output} --output {output / 'report'}"), soft_wrap=True)
    if not comparison.complete:
        raise RunFailure("not everything was trained and measured: see the lines above")


def report(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...",
            help="Runs, evaluations and comparisons; user/repo:folder for published ones.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.")],
) -> None:
    """Tables, figures and one self-contained page of what was trained and measured."""
    # As in compare: heavy imports.
    from msae_plugin.hub.download import local_folder
    from msae_plugin.reporting.counter import step_reporter
    from msae_plugin.reporting.report import report as write_report

    with step_reporter(errors) as progress:
        result = write_report([local_folder(text) for text in folders], output, progress)
    results.print(Text(f"page: {result.page}"), soft_wrap=True)
    results.print(
        Text(f"{len(result.tables)} tables, {len(result.figures)} figures in {result.output}"),
        soft_wrap=True,
    )
    if result.not_measured:
        results.print(f"{result.not_measured} entries were not measured: the page names them")
