"""The commands for repeated and for many runs: activations kept on the disk, jobs on a cluster."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from msae_cli.arguments import (
    OnlyOption,
    OutputOption,
    QuickOption,
    RecipeOption,
    SetOption,
    SkipMissingOption,
    check_config,
    check_output,
)
from msae_cli.terminal import continued_later, import_first, progress, show
from msae_plugin.common.errors import InputError


class Executor(str, Enum):
    """Kinds of workers."""

    local = "local"
    slurm = "slurm"


def cache(config: RecipeOption, output: OutputOption, set_: SetOption = None) -> None:
    """Store the activations that a recipe trains on, for runs that repeat.

    The same command goes on where a killed pass stopped. Then: msae train --set
    cached_activations=DIR.
    """
    check_config(config, "train")
    check_output(output)
    import_first("msae_plugin.training.cached_activations")
    # As in import_first.
    from msae_plugin.common.progress import training_display
    from msae_plugin.training.cached_activations import make_cache
    from msae_plugin.training.recipe import RunConfig

    recipe = RunConfig.load(config, set_ or [])
    with continued_later():
        made = make_cache(recipe, output, progress=training_display(progress()))
    size = sum(tensor.numel() * tensor.element_size() for tensor in made.tensors.values())
    show(
        f"{made.rows:,} activations at {', '.join(made.tensors)} ({made.manifest['dtype']}, "
        f"{size / 2**30:.2f} GiB): {output}"
    )
    show(f"train with: msae train --config {config} --set cached_activations={output} ...")


def sweep(
    config: RecipeOption,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the results, seen by all jobs.")
    ],
    set_: SetOption = None,
    only: OnlyOption = None,
    quick: QuickOption = False,
    executor: Annotated[
        Executor, typer.Option(help="Processes of this machine, or jobs of a Slurm cluster.")
    ] = Executor.local,
    jobs: Annotated[int, typer.Option(help="In how many parts the training is shared.")] = 2,
    job: Annotated[
        list[str] | None,
        typer.Option(
            "--job",
            metavar="KEY=VALUE",
            help="A parameter of submitit: timeout_min, gpus_per_node, slurm_partition, ...",
        ),
    ] = None,
    skip_missing: SkipMissingOption = False,
) -> None:
    """Run a comparison as jobs of a cluster (submitit), and wait for them.

    The same command goes on where a failed or killed sweep stopped.
    """
    check_config(config, "compare")
    check_output(output)
    parameters = dict(_parameter(text) for text in job or [])
    import_first("msae_plugin.comparison.sweep")
    # As in import_first.
    from msae_plugin.common.progress import shown_steps
    from msae_plugin.comparison.recipe import CompareConfig
    from msae_plugin.comparison.sweep import sweep as run_sweep

    recipe = CompareConfig.load(config, set_ or [], quick=quick, only=only or [])
    advice = "the jobs are cancelled, the same command continues from here"
    with continued_later(advice), shown_steps(progress()) as report:
        run_sweep(
            recipe,
            output,
            executor=executor.value,
            jobs=jobs,
            parameters=parameters,
            skip_missing=skip_missing,
            report=report,
        )
    show(f"comparison: {output / 'comparison.json'}")
    show(f"page: msae report {output} --output {output / 'report'}")


def _parameter(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InputError(f"--job {text!r} is not of the form KEY=VALUE")
    return key, yaml.safe_load(value)
