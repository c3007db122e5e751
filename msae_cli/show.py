"""The commands that show: a report, every latent on a page, the active ones on a text."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from msae_cli.arguments import OutputOption, check_output, check_reference
from msae_cli.terminal import import_first, progress, results, show
from msae_plugin.common.errors import InputError

if TYPE_CHECKING:
    from msae_plugin.api import Result
    from msae_plugin.reporting.report import ReportResult


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
) -> None:
    """Tables, figures and one self-contained page of what was trained and measured."""
    check_output(output)
    import_first("msae_plugin.reporting.report")
    # As in import_first.
    from msae_plugin import api
    from msae_plugin.reporting.terminal import answer_for_terminal

    result = api.report(folders, output, progress=progress())
    results.print(answer_for_terminal(result.details.document.answers()))
    show_files(result)
    for note in result.notes:
        results.print(note)


def show_files(result: Result[ReportResult]) -> None:
    """Where the page, the tables and the figures are."""
    made = result.details
    show(f"page: {made.page}")
    show(f"{len(made.tables)} tables, {len(made.figures)} figures in {made.output}")


_ModelOption = Annotated[
    str | None, typer.Option(help="Language model, for SAEs that name none.", metavar="NAME")
]
_OneSAE = Annotated[
    str, typer.Argument(metavar="SAE", help="One SAE, as in msae eval.", show_default=False)
]
_BrowserOption = Annotated[
    Path | None,
    typer.Option(
        "--latents", metavar="DIR", help="Output of msae latents: says what each fires on."
    ),
]
_LoaderOption = Annotated[
    str, typer.Option(help="TransformerLens' class, as model.loader of a recipe.", metavar="CLASS")
]


def latents(
    references: Annotated[
        list[str],
        typer.Argument(
            metavar="SAE...",
            help="Runs, comparisons, exports, user/repo:folder or release:sae_id, of one model.",
            show_default=False,
        ),
    ],
    output: OutputOption,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE|NAME", help="Held-out text in place of the recipe's own."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How much of it is read.")] = 100_000,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="This SAE or method; may be repeated."),
    ] = None,
    model: _ModelOption = None,
    loader: _LoaderOption = "auto",
) -> None:
    """A page on which every latent of these SAEs can be looked at: a folder, no server."""
    check_output(output)
    for reference in references:
        check_reference(reference)
    import_first("msae_plugin.reporting.latent_browser")
    from msae_plugin import api  # as in import_first

    made = api.latents(
        references, output, text=text, tokens=tokens, only=only or [], model=model,
        loader=loader, progress=progress(),
    ).details  # fmt: skip
    for row in made.rows:
        show(
            f"{row['sae']}: {row['latents']:,} latents, {row['dead']:,} never fire, "
            f"L0 {row['l0']:.3g}, {row['bytes_per_latent']:,} bytes each"
        )
    show(f"page: {made.page}")


def look(
    reference: _OneSAE,
    text: Annotated[str, typer.Argument(help="Any text.", show_default=False)],
    top: Annotated[int, typer.Option(min=1, help="Latents per token.")] = 5,
    browser: _BrowserOption = None,
    model: _ModelOption = None,
    loader: _LoaderOption = "auto",
) -> None:
    """The most active latents on each token of a text."""
    check_reference(reference)
    import_first("msae_plugin.reporting.look")
    # As in import_first.
    from msae_plugin import api
    from msae_plugin.evaluation.contexts import one_line

    found = api.look(
        reference, text, top=top, browser=browser, model=model, loader=loader, progress=progress()
    ).details
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("token", "latent", "activation"):
        table.add_column(heading, justify="left" if heading == "token" else "right", no_wrap=True)
    for heading in ("fires on", "promotes"):
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    last = None
    for row in found.rows:
        token = one_line(row.token) if row.position != last else ""
        last = row.position
        words = (one_line(row.fires_on), one_line(row.promotes))
        cells = (token, str(row.latent), f"{row.activation:.3g}", *words)
        table.add_row(*(Text(cell) for cell in cells))
    results.print(table)
    show(f"{found.l0:.3g} latents are active on a token of this text")


def serve(
    reference: _OneSAE,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of this machine alone.")] = 8765,
    browser: _BrowserOption = None,
    model: _ModelOption = None,
    loader: _LoaderOption = "auto",
) -> None:
    """A local page: a text's latents, and what the model writes when one is turned up."""
    check_reference(reference)
    if find_spec("uvicorn") is None or find_spec("starlette") is None:
        raise InputError("msae serve needs starlette and uvicorn", "pip install msae-plugin[serve]")
    import_first("msae_plugin.reporting.look", "msae_plugin.reporting.serve")
    # As in import_first.
    from msae_plugin.common.progress import shown_steps
    from msae_plugin.reporting.look import open_sae
    from msae_plugin.reporting.serve import require_free, serve

    require_free(port)
    with shown_steps(progress()) as steps:
        opened = open_sae(reference, browser=browser, model=model, loader=loader, report=steps)
    show(f"page: http://127.0.0.1:{port} (Ctrl-C ends it)")
    serve(opened, port)
