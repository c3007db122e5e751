"""`msae train`, on one process or on several that torchrun starts."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msae_cli.arguments import OutputOption, RecipeOption, SetOption, check_config, check_output
from msae_cli.terminal import errors, other_rank, results, say, show

if TYPE_CHECKING:
    from msae_plugin.training.runner import RunResult


def train(
    config: RecipeOption,
    output: OutputOption,
    set_: SetOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|auto",
            help="Continue from a checkpoint; auto takes the newest complete one in the output "
            "folder and starts a new run when there is none.",
        ),
    ] = None,
) -> None:
    """Train the SAEs of a recipe on a language model's activations and export them."""
    check_config(config)
    check_output(output)
    # Imported here: SAELens and torch take ten seconds to import, `msae --help` must not.
    from msae_plugin.common.interruption import InterruptedBySignalError
    from msae_plugin.common.progress import ConsoleProgress
    from msae_plugin.training.data_parallel import launched_ranks
    from msae_plugin.training.recipe import RunConfig
    from msae_plugin.training.runner import MultiScaleRunner, is_complete

    overrides = set_ or []
    recipe = RunConfig.load(config, overrides)
    if resume == "auto" and is_complete(output, recipe):
        if not other_rank():
            say(f"the run in {output} is complete: there is nothing to resume")
        return
    with launched_ranks(recipe.model.device) as ranks:
        runner = MultiScaleRunner(
            recipe, output, resume=resume, progress=ConsoleProgress(errors), ranks=ranks
        )
        try:
            result = runner.run()
        except InterruptedBySignalError as interruption:
            if not other_rank():
                saved = interruption.checkpoint
                if saved is None:
                    say(f"{interruption} before the first step: nothing to save")
                else:
                    say(f"{interruption}; everything so far is in {saved}")
                say(f"continue with: {resume_command(config, overrides, output, ranks.count)}")
            raise typer.Exit(interruption.exit_status) from interruption
    if not other_rank():
        _print_result(result)


def resume_command(config: Path, overrides: list[str], output: Path, processes: int = 1) -> str:
    """The command that continues a run, ready to paste into a shell (on every machine of it)."""
    words = ["msae", "train", "--config", str(config)]
    if processes > 1:
        here = os.environ.get("LOCAL_WORLD_SIZE", str(processes))
        words = ["torchrun", "--nproc-per-node", here, "-m", "msae_plugin", *words[1:]]
    for change in overrides:
        words += ["--set", change]
    words += ["--output", str(output), "--resume", "auto"]
    return shlex.join(words)


def _print_result(result: RunResult) -> None:
    # As in train: heavy imports.
    from msae_plugin.common.table import Column, Table

    rows: list[list[str | float | None]] = []
    for name, export in result.exports.items():
        final, agreement = result.final_rows[name], export.agreement
        worst = max(agreement.max_latent_difference, agreement.max_reconstruction_difference)
        rows.append(
            [
                name,
                f"{final['explained_variance']:.3f}",
                f"{final['dead_latents']:.0f}",
                f"{export.l0_exported:.1f}",
                "-" if export.l0_target is None else f"{export.l0_target:g}",
                f"{worst:.0e}",
                "yes" if export.has_twin else "no",
            ]
        )
    headings = ("SAE", "expl. var.", "dead", "L0", "of k", "export check", "twin")
    columns = [Column(heading, heading) for heading in headings]
    results.print(Table("exports", "", columns, rows).terminal())
    for name, export in result.exports.items():
        for warning in export.warnings:
            show(f"warning: {name}: {warning}")
    results.print(
        "expl. var. and dead: end of training. L0: the export, on real activations.\n"
        "export check: largest relative difference to the trained SAE. twin: jumprelu copy."
    )
    for name, folder in result.folders.items():
        show(f"{name}: {folder}")
    overall = result.tokens_per_second.get("overall")
    if overall is not None:
        results.print(f"{overall:,.0f} tokens per second, language model included")
