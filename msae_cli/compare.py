"""The commands that train many SAEs side by side and tell what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msae_cli.arguments import (
    OnlyOption,
    OutputOption,
    QuickOption,
    RecipeOption,
    SetOption,
    SkipMissingOption,
    check_config,
    check_output,
    latent_indices,
)
from msae_cli.terminal import Terminal, continued_later, import_first, progress, results, say, show
from msae_plugin.common.errors import InputError, RunFailure

if TYPE_CHECKING:
    from msae_plugin.api import Result
    from msae_plugin.reporting.dashboards import DashboardRequest
    from msae_plugin.reporting.report import ReportResult

REPORT_FOLDER = "report"
_FILE_WIDTH = 160


def compare(
    config: RecipeOption,
    output: OutputOption,
    set_: SetOption = None,
    only: OnlyOption = None,
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
    check_config(config, "compare")
    check_output(output)
    import_first("msae_plugin.comparison.compare")
    # As in import_first.
    from msae_plugin import api
    from msae_plugin.reporting.terminal import comparison_for_terminal

    with continued_later():
        comparison = api.compare(
            config,
            output,
            changes=set_ or [],
            only=only or [],
            quick=quick,
            part=part,
            skip_missing=skip_missing,
            progress=progress(),
        ).details
    for name, reason in comparison.failures.items():
        say(f"{name}: {reason}")
    if comparison.contents is None:
        if comparison.failures:
            raise RunFailure(f"part {part} is not complete: see the lines above")
        results.print(f"part {part} is trained and measured: run without --part at the end")
        return
    table = comparison_for_terminal(output)
    # A file has no width that a table would have to fit.
    place = results if results.is_terminal else Terminal(width=_FILE_WIDTH, highlight=False)
    place.print(table)
    show(f"comparison: {output / 'comparison.json'}")
    if page:
        _page_of_comparison(output)
    if not comparison.complete:
        raise RunFailure("not everything was trained and measured: see the lines above")


def _page_of_comparison(output: Path) -> None:
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
    import_first("msae_plugin.reporting.report")
    # As in import_first.
    from msae_plugin.reporting.dashboards import DashboardRequest
    from msae_plugin.reporting.terminal import answer_for_terminal

    request = DashboardRequest(dashboards, chosen) if dashboards or chosen else None
    result = _written_report(folders, output, request)
    results.print(answer_for_terminal(result.details.document.answers()))
    _show_files(result)
    for note in result.notes:
        results.print(note)


def _written_report(
    folders: Sequence[str | Path], output: Path, dashboards: DashboardRequest | None = None
) -> Result[ReportResult]:
    from msae_plugin import api  # as in import_first

    return api.report(folders, output, dashboards=dashboards, progress=progress())


def _show_files(result: Result[ReportResult]) -> None:
    made = result.details
    show(f"page: {made.page}")
    show(f"{len(made.tables)} tables, {len(made.figures)} figures in {made.output}")
