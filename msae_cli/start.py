"""The commands to begin with: recipes by name, what a run will cost, the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from msae_cli.arguments import SetOption, check_config, check_folder, check_output
from msae_cli.terminal import continued_later, import_first, progress, results, say, show
from msae_plugin.common.errors import InputError, RunFailure

USES = {"train": "msae train, cache", "compare": "msae compare, tune, sweep", "eval": "msae eval"}


def recipes(
    schema: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", help="Print the JSON schema of train, compare or eval recipes."
        ),
    ] = None,
) -> None:
    """List the recipes that come with the package, by the command that takes them."""
    if schema is not None:
        typer.echo(_schema_file(schema).read_text(encoding="utf-8"), nl=False)
        return
    # Imported here: pydantic, which `msae --help` does without.
    from msae_plugin.common.recipes import headline, shipped_recipes

    for command, uses in USES.items():
        found = shipped_recipes(command)
        show(f"{uses}:")
        width = max(map(len, found))
        for name, file in found.items():
            line = f"  {name:<{width}}  {headline(file)}"
            if results.is_terminal:
                results.print(Text(line), no_wrap=True, overflow="ellipsis")
            else:
                show(line)
    show("Take one by its name, --config smollm2, or msae init NAME writes it here to edit.")


def _schema_file(command: str) -> Path:
    # As in recipes.
    from msae_plugin.common.recipes import SHIPPED

    if command not in USES:
        raise InputError(f"--schema {command!r}: known are {', '.join(USES)}")
    return SHIPPED / "schemas" / f"{command}.json"


def init(
    name: Annotated[str, typer.Argument(help="A shipped recipe: msae recipes lists them.")],
    path: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Where; NAME.yaml by default.", show_default=False),
    ] = None,
) -> None:
    """Write a shipped recipe into a file, to edit."""
    # As in recipes.
    from msae_plugin.common.recipes import command_of, did_you_mean, read_yaml, shipped_recipes

    known = {n: file for command in USES for n, file in shipped_recipes(command).items()}
    if name not in known:
        raise InputError(f"there is no recipe {name!r}; {did_you_mean(name, known)}")
    command = command_of(read_yaml(known[name])) or "train"
    target = path or Path(f"{name}.yaml")
    if target.is_dir():
        target /= f"{name}.yaml"
    try:
        with target.open("x", encoding="utf-8") as file:
            # Editors with YAML's language server complete and check by it, offline.
            file.write(f"# yaml-language-server: $schema={_schema_file(command).as_posix()}\n")
            file.write(known[name].read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise InputError(f"{target} exists: give another file behind the name") from error
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error
    saes = " SAE" if command == "eval" else ""
    show(f"{target}: edit it, then msae {command}{saes} --config {target} --output runs/{name}")


def info(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="A run, an export or a checkpoint.", show_default=False),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config", "-c", metavar="NAME|FILE", help="A recipe: what would its run cost?"
        ),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Say what a checkpoint is, or what a run will cost in memory and tokens."""
    if (folder is None) == (config is None):
        raise InputError("give either a folder or --config: msae info DIR, msae info --config FILE")
    if folder is not None:
        if set_:
            raise InputError("--set changes a recipe and needs --config")
        check_folder(folder)
    elif config is not None:
        check_config(config, "train")
    import_first("msae_plugin.reporting.info")
    from msae_plugin.common.recipes import find_recipe
    from msae_plugin.reporting.info import describe_config, describe_folder

    if folder is not None:
        results.print(describe_folder(folder))
    elif config is not None:
        results.print(describe_config(find_recipe(config, "train"), set_ or []))


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the run, the report and the figure.")
    ],
    tokens: Annotated[int | None, typer.Option(help="Training tokens.")] = None,
    d_sae: Annotated[int | None, typer.Option(help="Latents of each SAE.")] = None,
    k: Annotated[float | None, typer.Option(help="Active latents per token.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything.")] = None,
    model: Annotated[str | None, typer.Option(help="Language model, as in a recipe.")] = None,
    text: Annotated[str | None, typer.Option(help="Text, as data.source in a recipe.")] = None,
    hook: Annotated[str | None, typer.Option(help="Where the activations are read.")] = None,
    heldout_tokens: Annotated[int | None, typer.Option(help="Tokens to evaluate on.")] = None,
    loss_tokens: Annotated[
        int | None, typer.Option(help="How many of them the losses are measured on.")
    ] = None,
    saebench: Annotated[bool, typer.Option(help="End with SAEBench's core and sae-probes.")] = True,
    set_: SetOption = None,
) -> None:
    """Train multiscale beside batchtopk on a packaged language model and show what came out."""
    check_output(output)
    import_first("msae_plugin.demo")
    from msae_plugin.common.progress import shown_steps
    from msae_plugin.demo import (
        HOW_TO_INSTALL,
        demo_for_terminal,
        demo_recipe,
        run_demo,
        saebench_is_installed,
    )

    given: dict[str, Any] = {
        "tokens": tokens,
        "d_sae": d_sae,
        "k": k,
        "seed": seed,
        "model": model,
        "text": text,
        "hook": hook,
        "heldout_tokens": heldout_tokens,
        "loss_tokens": loss_tokens,
    }
    options = {key: value for key, value in given.items() if value is not None}
    if saebench and not saebench_is_installed():
        say(f"SAEBench's evaluations are left out: {HOW_TO_INSTALL}")
        saebench = False
    recipe = demo_recipe(options, set_ or [], saebench=saebench)
    with continued_later(), shown_steps(progress()) as report:
        result = run_demo(recipe, output, report)
    results.print(demo_for_terminal(result))
    if not result.complete:
        raise RunFailure("not everything was trained and measured: see the lines above")
