"""`msae train`, on one process or on several that torchrun starts, and `msae cache`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from msae_cli.arguments import (
    OnlyOption,
    OutputOption,
    RecipeOption,
    SetOption,
    check_config,
    check_output,
)
from msae_cli.terminal import (
    continued_later,
    import_first,
    other_rank,
    progress,
    results,
    say,
    show,
)
from msae_plugin.common.interruption import InterruptedBySignalError


def train(
    config: RecipeOption,
    output: OutputOption,
    set_: SetOption = None,
    only: OnlyOption = None,
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
    check_config(config, "train")
    check_output(output)
    import_first("msae_plugin.training.runner")
    # As in import_first.
    from msae_plugin import api
    from msae_plugin.training.recipe import RunConfig
    from msae_plugin.training.runner import is_complete

    recipe = RunConfig.load(config, set_ or [], only or [])
    if resume == "auto" and is_complete(output, recipe):
        if not other_rank():
            say(f"the run in {output} is complete: there is nothing to resume")
        return
    try:
        result = api.train(
            config, output, changes=set_ or [], only=only or [], resume=resume, progress=progress()
        )
    except InterruptedBySignalError as interruption:
        if not other_rank():
            saved = interruption.checkpoint
            if saved is None:
                say(f"{interruption} before the first step: nothing to save")
            else:
                say(f"{interruption}; everything so far is in {saved}")
            say(f"continue with: {resume_command(config, set_ or [], output, only or [])}")
        raise typer.Exit(interruption.exit_status) from interruption
    if not other_rank():
        _print_rows(result.rows)
        for note in result.notes:
            show(note)
        results.print(
            "expl. var. and dead: end of training. L0: the export, on real activations.\n"
            "export check: largest relative difference to the trained SAE. jumprelu: plain copy."
        )
        for name, folder in result.details.folders.items():
            show(f"{name}: {folder}")
        overall = result.details.tokens_per_second.get("overall")
        if overall is not None:
            results.print(f"{overall:,.0f} tokens per second, language model included")


def resume_command(
    config: str, overrides: Sequence[str], output: Path, only: Sequence[str] = ()
) -> str:
    """The command that continues a run, ready to paste into a shell (on every machine of it)."""
    words = ["msae", "train", "--config", config]
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        here = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
        words = ["torchrun", "--nproc-per-node", here, "-m", "msae_plugin", *words[1:]]
    for option, values in (("--set", overrides), ("--only", only)):
        for value in values:
            words += [option, value]
    words += ["--output", str(output), "--resume", "auto"]
    return shlex.join(words)


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    # As in train: heavy imports.
    from msae_plugin.common.table import Column, Table

    cells: list[list[str | float | None]] = [
        [
            row["sae"],
            f"{row['explained_variance']:.3f}",
            f"{row['dead_latents']:.0f}",
            f"{row['l0']:.1f}",
            "-" if row["l0_target"] is None else f"{row['l0_target']:g}",
            f"{row['export_difference']:.0e}",
            "yes" if row["jumprelu_export"] else "no",
        ]
        for row in rows
    ]
    headings = ("SAE", "expl. var.", "dead", "L0", "of k", "export check", "jumprelu")
    columns = [Column(heading, heading) for heading in headings]
    results.print(Table("exports", "", columns, cells).terminal())


def cache(config: RecipeOption, output: OutputOption, set_: SetOption = None) -> None:
    """Store the activations that a recipe trains on, for runs that repeat.

    The same command goes on where a killed pass stopped. Then: msae train --set
    cached_activations=DIR.
    """
    check_config(config, "train")
    check_output(output)
    import_first("msae_plugin.training.passes")
    # As in import_first.
    from msae_plugin.common.progress import training_display
    from msae_plugin.training.passes import make_cache
    from msae_plugin.training.recipe import RunConfig

    recipe = RunConfig.load(config, set_ or [])
    with continued_later(), training_display(progress()) as display:
        made = make_cache(recipe, output, progress=display)
    size = sum(rows.nbytes for rows in made.tensors.values())
    show(
        f"{made.rows:,} activations at {', '.join(made.tensors)} ({made.manifest['dtype']}, "
        f"{size / 2**30:.2f} GiB): {output}"
    )
    show(f"train with: msae train --config {config} --set cached_activations={output} ...")
