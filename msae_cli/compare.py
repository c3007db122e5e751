"""The commands that train many SAEs side by side and tell what came out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from msae_cli.arguments import (
    ComparisonOption,
    OutputOption,
    QuickOption,
    SetOption,
    SkipMissingOption,
    check_config,
    check_output,
    latent_indices,
)
from msae_cli.terminal import continued_later, errors, results, say, show

if TYPE_CHECKING:
    from msae_plugin.reporting.dashboards import DashboardRequest
    from msae_plugin.reporting.report import ReportResult

REPORT_FOLDER = "report"
_FILE_WIDTH = 160


def compare(
    config: ComparisonOption,
    output: OutputOption,
    set_: SetOption = None,
    quick: QuickOption = False,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER/OF",
            help="Train and measure a share only: one of several processes on one folder. Run "
            "without it at the end.",
        ),
    ] = None,
    skip_missing: SkipMissingOption = False,
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="Make OUTPUT/report at the end.")
    ] = True,
) -> None:
    """Train SAEs side by side, evaluate them at matched L0, write comparison.json and a page.

    The same command goes on where a killed comparison stopped; finished SAEs are kept.
    """
    check_config(config)
    check_output(output)
    # Imported here: SAELens and torch take ten seconds to import, `msae --help` must not.
    from msae_plugin.common.errors import RunFailure
    from msae_plugin.common.progress import step_reporter
    from msae_plugin.comparison.compare import compare as run_comparison
    from msae_plugin.comparison.recipe import CompareConfig
    from msae_plugin.comparison.training_schedule import Shard
    from msae_plugin.reporting.terminal import comparison_for_terminal

    share = None if part is None else Shard.parse(part)
    recipe = CompareConfig.load(config, set_ or [], quick=quick)
    with continued_later(), step_reporter(errors) as report:
        comparison = run_comparison(
            recipe, output, report=report, shard=share, skip_missing=skip_missing
        )
    for name, reason in comparison.failures.items():
        say(f"{name}: {reason}")
    if comparison.contents is None:
        if comparison.failures:
            raise RunFailure(f"part {part} is not complete: see the lines above")
        results.print(f"part {part} is trained and measured: run without --part at the end")
        return
    table = comparison_for_terminal(output)
    # A file has no width that a table would have to fit.
    place = results if results.is_terminal else Console(width=_FILE_WIDTH, highlight=False)
    place.print(table)
    show(f"comparison: {output / 'comparison.json'}")
    if page:
        _page_of_comparison(output)
    if not comparison.complete:
        raise RunFailure("not everything was trained and measured: see the lines above")


def _page_of_comparison(output: Path) -> None:
    # As in compare: heavy imports.
    from msae_plugin.common.errors import InputError

    try:
        _show_files(_written_report([output], output / REPORT_FOLDER))
    except InputError as error:
        # Without matplotlib, say: what was measured is there all the same.
        say(f"no page was made: {error}")


def report(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...",
            help="Runs, evaluations and comparisons; user/repo:folder for published ones.",
            show_default=False,
        ),
    ],
    output: OutputOption,
    dashboards: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Also a SAEDashboard page of N latents per SAE; needs that package and the "
            "language model.",
        ),
    ] = 0,
    latents: Annotated[
        str | None,
        typer.Option(
            metavar="I,J,...", help="Of these latents instead of the ones shown in context."
        ),
    ] = None,
) -> None:
    """Tables, figures and one self-contained page of what was trained and measured."""
    check_output(output)
    chosen = latent_indices(latents)
    # As in compare: heavy imports.
    from msae_plugin.reporting.dashboards import DashboardRequest
    from msae_plugin.reporting.terminal import answer_for_terminal
    from msae_plugin.saes.download import local_folder

    request = DashboardRequest(dashboards, chosen) if dashboards or chosen else None
    result = _written_report([local_folder(text) for text in folders], output, request)
    results.print(answer_for_terminal(result.document.answers()))
    _show_files(result)
    if result.not_measured:
        results.print(f"{result.not_measured} things were not measured: the page names them")


def _written_report(
    folders: list[Path], output: Path, dashboards: DashboardRequest | None = None
) -> ReportResult:
    # As in compare: heavy imports.
    from msae_plugin.common.progress import step_reporter
    from msae_plugin.reporting.report import report as write_report

    with step_reporter(errors) as progress:
        return write_report(folders, output, progress, dashboards)


def _show_files(result: ReportResult) -> None:
    show(f"page: {result.page}")
    show(f"{len(result.tables)} tables, {len(result.figures)} figures in {result.output}")
