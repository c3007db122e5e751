"""The command that finds the learning rate of every method of a comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from msae_cli.arguments import (
    OutputOption,
    QuickOption,
    RecipeOption,
    SetOption,
    check_config,
    check_output,
)
from msae_cli.terminal import continued_later, import_first, progress, results, say, show
from msae_plugin.common.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import RenderableType

    from msae_plugin.comparison.learning_rates import RateChoice


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
