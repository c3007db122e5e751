"""Where the SAEs behind a reference or in a folder are.

    RUN  RUN/NAME  RUN/sae  RUN/jumprelu     what `msae train` writes
    FOLDER                                   cfg.json and sae_weights.safetensors, or folders of it
    user/repo:folder                         a Hugging Face repository in SAELens' layout
    user/repo@revision[:folder]              the same at a branch, tag or commit, fetched whole
    release:sae_id                           SAELens' registry of pretrained SAEs

What exists on the disk is taken first, then a registered release, then a repository.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from sae_lens.constants import (
    DTYPE_MAP,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
from sae_lens.loading.pretrained_saes_directory import (
    get_pretrained_saes_directory,
    get_repo_id_and_folder_name,
)
from safetensors import SafetensorError, safe_open
from typing_extensions import override

from msae_plugin.architecture.config import ARCHITECTURE, mechanisms_off
from msae_plugin.common.errors import InputError
from msae_plugin.common.files import TEMPORARY_PREFIX, file_sha256
from msae_plugin.common.stored import (
    StoredConfig,
    StoredExport,
    StoredRun,
    checked,
    read_json_object,
)
from msae_plugin.saes.download import HubReference, fetch, is_reference, parse_reference
from msae_plugin.saes.export import JUMPRELU_FOLDER, REPORT_FILENAME, SAE_FOLDER
from msae_plugin.saes.health import recorded_messages
from msae_plugin.saes.other_formats import other_format_error
from msae_plugin.saes.run_record import (
    METRICS_FILE,
    RUN_FILE,
    read_rows,
    read_run_record,
    sae_roots,
)

Kind = Literal["export", "jumprelu copy", "training checkpoint"]

# What the fields behind a mechanism are called in docs/method.md.
_LETTERS = {
    **dict.fromkeys(
        ("sparsity_scales", "prefix_fractions", "k_initial_multiplier", "k_anneal_steps"), "S"
    ),
    **dict.fromkeys(("norm_scales", "norm_gate"), "N"),
    **dict.fromkeys(("selection", "standardise", "dense_share_limit"), "Z"),
    "norm_attention": "A",
    "orthogonality_coefficient": "O",
    "sketch_rank": "C",
    "revival_every": "R",
    "aligned_encoder": "E",
    "importance_power": "G",
}


class RecordedSAE:
    """What an SAE's `cfg.json` and `export.json` say of it."""

    config: Mapping[str, Any]  # contents of cfg.json
    report: Mapping[str, Any]  # contents of `export.json`; empty without one

    @property
    def metadata(self) -> Mapping[str, Any]:
        """SAELens' metadata: model, hook, context size, steps and so on."""
        return self.config.get("metadata") or {}

    @property
    def details(self) -> Mapping[str, Any]:
        """Configuration of the training architecture; empty where it is not recorded."""
        return self.metadata.get("training_architecture_details") or {}

    @property
    def architecture(self) -> str:
        """Its registered architecture."""
        return str(self.config.get("architecture"))

    @property
    def trained_as(self) -> str:
        """Architecture that it was trained as; its own where that is not recorded."""
        return str(self.metadata.get("training_architecture") or self.architecture)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return int(self.config["d_in"])

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return int(self.config["d_sae"])

    @property
    def mechanisms(self) -> list[str]:
        """Letter and setting of what a multiscale SAE has on; empty for other architectures."""
        if self.trained_as != ARCHITECTURE:
            return []
        return mechanisms_on({**self.details, **self.config})

    @property
    def l0(self) -> float | None:
        """Active latents per token: measured at export, else what the metadata records."""
        recorded = self.report.get("l0_exported", self.metadata.get("l0"))
        return None if recorded is None else float(recorded)

    @property
    def warnings(self) -> list[str]:
        """In which ways it failed to learn."""
        return recorded_messages(self.report.get("health"))


