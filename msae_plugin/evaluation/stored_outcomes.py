"""Outcomes kept on disk per evaluation and seed, so that a killed evaluation loses little."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import write_json_atomic
from msae_plugin.evaluation.outcomes import Outcome

FILE = "outcomes.json"


def read_outcomes(folder: Path, keys: Mapping[str, str]) -> dict[str, Outcome]:
    """What was measured before with the same key.

    Only measured outcomes are taken up: what failed may work now.

    Args:
        folder: Folder of an evaluation and seed.
        keys: By SAE, a digest of everything that its outcome depends on.

    Raises:
        InputError: The folder holds results of an SAE of this name under another key, which would
            be overwritten.
    """
    found: dict[str, Outcome] = {}
    for name, stored in _read(folder).items():
        if name not in keys or stored["status"] != "measured":
            continue
        if stored["key"] != keys[name]:
            raise InputError(
                f"{folder} holds results of {name!r} from other weights, settings or versions: "
                "give another --output"
            )
        file = folder / str(stored["file"])
        if file.is_file():
            found[name] = Outcome("measured", stored["metrics"], file, facts=stored["facts"])
    return found


def write_outcomes(folder: Path, keys: Mapping[str, str], outcomes: Mapping[str, Outcome]) -> None:
    """Add outcomes to those that the folder holds."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = _read(folder)
    for name, outcome in outcomes.items():
        everything[name] = {
            "key": keys[name],
            "status": outcome.status,
            "reason": outcome.reason,
            "file": None if outcome.file is None else outcome.file.name,
            "metrics": dict(outcome.metrics),
            "facts": dict(outcome.facts),
        }
    write_json_atomic(folder / FILE, everything)


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        return cast("dict[str, dict[str, Any]]", json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(
            f"{path} is not JSON ({error}): delete it or give another --output"
        ) from error
