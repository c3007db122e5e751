"""Options that several commands share, and checks that need neither SAELens nor torch.

What the checks let through is checked again, in full, by the command itself.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

from msae_plugin.common.claims import folders_to_make
from msae_plugin.common.errors import InputError

RecipeOption = Annotated[
    str,
    typer.Option(
        "--config", "-c", metavar="NAME|FILE", help="Recipe: a shipped one (msae recipes) or YAML."
    ),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="NAME", help="Of the recipe's SAEs this one; may be repeated."),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: --set training.lr=1e-3."),
]
QuickOption = Annotated[bool, typer.Option("--quick", help="The recipe's own short variant.")]
SkipMissingOption = Annotated[
    bool, typer.Option("--skip-missing", help="Leave out what lacks data, keys or packages.")
]


def check_config(config: str, command: str) -> None:
    """Refuse a recipe that is not there, cannot be read, or is for another command."""
    # Imported here: pydantic, which `msae --help` does without.
    from msae_plugin.common.recipes import find_recipe, read_recipe

    path = Path(config).expanduser()
    try:
        find_recipe(config, command)
    except InputError as error:
        if path.exists() or len(path.parts) == 1:
            raise
        raise InputError(f"recipe {config!r} does not exist: {_nearby(path)}") from error
    read_recipe(config, command)


def check_folder(folder: Path) -> None:
    """Refuse what is no folder."""
    path = folder.expanduser()
    if path.is_file():
        raise InputError(f"{str(folder)!r} is a file: give the folder it is in")
    if not path.exists():
        raise InputError(f"{str(folder)!r} does not exist: {_nearby(path)}")


def check_reference(reference: str) -> None:
    """Refuse a reference to an SAE that begins like a path where there is nothing.

    `a/b`, `user/repo:folder` and `release:sae_id` may be on the hub: they are not judged here.
    """
    if reference.startswith(("/", "./", "../", "~")) and ":" not in reference:
        check_folder(Path(reference))


def check_output(output: Path) -> None:
    """Refuse a file where a folder for results is asked for, and where nothing can be written."""
    place = output.expanduser()
    if place.is_file():
        raise InputError(f"--output {output} is a file: give a folder")
    missing = folders_to_make(place.absolute())
    place = missing[-1].parent if missing else place
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"--output {output}: cannot write in {place}")


def latent_indices(text: str | None) -> tuple[int, ...]:
    """`3,17` as numbers; none for None."""
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    for part in parts:
        if not part.isdecimal():
            raise InputError(f"--latents {text!r}: give numbers of latents, as in 3,17,40")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _nearby(path: Path) -> str:
    """Contents of the nearest existing parent folder, or the closest name in it."""
    missing, above = path.absolute().name, path.absolute().parent
    while not above.is_dir():
        missing, above = above.name, above.parent
    names = sorted(child.name for child in above.iterdir() if not child.name.startswith("."))
    near = get_close_matches(missing, names, n=1)
    if near:
        return f"did you mean {above / near[0]}?"
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{above} holds {shown}" if names else f"{above} is empty"