@dataclass(frozen=True)
class StoredSAE(RecordedSAE):
    """One SAE on disk, described without loading it."""

    name: str  # of its folder, or what its run calls it
    root: Path  # folder with its metrics and figures
    folder: Path  # folder with its config and weights
    kind: Kind  # what it is for
    parameters: int  # numbers in the weights file
    weight_bytes: int  # size of the tensors
    config: Mapping[str, Any]
    report: Mapping[str, Any]

    @property
    @override
    def l0(self) -> float | None:
        return None if self.kind == "training checkpoint" else super().l0

    @property
    def explained_variance(self) -> float | None:
        """At export, else at the end of the training log; None where neither says."""
        recorded = self.report.get("explained_variance")
        if recorded is None and (rows := read_rows(self.root / METRICS_FILE)):
            recorded = rows[-1].get("explained_variance")
        return None if recorded is None else float(recorded)

    @property
    def jumprelu_export(self) -> Path | None:
        """Folder of the `jumprelu` copy, where there is one."""
        folder = self.root / JUMPRELU_FOLDER
        return folder if is_checkpoint(folder) and folder != self.folder else None

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of sae_weights.safetensors; refused where the export's record has another."""
        return self._checked_sha256(self.folder)

    @cached_property
    def jumprelu_sha256(self) -> str | None:
        """The same of the JumpReLU copy."""
        copy = self.jumprelu_export
        return None if copy is None else self._checked_sha256(copy)

    def _checked_sha256(self, folder: Path) -> str:
        weights = folder / SAE_WEIGHTS_FILENAME
        found = file_sha256(weights)
        recorded = self.report.get("weights_sha256", {})
        if recorded.get(folder.name, found) != found:
            raise InputError(
                f"{str(weights)!r} was damaged or changed since it was exported ({REPORT_FILENAME} "
                "has another sha256): copy it again, or train again; weights that you changed "
                f"yourself belong into a folder without {REPORT_FILENAME} beside it"
            )
        return found


def is_checkpoint(folder: Path) -> bool:
    """Whether SAELens could load an SAE from the folder."""
    return (folder / SAE_CFG_FILENAME).is_file() and (folder / SAE_WEIGHTS_FILENAME).is_file()


def held(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Path]]:
    """The record of a run, None for other folders; and where its SAEs are, or have to be, by name.

    A folder may be an SAE's own, or have some in its sub-folders or in `sae/` of those.
    """
    if is_checkpoint(folder):
        return None, {folder.name: folder}
    if (folder / RUN_FILE).is_file():
        record = read_run_record(folder)
        if record is None:
            read_json_object(folder / RUN_FILE, StoredRun)  # says why
            raise InputError(f"{str(folder / RUN_FILE)!r} cannot be read")
        roots = sae_roots(folder, record)
        return record, {name: root / SAE_FOLDER for name, root in roots.items()}
    return None, {
        child.name: found
        for child in sorted(folder.iterdir())
        if not child.name.startswith(TEMPORARY_PREFIX)
        for found in (child / SAE_FOLDER, child)
        if is_checkpoint(found)
    }


def read_folder(folder: Path) -> tuple[dict[str, Any] | None, dict[str, StoredSAE]]:
    """The record of a run, None for other folders; and the SAEs by name, exported ones of a run."""
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is not a folder: give a run, an export or a checkpoint")
    record, found = held(folder)
    if record is None and not found:
        raise other_format_error(folder) or InputError(
            f"{str(folder)!r} holds no SAE: expected {SAE_CFG_FILENAME} and "
            f"{SAE_WEIGHTS_FILENAME} in it or in its sub-folders, or {RUN_FILE} of a run"
        )
    return record, {
        name: read_checkpoint(path) for name, path in found.items() if is_checkpoint(path)
    }


