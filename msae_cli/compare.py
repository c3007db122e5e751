"""The commands that train many SAEs side by side: a comparison, its learning rates, its jobs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from msae_cli.show import show_files
from msae_cli.terminal import Terminal, continued_later, import_first, progress, results, say, show
from msae_plugin.common.errors import InputError, RunFailure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import RenderableType

    from msae_plugin.comparison.learning_rates import RateChoice

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
    # A file has no width that a table would have to fit.
    printer = results if results.is_terminal else Terminal(width=_FILE_WIDTH, highlight=False)
    printer.print(comparison_for_terminal(output))
    show(f"comparison: {output / 'comparison.json'}")
    if page:
        try:
            show_files(api.report([output], output / REPORT_FOLDER, progress=progress()))
        except InputError as error:
            # Without matplotlib, say: what was measured is there all the same.
            say(f"no page was made: {error}")
    if not comparison.complete:
        raise RunFailure("not everything was trained and measured: see the lines above")


def tune(
    config: RecipeOption,
    output: OutputOption,
    rates: Annotated[
        str, typer.Option(metavar="LR,LR,...", help="Learning rates that every method is tried at.")
    ] = "2e-3,4e-3,8e-3",
    l0: Annotated[
        float | None, typer.Option("--l0", help="Target L0; the recipe's middle one by default.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="None that the recipe reports; 100 above them by default.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="What is highest at the best rate, as in comparison.json; of several the mean. "
            "Explained variance by default, on ground truth F1 and MCC.",
            show_default=False,
        ),
    ] = None,
    extend: Annotated[
        int,
        typer.Option(
            min=0, help="How often twice or half a rate is tried where the best lies at an end."
        ),
    ] = 3,
    only: Annotated[
        list[str] | None, typer.Option(help="Methods by name; all by default.", show_default=False)
    ] = None,
    set_: SetOption = None,
    quick: QuickOption = False,
) -> None:
    """Find each method's learning rate, on a seed of its own, and write the recipe with them.

    OUTPUT/tuned.yaml is the recipe for msae compare, with the same --set and --quick. The same
    command goes on where a killed one stopped.
    """
    check_config(config, "compare")
    check_output(output)
    tried = _rates(rates)
    import_first("msae_plugin.comparison.compare")
    # As in import_first.
    from msae_plugin.common.claims import claimed_output
    from msae_plugin.common.files import write_json_atomic, write_text_atomic
    from msae_plugin.common.progress import shown_steps
    from msae_plugin.common.recipes import find_recipe, read_recipe
    from msae_plugin.comparison.compare import compare
    from msae_plugin.comparison.learning_rates import (
        RATES_FILE,
        TUNED_FILE,
        TuningPlan,
        rates_contents,
        with_rates,
    )
    from msae_plugin.comparison.learning_rates import tune as find_rates
    from msae_plugin.comparison.recipe import CompareConfig

    recipe = CompareConfig.load(config, set_ or [], quick=quick)
    plan = TuningPlan.of(
        recipe, tried, l0=l0, seed=seed, metrics=metric or (), extend=extend, methods=only
    )
    # A share of its own: between its comparisons nobody else takes the folder.
    with continued_later(), shown_steps(progress()) as report, claimed_output(output, "tune"):
        choices = find_rates(recipe, plan, lambda trials: compare(trials, output, report=report))
    write_json_atomic(output / RATES_FILE, rates_contents(plan, choices))
    file = find_recipe(config, "compare")
    tuned = with_rates(read_recipe(file, "compare"), choices)
    beside = file.resolve().parent / str(tuned.get("evaluation"))
    if isinstance(tuned.get("evaluation"), str) and beside.is_file():
        tuned["evaluation"] = str(beside)
    head = f"# {file.name} with the rates of {RATES_FILE}, by msae tune.\n"
    write_text_atomic(output / TUNED_FILE, head + yaml.safe_dump(tuned, sort_keys=False))
    results.print(_table(choices))
    for name, choice in choices.items():
        if choice.lr is None:
            say(f"{name}: no SAE of it could be trained; its rate is as it was")
        elif choice.at_end:
            say(f"{name}: the best rate is the last one that was tried; give more --extend")
    show(f"recipe: {output / TUNED_FILE}")


def _rates(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--rates {text!r}: give numbers, as in 2e-3,4e-3,8e-3") from error


def _table(choices: Mapping[str, RateChoice]) -> RenderableType:
    # As in tune: heavy imports.
    from msae_plugin.common.table import Column, Table

    rows: list[list[str | float | None]] = []
    for name, choice in choices.items():
        scores = [
            f"{rate:g}: {'failed' if score is None else f'{score:.4f}'}"
            + (" (L0 missed)" if rate in choice.missed else "")
            for rate, score in choice.tried.items()
        ]
        best = "-" if choice.lr is None else f"{choice.lr:g}"
        rows.append([name, best, "   ".join(scores)])
    columns = [
        Column("method", "method"),
        Column("lr", "best lr", is_number=True),
        Column("scores", "score by lr"),
    ]
    return Table("rates", "", columns, rows).terminal()


class Executor(str, Enum):
    """Kinds of workers."""

    local = "local"
    slurm = "slurm"


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
