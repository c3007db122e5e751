"""The commands that take SAEs elsewhere, and bring them: the Hub, other tools, other libraries."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from msae_cli.arguments import check_folder, check_output, latent_indices
from msae_cli.terminal import import_first, progress, say, show


def _ask() -> Callable[[str], bool] | None:
    """Asks on a terminal; nobody is asked where there is none."""
    if not sys.stdin.isatty():
        return None
    return lambda question: typer.confirm(question, err=True)


def publish(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run, one SAE of it, or an export.")
    ],
    repo: Annotated[str, typer.Option("--repo", metavar="USER/NAME", help="Made when missing.")],
    sae_folder: Annotated[
        str | None,
        typer.Option(
            "--folder",
            metavar="PATH",
            help="Folder in the repository; MODEL/HOOK/WIDTH_l0-N_seedK by default.",
        ),
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Output of msae eval on these SAEs.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder whose figures/*.png go along.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Render everything locally, upload nothing.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where --dry-run renders to.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to commit to; made when missing.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Name for the commit, once checked.")] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead.")] = False,
    licence: Annotated[
        str | None,
        typer.Option("--licence", "--license", help="The repository's, or mit, by default."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that exists without asking.")
    ] = False,
    allow_negative_variance: Annotated[
        bool,
        typer.Option(
            "--allow-negative-variance",
            help="Publish an SAE that reconstructs worse than the mean activation.",
        ),
    ] = False,
) -> None:
    """Publish SAEs on the Hugging Face Hub in one commit, and check what others will get."""
    check_folder(folder)
    if output is not None:
        check_output(output)
    import_first("msae_plugin.hub.publish")
    # As in import_first.
    from msae_plugin import api
    from msae_plugin.hub.publish import report_lines

    result = api.publish(
        folder,
        repo,
        dry_run=dry_run,
        evaluation=evaluation,
        confirm=_ask(),
        progress=say,
        report=report,
        output=output,
        private=private,
        revision=revision,
        tag=tag,
        pr=pr,
        licence=licence,
        overwrite=overwrite,
        allow_negative_variance=allow_negative_variance,
        **({} if sae_folder is None else {"folder": sae_folder}),
    )
    for line in report_lines(result.details):
        show(line)


def download(
    reference: Annotated[
        str, typer.Argument(metavar="USER/REPO[@REVISION][:FOLDER]", help="What to fetch.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or empty folder.")],
) -> None:
    """Fetch an SAE, or a whole repository, from the Hugging Face Hub."""
    check_output(output)
    import_first("msae_plugin.saes.download")
    from msae_plugin.saes.download import download as download_reference

    show(str(download_reference(reference, output)))


_NewFolder = Annotated[Path, typer.Option("--output", "-o", help="A new or empty folder.")]


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run, one SAE of it, or an export.")],
    to: Annotated[str, typer.Option(help="neuronpedia, lm-eval, sae-dashboard or delphi.")],
    output: _NewFolder,
    repo: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Where the SAEs are published.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For neuronpedia: output of msae eval.")
    ] = None,
    latents: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="For lm-eval: which to steer with.")
    ] = None,
    coefficient: Annotated[
        float, typer.Option(help="For lm-eval: how far along the latent's unit direction.")
    ] = 10.0,
    text: Annotated[
        str | None, typer.Option(help="Text in place of the run's, as data.source in a recipe.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text that are read.")] = 256,
) -> None:
    """Write files of SAEs for another tool."""
    check_folder(run)
    check_output(output)
    chosen = latent_indices(latents)
    import_first("msae_plugin.hub.formats")
    from msae_plugin.common.progress import shown_steps
    from msae_plugin.hub.formats import ExportRequest, export_for

    with shown_steps(progress()) as tell:
        request = ExportRequest(run, repo, evaluation, chosen, coefficient, text, windows, tell)
        steps = export_for(to, request, output)
    show(f"{output}: in this folder,")
    for step in steps:
        show(f"  {step}")


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="PATH", help="sparsify, dictionary_learning, .npz or .pt.")
    ],
    output: _NewFolder,
    model: Annotated[
        str | None, typer.Option(help="Language model, where the files do not say.")
    ] = None,
    hook: Annotated[
        str | None, typer.Option(help="Hook, where the files do not say: blocks.9.hook_resid_post.")
    ] = None,
) -> None:
    """Make an ordinary SAELens folder of an SAE of another library."""
    check_output(output)
    import_first("msae_plugin.saes.other_formats")
    from msae_plugin.saes.other_formats import import_sae

    found = import_sae(source, output, model=model, hook=hook)
    show(f"{output}: an SAE of {found.name}, as SAELens has it; msae info {output} describes it")