def read_checkpoint(folder: Path) -> StoredSAE:
    """Describe one SAE from its config and the header of its weights, without loading them."""
    file = folder / SAE_CFG_FILENAME
    config = migrated_config(read_json_object(file), repr(str(file)))
    for key in ("architecture", "d_in", "d_sae"):
        if key not in config:
            raise InputError(f"{str(file)!r} has no {key!r}: not an SAE")
        if key != "architecture" and (type(config[key]) is not int or config[key] < 1):
            raise InputError(f"{str(file)!r}: {key} is {config[key]!r}, which is no width")
    dtype = config.get("dtype", "float32")
    if dtype not in DTYPE_MAP:
        raise InputError(f"{str(file)!r}: dtype is {dtype!r}: SAELens knows {', '.join(DTYPE_MAP)}")
    parameters, weight_bytes = _weights(folder / SAE_WEIGHTS_FILENAME)
    trained_as = (config.get("metadata") or {}).get("training_architecture")
    is_training = (folder / TRAINER_STATE_FILENAME).is_file() or "decoder_init_norm" in config
    kind: Kind = "export"
    if is_training:
        kind = "training checkpoint"
    elif config["architecture"] == "jumprelu" and trained_as == ARCHITECTURE:
        kind = "jumprelu copy"
    report = folder.parent / REPORT_FILENAME
    exported = report.is_file() and not is_training
    return StoredSAE(
        name=folder.name,
        root=folder.parent if exported and folder.name == SAE_FOLDER else folder,
        folder=folder,
        kind=kind,
        parameters=parameters,
        weight_bytes=weight_bytes,
        config=config,
        report=read_json_object(report, StoredExport) if exported else {},
    )


