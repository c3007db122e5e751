"""`msae eval`, and the command lines of SAEBench and SAELens with `multiscale` registered."""

from __future__ import annotations

import runpy
import sys
import warnings
from typing import Annotated

import typer
from rich.text import Text

from msae_cli.arguments import (
    OutputOption,
    SkipMissingOption,
    check_config,
    check_output,
    check_reference,
)
from msae_cli.terminal import import_first, progress, results
from msae_plugin.common.errors import RunFailure


def evaluate(
    references: Annotated[
        list[str],
        typer.Argument(
            metavar="SAE...",
            help="Run folder, export, its jumprelu copy, any SAELens checkpoint folder, "
            "user/repo:folder, or release:sae_id.",
            show_default=False,
        ),
    ],
    config: Annotated[
        str,
        typer.Option(
            "--config", "-c", metavar="NAME|FILE", help="Protocol: a shipped one, or a YAML file."
        ),
    ],
    output: OutputOption,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds in place of the protocol's: --seeds 0,1,2.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the protocol.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Language model in place of the checkpoint's.")
    ] = None,
    hook: Annotated[str | None, typer.Option(help="Hook in place of the checkpoint's.")] = None,
    skip_missing: SkipMissingOption = False,
) -> None:
    """Evaluate SAEs with SAEBench: core, sparse probing, sae-probes, unlearning and others."""
    check_config(config, "eval")
    check_output(output)
    for reference in references:
        check_reference(reference)
    import_first("msae_plugin.evaluation.evaluate")
    # As in import_first.
    from msae_plugin import api
    from msae_plugin.reporting.terminal import summary_for_terminal

    changes = list(set_ or [])
    if seeds is not None:
        changes.append(f"seeds=[{seeds.replace(' ', ',')}]")
    if model is not None:
        changes.append(f"model.name={model}")
    if hook is not None:
        changes.append(f"hook={hook}")
    result = api.evaluate(
        references, config, output, changes=changes, skip_missing=skip_missing, progress=progress()
    ).details
    results.print(summary_for_terminal(result.summary))
    results.print(Text(f"summary: {output / 'summary.json'}, {output / 'summary.csv'}"))
    if not any(entry["status"] == "measured" for entry in result.summary["results"]):
        raise RunFailure("nothing was measured: see the lines above")
    if not result.complete:
        raise RunFailure("not everything was measured: see the lines above")


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
    import_first("msae_plugin.evaluation.saebench.command")
    from msae_plugin.evaluation.saebench.command import run_saebench_script

    run_saebench_script(evaluation, context.args)


def saelens_script(context: typer.Context) -> None:
    """Run SAELens' own command line with `multiscale` registered.

    All words are SAELens': `msae saelens --architecture multiscale -k 32 ...`
    """
    import_first("sae_lens", "msae_plugin.registration")
    sys.argv = ["msae saelens", *context.args]
    with warnings.catch_warnings():
        # SAELens imports the module that is run as a script here.
        warnings.simplefilter("ignore", RuntimeWarning)
        runpy.run_module("sae_lens.llm_sae_training_runner", run_name="__main__", alter_sys=True)
