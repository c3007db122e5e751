"""Rules of a run's folder: nothing overwritten silently, nothing resumed with another recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import TEMPORARY_PREFIX
from msae_plugin.saes.run_record import RUN_FILE, read_run_record
from msae_plugin.training.checkpoints import Checkpoint
from msae_plugin.training.recipe import RunConfig

_MAY_CHANGE = (
    "logging.",
    "model.device",
    "model.autocast",
    "training.n_checkpoints",
    "training.keep_checkpoints",
    "training.calibrate_batches",
    "training.store_batch_size_prompts",
)


def check_output(output: Path, resume: str | None) -> None:
    """Refuse a folder whose contents a run would overwrite.

    Args:
        output: The run's folder.
        resume: As given to the runner.

    Raises:
        InputError: If the folder is in use by something else, or holds a finished run.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {str(output)!r} is a file: give a folder")
    contents = [] if not output.exists() else [path.name for path in output.iterdir()]
    if not any(not name.startswith(TEMPORARY_PREFIX) for name in contents):
        return
    record = read_run_record(output)
    if resume is None:
        unfinished = record is not None and record.get("status") != "complete"
        hint = "continue its run with --resume auto, or " if unfinished else ""
        raise InputError(f"--output {str(output)!r} is not empty: {hint}choose another --output")
    if record is None and RUN_FILE not in contents:
        raise InputError(
            f"--output {str(output)!r} holds files but no run of msae train: "
            "choose another --output"
        )
    if record is not None and record.get("status") == "complete":
        raise InputError(
            f"the run in {str(output)!r} is complete: there is nothing to resume; choose another "
            "--output to train again"
        )


def check_same_run(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Refuse to continue a checkpoint with a recipe that would train something else.

    Raises:
        InputError: Naming the first field that differs and both values.
    """
    then = dict(_flatten(checkpoint.config))
    now = dict(_flatten(config.to_dict()))
    for key in sorted(then.keys() | now.keys()):
        if key.startswith(_MAY_CHANGE) or then.get(key) == now.get(key):
            continue
        raise InputError(
            f"cannot resume {str(checkpoint.path)!r} with another recipe: {key!r} was "
            f"{then.get(key)!r} and is now {now.get(key)!r}; change it back or start a new run"
        )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
