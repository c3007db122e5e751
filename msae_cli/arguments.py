"""Options that several commands share, and checks that do not import `msae_plugin`.

What the checks let through is checked again, in full, by the command itself.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

RecipeOption = Annotated[
    Path, typer.Option("--config", "-c", help="Recipe, a YAML file; see examples/.")
]
ComparisonOption = Annotated[
    Path, typer.Option("--config", "-c", help="Recipe; see examples/compare_*.yaml.")
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


class ArgumentMistake(ValueError):
    """An argument that cannot work: exit status 2, as `msae_plugin.common.errors.InputError`."""


def check_config(config: Path) -> None:
    """Refuse a config that is a path to nothing; a bare name may be one of the shipped ones.

    Raises:
        ArgumentMistake: It is a folder, or a path with folders in it and there is no such file.
    """
    path = config.expanduser()
    if path.is_dir():
        raise ArgumentMistake(f"config {str(config)!r} is a folder: give a YAML file")
    if not path.exists() and len(path.parts) > 1:
        raise ArgumentMistake(f"config {str(config)!r} does not exist: {_nearby(path)}")


def check_folder(folder: Path) -> None:
    """Refuse what is no folder.

    Raises:
        ArgumentMistake: There is nothing at this path, or a file.
    """
    path = folder.expanduser()
    if path.is_file():
        raise ArgumentMistake(f"{str(folder)!r} is a file: give the folder it is in")
    if not path.exists():
        raise ArgumentMistake(f"{str(folder)!r} does not exist: {_nearby(path)}")


def check_reference(reference: str) -> None:
    """Refuse a reference to an SAE that can only be a path, and to nothing.

    `a/b`, `user/repo:folder` and `release:sae_id` may be on the hub: they are not judged here.

    Raises:
        ArgumentMistake: It begins like a path and there is nothing.
    """
    if reference.startswith(("/", "./", "../", "~")) and ":" not in reference:
        check_folder(Path(reference))


def check_output(output: Path) -> None:
    """Refuse a file where a folder for results is asked for.

    Raises:
        ArgumentMistake: It is a file.
    """
    if output.expanduser().is_file():
        raise ArgumentMistake(f"--output {output} is a file: give a folder")


def latent_indices(text: str | None) -> tuple[int, ...]:
    """`3,17` as numbers; none for None.

    Raises:
        ArgumentMistake: Something in it is no number of a latent.
    """
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    for part in parts:
        if not part.isdecimal():
            raise ArgumentMistake(f"--latents {text!r}: give numbers of latents, as in 3,17,40")
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
