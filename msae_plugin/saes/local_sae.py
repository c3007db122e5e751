"""The SAEs of a run as they are on disk, refused where they must not be published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from safetensors import SafetensorError, safe_open

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import file_sha256
from msae_plugin.saes.describe import is_checkpoint, read_checkpoint
from msae_plugin.saes.export import REPORT_FILENAME, SAE_FOLDER, TWIN_FOLDER
from msae_plugin.saes.run_record import METRICS_FILE, RUN_FILE, read_rows, read_run_record


@dataclass(frozen=True)
class LocalSAE:
    """One exported SAE of a run.

    Args:
        name: Its name in the run.
        root: Folder with its metrics and figures.
        export: Folder with the inference export.
        twin: Folder of the `jumprelu` twin, where there is one.
        config: Contents of cfg.json.
        weights_sha256: Hash of sae_weights.safetensors.
        twin_sha256: The same of the twin.
        report: Contents of the run's export.json, None for an export of another host.
    """

    name: str
    root: Path
    export: Path
    twin: Path | None
    config: dict[str, Any]
    weights_sha256: str
    twin_sha256: str | None
    report: dict[str, Any] | None

    @property
    def metadata(self) -> dict[str, Any]:
        """SAELens' metadata: model, hook, steps and so on."""
        return cast("dict[str, Any]", self.config.get("metadata") or {})

    @property
    def l0(self) -> float | None:
        """Active latents per token: measured at export, else what the metadata records."""
        recorded = self.metadata.get("l0") if self.report is None else self.report["l0_exported"]
        return None if recorded is None else float(recorded)

    @property
    def explained_variance(self) -> float | None:
        """At export, else at the end of the training log; None where neither says."""
        recorded = (self.report or {}).get("explained_variance")
        if recorded is None and (rows := read_rows(self.root / METRICS_FILE)):
            recorded = rows[-1].get("explained_variance")
        return None if recorded is None else float(recorded)


def find_saes(run: Path) -> list[LocalSAE]:
    """The SAEs that a folder holds.

    Args:
        run: A run folder, the folder of one of its SAEs, or an export.

    Raises:
        InputError: There is none, or one that must not be published: a training checkpoint, an
            export that was not finished, an SAE without training or with NaN weights.
    """
    if not run.is_dir():
        raise InputError(f"{str(run)!r} is not a folder: give a run or an export")
    return [_read(name, root, export) for name, root, export in _locate(run)]


def _locate(run: Path) -> list[tuple[str, Path, Path]]:
    """(name, root, export) of each SAE."""
    if is_checkpoint(run):
        in_run = run.name == SAE_FOLDER and (run.parent / REPORT_FILENAME).is_file()
        root = run.parent if in_run else run
        return [(root.resolve().name, root, run)]
    if is_checkpoint(run / SAE_FOLDER):
        return [(run.resolve().name, run, run / SAE_FOLDER)]
    record = read_run_record(run)
    if record is None:
        raise InputError(
            f"{str(run)!r} holds no exported SAE: expected {SAE_FOLDER}/ as `msae train` writes "
            f"it, or {SAE_CFG_FILENAME} and {SAE_WEIGHTS_FILENAME}"
        )
    saes = cast("Mapping[str, Mapping[str, Any]]", record.get("saes") or {})
    located = [(name, run / str(sae["folder"])) for name, sae in saes.items()]
    missing = [name for name, root in located if not (root / REPORT_FILENAME).is_file()]
    if missing or not located:
        raise InputError(
            f"the run {str(run)!r} is {record.get('status', 'not finished')} and has not exported "
            f"{', '.join(missing) or 'any SAE'}: finish it with --resume auto, or publish the "
            "folder of one SAE"
        )
    return [(name, root, root / SAE_FOLDER) for name, root in located]


def _read(name: str, root: Path, export: Path) -> LocalSAE:
    info = read_checkpoint(export)
    if info.kind == "training checkpoint":
        raise InputError(
            f"{str(export)!r} is a training checkpoint, which nobody else can use: publish the "
            f"export of its run ({SAE_FOLDER}/, written when training ends; `msae train ... "
            "--resume auto` gets there)"
        )
    has_record = (root / RUN_FILE).is_file() or (root.parent / RUN_FILE).is_file()
    if has_record and root != export and not (root / REPORT_FILENAME).is_file():
        raise InputError(
            f"the export in {str(export)!r} was not finished ({REPORT_FILENAME} is missing): run "
            "`msae train ... --resume auto`"
        )
    if info.metadata.get("training_steps") == 0:
        raise InputError(f"{str(export)!r} was never trained (0 steps): train it, then publish")
    _require_finite(export / SAE_WEIGHTS_FILENAME)
    twin = root / TWIN_FOLDER
    if not is_checkpoint(twin) or export == twin:
        twin = None
    else:
        _require_finite(twin / SAE_WEIGHTS_FILENAME)
    report = root / REPORT_FILENAME
    return LocalSAE(
        name=name,
        root=root,
        export=export,
        twin=twin,
        config=_read_json(export / SAE_CFG_FILENAME),
        weights_sha256=file_sha256(export / SAE_WEIGHTS_FILENAME),
        twin_sha256=None if twin is None else file_sha256(twin / SAE_WEIGHTS_FILENAME),
        report=_read_json(report) if report.is_file() else None,
    )


def _require_finite(weights: Path) -> None:
    try:
        with safe_open(weights, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                tensor = cast("torch.Tensor", tensors.get_tensor(name))
                # An infinite threshold switches a latent off and is no fault.
                usable = ~tensor.isnan() if name == "threshold" else tensor.isfinite()
                if tensor.is_floating_point() and not usable.all():
                    raise InputError(
                        f"{str(weights)!r}: {name} holds NaN or infinite values: training "
                        "diverged, so there is nothing to publish; train again with a lower rate"
                    )
    except (OSError, SafetensorError) as error:
        raise InputError(f"{str(weights)!r} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error
