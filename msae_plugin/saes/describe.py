"""Contents of a folder: an export, a jumprelu twin, a training checkpoint or a whole run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME
from safetensors import SafetensorError, safe_open

from msae_plugin.architecture.config import ARCHITECTURE, mechanisms_off
from msae_plugin.common.errors import InputError
from msae_plugin.common.files import read_json_object
from msae_plugin.saes.export import REPORT_FILENAME, SAE_FOLDER
from msae_plugin.saes.run_record import RUN_FILE, read_run_record, sae_roots

Kind = Literal["export", "jumprelu twin", "training checkpoint"]

# What the fields behind a mechanism are called in docs/method.md.
_LETTERS = {
    "sparsity_scales": "S",
    "prefix_fractions": "S",
    "k_initial_multiplier": "S",
    "k_anneal_steps": "S",
    "norm_scales": "N",
    "norm_gate": "N",
    "norm_attention": "A",
    "selection": "Z",
    "standardise": "Z",
    "orthogonality_coefficient": "O",
    "sketch_rank": "C",
    "revival_every": "R",
    "aligned_encoder": "E",
    "importance_power": "G",
}


@dataclass(frozen=True)
class CheckpointInfo:
    """One SAE on disk.

    Args:
        folder: Where it is.
        kind: What it is for.
        architecture: Its registered architecture.
        trained_as: Architecture that it was trained as; None when not recorded.
        d_in: Width of the activations.
        d_sae: Number of latents.
        parameters: Numbers in the weights file.
        weight_bytes: Size of the tensors.
        dtype: Data type of the weights.
        config: Contents of cfg.json.
        mechanisms: Mechanism letter and setting of what is on; empty for other architectures.
        exported_l0: L0 measured at export; None when not recorded.
        export: Content of the run's `export.json`; None without it.
    """

    folder: Path
    kind: Kind
    architecture: str
    trained_as: str | None
    d_in: int
    d_sae: int
    parameters: int
    weight_bytes: int
    dtype: str
    config: dict[str, Any]
    mechanisms: list[str]
    exported_l0: float | None
    export: dict[str, Any] | None

    @property
    def metadata(self) -> dict[str, Any]:
        """SAELens' metadata: model, hook, context size, steps and so on."""
        return cast("dict[str, Any]", self.config.get("metadata") or {})


@dataclass(frozen=True)
class RunInfo:
    """A run folder.

    Args:
        folder: Where it is.
        record: Content of `run.json`.
        saes: Its exported SAEs by name, without those not exported yet.
    """

    folder: Path
    record: dict[str, Any]
    saes: dict[str, CheckpointInfo]


def is_checkpoint(folder: Path) -> bool:
    """Whether SAELens could load an SAE from the folder."""
    return (folder / SAE_CFG_FILENAME).is_file() and (folder / SAE_WEIGHTS_FILENAME).is_file()


def read_folder(folder: Path) -> RunInfo | dict[str, CheckpointInfo]:
    """Recognise a folder.

    Returns:
        The run, or the SAEs by name (by folder name).

    Raises:
        InputError: There is no SAE in it, or a file of one cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is not a folder: give a run, an export or a checkpoint")
    if is_checkpoint(folder):
        return {folder.name: read_checkpoint(folder)}
    if (folder / RUN_FILE).is_file():
        record = read_run_record(folder)
        if record is None:
            raise InputError(f"{str(folder / RUN_FILE)!r} cannot be read: it is not JSON")
        found = {name: root / SAE_FOLDER for name, root in sae_roots(folder, record).items()}
        exported = {n: read_checkpoint(path) for n, path in found.items() if is_checkpoint(path)}
        return RunInfo(folder, record, exported)
    inside = {path.name: path for path in sorted(folder.iterdir()) if is_checkpoint(path)}
    if not inside:
        raise InputError(
            f"{str(folder)!r} holds no SAE: expected {SAE_CFG_FILENAME} and {SAE_WEIGHTS_FILENAME} "
            f"in it or in its sub-folders, or {RUN_FILE} of a run"
        )
    return {name: read_checkpoint(path) for name, path in inside.items()}


def read_checkpoint(folder: Path) -> CheckpointInfo:
    """Describe one SAE from its config and the header of its weights, without loading them.

    Raises:
        InputError: A file cannot be read or lacks what SAELens needs.
    """
    config = read_json_object(folder / SAE_CFG_FILENAME)
    for key in ("architecture", "d_in", "d_sae"):
        if key not in config:
            raise InputError(f"{str(folder / SAE_CFG_FILENAME)!r} has no {key!r}: not an SAE")
    for key in ("d_in", "d_sae"):
        if type(config[key]) is not int or config[key] < 1:
            raise InputError(
                f"{str(folder / SAE_CFG_FILENAME)!r}: {key} is {config[key]!r}, which is no width"
            )
    for part in (config, config.get("metadata") or {}):
        for key in ("metadata", "training_architecture_details"):
            if not isinstance(part, dict) or not isinstance(part.get(key) or {}, dict):
                raise InputError(f"{str(folder / SAE_CFG_FILENAME)!r}: {key} is no mapping")
    parameters, weight_bytes = _weights(folder / SAE_WEIGHTS_FILENAME)
    metadata = cast("dict[str, Any]", config.get("metadata") or {})
    details = cast("dict[str, Any]", metadata.get("training_architecture_details") or {})
    trained_as = cast("str | None", metadata.get("training_architecture"))
    architecture = str(config["architecture"])
    is_training = (folder / TRAINER_STATE_FILENAME).is_file() or "decoder_init_norm" in config
    kind: Kind = "export"
    if is_training:
        kind = "training checkpoint"
    elif architecture == "jumprelu" and trained_as == ARCHITECTURE:
        kind = "jumprelu twin"
    export = None
    if not is_training and (folder.parent / REPORT_FILENAME).is_file():
        export = read_json_object(folder.parent / REPORT_FILENAME)
    recorded_l0 = metadata.get("l0") if export is None else export.get("l0_exported")
    return CheckpointInfo(
        folder=folder,
        kind=kind,
        architecture=architecture,
        trained_as=trained_as,
        d_in=int(config["d_in"]),
        d_sae=int(config["d_sae"]),
        parameters=parameters,
        weight_bytes=weight_bytes,
        dtype=str(config.get("dtype", "float32")),
        config=config,
        mechanisms=mechanisms_on({**details, **config})
        if ARCHITECTURE in (architecture, trained_as)
        else [],
        exported_l0=None if is_training else cast("float | None", recorded_l0),
        export=export,
    )


def mechanisms_on(config: Mapping[str, Any]) -> list[str]:
    """Mechanisms that a multiscale configuration switches on, as "[letter] field = value"."""
    off = mechanisms_off()
    found: list[str] = []
    for name, value in off.items():
        if name in config and config[name] != value:
            letter = f"[{_LETTERS[name]}] " if name in _LETTERS else ""
            found.append(f"{letter}{name} = {_short(config[name])}")
    return found


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_short(item) for item in cast("list[Any]", value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1}


def _weights(path: Path) -> tuple[int, int]:
    """Numbers in a safetensors file and their bytes, from its header."""
    numbers = size = 0
    try:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                part = tensors.get_slice(name)
                count = math.prod(part.get_shape())
                numbers += count
                size += count * _DTYPE_BYTES.get(part.get_dtype(), 4)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{str(path)!r} is no complete safetensors file ({error}): copy or export it again"
        ) from error
    return numbers, size