def migrated_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A cfg.json as SAELens 6 would write it: versions 2 to 5 had no metadata."""
    checked(config, where, StoredConfig)
    if config.get("metadata") is not None or not {"hook_name", "hook_point"} & set(config):
        return config
    try:
        training = {key: config[key] for key in ("decoder_init_norm",) if key in config}
        return checked({**handle_config_defaulting(config), **training}, where, StoredConfig)
    # Whatever SAELens' migration stumbles over in fields that are not what they should be.
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} cannot be read as SAELens 5 wrote it ({error})") from error


def mechanisms_on(config: Mapping[str, Any]) -> list[str]:
    """Mechanisms that a multiscale configuration switches on, as "[letter] field = value"."""
    on = [name for name, off in mechanisms_off().items() if config.get(name, off) != off]
    letters = {name: f"[{letter}] " for name, letter in _LETTERS.items()}
    return [f"{letters.get(name, '')}{name} = {_short(config[name])}" for name in on]


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


_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
# Folder names that say nothing without the folder above.
_GENERIC = re.compile(
    r"(sae|final|checkpoint|export|inference|model|latest|[\d_.-]+)", re.IGNORECASE
)
_SHOWN = 6


@dataclass(frozen=True)
class HubSource:
    """An SAE that SAELens fetches."""

    release: str  # what SAELens calls the release; the repository where it is not registered
    sae_id: str  # its id in the release; the folder in the repository
    repository: str
    path: str  # folder (or, for some releases, file) in the repository
    registered: bool  # whether SAELens' registry has it; its files may then have any layout


@dataclass(frozen=True)
class LocatedSAE:
    """One SAE behind a reference."""

    reference: str  # what the user wrote
    name: str  # a name made of its place, safe as a file name
    source: Path | HubSource  # its folder on this machine, or where SAELens fetches it


def locate(reference: str) -> list[LocatedSAE]:
    """Find the SAEs behind a reference; several for a run of several, or a folder of folders."""
    path = Path(reference).expanduser()
    if path.exists():
        return [
            LocatedSAE(reference, _folder_name(folder), folder)
            for folder in _checkpoint_folders(path.resolve(), reference)
        ]
    left, colon, right = reference.partition(":")
    releases = get_pretrained_saes_directory()
    if colon and right and left in releases:
        return [_registered(reference, left, right, list(releases[left].saes_map))]
    if colon and right and _REPOSITORY.fullmatch(left):
        folder = right.strip("/")
        source = HubSource(left, folder, left, folder, registered=False)
        return [LocatedSAE(reference, safe_name(f"{left.split('/')[1]}-{folder}"), source)]
    if is_reference(reference) and parse_reference(reference).revision is not None:
        return _of_revision(reference, parse_reference(reference))
    raise InputError(_not_found(reference, path, list(releases)))


def safe_name(text: str) -> str:
    """The text with everything that does not belong into a file name replaced by dashes."""
    return _UNSAFE.sub("-", text).strip("-.") or "sae"


def unfinished_run(folder: Path) -> str | None:
    """Why the run in a folder cannot be evaluated, and how to go on; None where it can."""
    record = read_run_record(folder)
    if record is None or record.get("status") == "complete":
        return None
    status = str(record.get("status"))
    state = {
        "running": "is still running",
        "interrupted": "was interrupted, or killed",
        "failed": f"failed ({record.get('failure', 'no reason recorded')})",
    }.get(status, f"has the status {status!r}")
    return (
        f"the run in {folder} is not finished: it {state}; continue it with "
        f"`msae train --config ITS_RECIPE --output {folder} --resume auto`"
    )


def _checkpoint_folders(path: Path, reference: str) -> list[Path]:
    if path.is_file():
        raise other_format_error(path) or InputError(
            f"SAE {reference!r} is a file: give the folder it is in, {path.parent}"
        )
    record, found = held(path)
    folders = list(found.values())
    if record is not None:
        _refuse_unfinished(path)
        missing = [folder for folder in folders if not is_checkpoint(folder)]
        if missing or not folders:
            what = f"{missing[0]} is missing" if missing else f"{RUN_FILE} names no SAE"
            raise InputError(
                f"the run in {path} is not whole: {what}; copy it again, or train it again"
            )
        return folders
    for own in (path, path / SAE_FOLDER):
        if own in folders:
            _require_whole_export(own)
            return [own]
    _refuse_unfinished(path.parent)
    files = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)
    for has, lacks in (files, files[::-1]):
        if (path / has).is_file():
            raise other_format_error(path) or InputError(
                f"SAE folder {path} has {has} but no {lacks}: copy the whole folder"
            )
    if folders:
        return folders
    contents = sorted(child.name for child in path.iterdir())
    what = f"it holds {_listed(contents)}" if contents else "it is empty"
    raise other_format_error(path) or InputError(
        f"there is no SAE in {path}: {what}; give a run of msae train, or a folder with "
        f"{SAE_CFG_FILENAME} and {SAE_WEIGHTS_FILENAME}"
    )


def _require_whole_export(folder: Path) -> None:
    """An export of ours counts once its check is written: a kill may come between the two."""
    if (
        folder.name not in (SAE_FOLDER, JUMPRELU_FOLDER)
        or (folder.parent / REPORT_FILENAME).is_file()
    ):
        return
    for run in (folder.parent, folder.parent.parent):
        _refuse_unfinished(run)


def _refuse_unfinished(run: Path) -> None:
    if (problem := unfinished_run(run)) is not None:
        raise InputError(problem)


def _registered(reference: str, release: str, sae_id: str, known: list[str]) -> LocatedSAE:
    if sae_id not in known:
        near = get_close_matches(sae_id, known, n=3, cutoff=0.3) or known[:3]
        raise InputError(
            f"SAE {reference!r}: release {release!r} has no SAE {sae_id!r}; among its "
            f"{len(known)} are {', '.join(near)}"
        )
    repository, path = get_repo_id_and_folder_name(release, sae_id)
    source = HubSource(release, sae_id, repository, path, registered=True)
    return LocatedSAE(reference, safe_name(f"{release}-{sae_id}"), source)


def _of_revision(reference: str, found: HubReference) -> list[LocatedSAE]:
    """SAELens asks for no revision: the files come first, and the SAE from them."""
    root = fetch(reference)
    above = [found.repo.split("/")[1], found.folder or "", found.revision or ""]
    return [
        LocatedSAE(
            reference,
            safe_name("-".join(part for part in (*above, *folder.relative_to(root).parts) if part)),
            folder,
        )
        for folder in _checkpoint_folders(root, reference)
    ]


def _folder_name(folder: Path) -> str:
    """RUN, RUN-NAME, RUN-jumprelu; of other folders their name, with the parent's if generic."""
    place, suffix = folder, ""
    if folder.name in (SAE_FOLDER, JUMPRELU_FOLDER) and (folder.parent / REPORT_FILENAME).is_file():
        place = folder.parent
        suffix = f"-{JUMPRELU_FOLDER}" if folder.name == JUMPRELU_FOLDER else ""
        with_parent = not (place / RUN_FILE).is_file() and (place.parent / RUN_FILE).is_file()
    else:
        with_parent = bool(_GENERIC.fullmatch(place.name) and place.parent.name)
    name = f"{place.parent.name}-{place.name}" if with_parent else place.name
    return safe_name(name + suffix)


