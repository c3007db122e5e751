"""The part of an evaluation that belongs to one published SAE."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from msae_plugin.common.errors import InputError
from msae_plugin.evaluation.summary import FORMAT as SUMMARY_FORMAT
from msae_plugin.evaluation.summary import JSON_FILE as SUMMARY_FILENAME
from msae_plugin.saes.clean_config import clean_run_config
from msae_plugin.saes.local_sae import LocalSAE


@dataclass(frozen=True)
class Measured:
    """What was measured of one SAE.

    Args:
        summary: summary.json with this SAE's rows alone, without local paths.
        files: SAEBench's own JSON by its path relative to the summary, to be published unmodified.
    """

    summary: dict[str, Any]
    files: dict[str, Path]


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The summary of an evaluation folder.

    Raises:
        InputError: There is none that can be read.
    """
    path = folder / SUMMARY_FILENAME
    try:
        summary: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{str(folder)!r} is no evaluation: {SUMMARY_FILENAME} cannot be read ({error}); give "
            "the --output folder of `msae eval`"
        ) from error
    if not is_summary(summary):
        raise InputError(
            f"{str(path)!r} is not a summary of format {SUMMARY_FORMAT}: evaluate again with this "
            "version of msae_plugin"
        )
    return cast("dict[str, Any]", summary)


def is_summary(value: object) -> bool:
    """Whether a JSON value is a summary in the format that this version reads."""
    if not isinstance(value, dict):
        return False
    summary = cast("dict[str, object]", value)
    return (
        summary.get("format") == SUMMARY_FORMAT
        and isinstance(summary.get("saes"), dict)
        and isinstance(summary.get("results"), list)
        and isinstance(summary.get("metrics"), dict)
    )


def measured_of(
    sae: LocalSAE, summary: Mapping[str, Any], folder: Path, reference: str
) -> Measured:
    """Take what an evaluation says about one SAE.

    Args:
        sae: The SAE to publish.
        summary: From `read_evaluation`.
        folder: Where the evaluation is.
        reference: How the published SAE will be named, as in user/repo:folder.

    Raises:
        InputError: The evaluation measured other weights, or lacks a file that it lists.
    """
    saes = cast("Mapping[str, Mapping[str, Any]]", summary["saes"])
    own = {sae.weights_sha256: reference}
    if sae.twin_sha256 is not None:
        own[sae.twin_sha256] = f"{reference}/jumprelu"
    chosen = {name: entry for name, entry in saes.items() if entry.get("weights_sha256") in own}
    if not chosen:
        known = ", ".join(f"{n} {str(e.get('weights_sha256'))[:12]}" for n, e in saes.items())
        raise InputError(
            f"the evaluation {str(folder)!r} is of other weights: {str(sae.export)!r} has sha256 "
            f"{sae.weights_sha256[:12]}, the evaluation measured {known or 'no SAE'}; run "
            "`msae eval` on the SAE that is published"
        )
    rows = [
        row
        for row in cast("list[Mapping[str, Any]]", summary["results"])
        if row.get("sae") in chosen
    ]
    files = dict(_result_files(rows, folder))
    kept = {f"{row['evaluation']}/{metric}" for row in rows for metric in row.get("metrics") or {}}
    definitions = cast("Mapping[str, Any]", summary["metrics"])
    named = {
        name: {**clean_run_config(entry), "reference": own[entry["weights_sha256"]]}
        for name, entry in chosen.items()
    }
    cleaned = clean_run_config(summary)
    cleaned.update(
        saes=named,
        results=[clean_run_config(row) | {"files": list(row.get("files") or [])} for row in rows],
        metrics={name: value for name, value in definitions.items() if name in kept},
    )
    return Measured(cleaned, files)


def _result_files(rows: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[tuple[str, Path]]:
    for row in rows:
        for name in cast("list[str]", row.get("files") or []):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise InputError(f"{str(folder)!r}: its summary lists {name!r}, outside of it")
            if not (folder / path).is_file():
                raise InputError(
                    f"{str(folder)!r}: its summary lists {name!r}, which is missing; evaluate again"
                )
            yield name, folder / path