def _not_found(reference: str, path: Path, releases: list[str]) -> str:
    left, colon, right = reference.partition(":")
    if colon and "/" not in left and not left.startswith((".", "~")):
        near = get_close_matches(left, releases, n=3, cutoff=0.5)
        hint = (
            f"did you mean {', '.join(near)}?"
            if near
            else "see https://decoderesearch.github.io/SAELens/latest/pretrained_saes/"
        )
        lack = "" if right else " (and no SAE id follows the colon)"
        return f"SAE {reference!r}: SAELens knows no release {left!r}{lack}; {hint}"
    if reference in releases:
        ids = list(get_pretrained_saes_directory()[reference].saes_map)
        return (
            f"SAE {reference!r} is a release of {len(ids)} SAEs: add the id of one, for example "
            f"{reference}:{ids[0]}"
        )
    existing = path.absolute()
    missing = existing.name
    while not existing.exists():
        missing, existing = existing.name, existing.parent
    inside = existing.iterdir() if existing.is_dir() else ()
    names = sorted(child.name for child in inside if not child.name.startswith("."))
    near = get_close_matches(missing, names, n=3, cutoff=0.5)
    hint = f"{existing} holds {_listed(names)}" if names else f"{existing} is empty"
    if near:
        hint = f"did you mean {', '.join(str(existing / name) for name in near)}?"
    if _REPOSITORY.fullmatch(reference):
        hint += f"; a repository on the hub is given as {reference}:FOLDER"
    return f"SAE {reference!r} does not exist: {hint}"


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def find_saes(run: Path) -> list[StoredSAE]:
    """The SAEs that a folder holds and that may be published.

    Refused are a training checkpoint, an export that was not finished, an SAE without training or
    with NaN weights.
    """
    if not run.is_dir():
        raise InputError(f"{str(run)!r} is not a folder: give a run or an export")
    export = next(filter(is_checkpoint, (run, run / SAE_FOLDER)), None)
    if export is not None:
        named = export.name == SAE_FOLDER and (export.parent / REPORT_FILENAME).is_file()
        root = export.parent if named or export != run else run
        return [_publishable(root.resolve().name, root, export)]
    record, found = held(run)
    if record is None:
        raise other_format_error(run) or InputError(
            f"{str(run)!r} holds no exported SAE: expected {SAE_FOLDER}/ as `msae train` writes "
            f"it, or {SAE_CFG_FILENAME} and {SAE_WEIGHTS_FILENAME}"
        )
    missing = [n for n, path in found.items() if not (path.parent / REPORT_FILENAME).is_file()]
    if missing or not found:
        raise InputError(
            f"the run {str(run)!r} is {record.get('status', 'not finished')} and has not exported "
            f"{', '.join(missing) or 'any SAE'}: finish it with --resume auto, or publish the "
            "folder of one SAE"
        )
    return [_publishable(name, path.parent, path) for name, path in found.items()]


def _publishable(name: str, root: Path, export: Path) -> StoredSAE:
    info = replace(read_checkpoint(export), name=name, root=root)
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
    _ = info.weights_sha256, info.jumprelu_sha256  # refuse damaged weights
    for folder in filter(None, (export, info.jumprelu_export)):
        _require_finite(folder / SAE_WEIGHTS_FILENAME)
    return info


def holds_nan(name: str, tensor: torch.Tensor) -> bool:
    """Whether weights hold NaN or infinite values; an infinite threshold switches a latent off."""
    if not tensor.is_floating_point():
        return False
    usable = ~tensor.isnan() if name == "threshold" else tensor.isfinite()
    return not bool(usable.all())


def _require_finite(weights: Path) -> None:
    try:
        with safe_open(weights, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                if holds_nan(name, cast("torch.Tensor", tensors.get_tensor(name))):
                    raise InputError(
                        f"{str(weights)!r}: {name} holds NaN or infinite values: training "
                        "diverged, so there is nothing to publish; train again with a lower rate"
                    )
    except (OSError, SafetensorError) as error:
        raise InputError(f"{str(weights)!r} cannot be read: {error}") from error
