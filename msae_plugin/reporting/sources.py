"""The folders a report is made of, and the SAEs in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import file_sha256
from msae_plugin.common.stored import (
    StoredComparison,
    StoredConfig,
    StoredRun,
    read_format,
    read_json_object,
)
from msae_plugin.comparison.ladder import ladder_variants
from msae_plugin.comparison.language_model import CONTEXTS_FILE, EVALUATION_FOLDER
from msae_plugin.comparison.results import COMPARISON_FILE
from msae_plugin.comparison.results import FORMAT as COMPARISON_FORMAT
from msae_plugin.evaluation.summary import JSON_FILE as SUMMARY_FILE
from msae_plugin.evaluation.summary import read_summary
from msae_plugin.saes.export import ACTIVATIONS_FILENAME, JUMPRELU_FOLDER, SAE_FOLDER
from msae_plugin.saes.run_record import (
    METRICS_FILE,
    RUN_FILE,
    read_rows,
    read_run_record,
    sae_roots,
)
from msae_plugin.training.log import REVIVALS_FILE

KNOWN_FILES = (COMPARISON_FILE, SUMMARY_FILE, RUN_FILE)
TITLES = {"language_model": "Language model", "ground_truth": "Ground truth"}


@dataclass(frozen=True)
class Source:
    """One known file of a folder."""

    label: str  # name of the folder, unique in the report
    folder: Path  # where it is
    content: Mapping[str, Any]  # what the file holds


@dataclass(frozen=True)
class Sources:
    """Everything that a report reads, in the order in which it was named."""

    comparisons: Sequence[Source]  # folders with `comparison.json`
    evaluations: Sequence[Source]  # folders with `summary.json`
    runs: Sequence[Source]  # folders with `run.json`

    @property
    def all(self) -> Sequence[Source]:
        """Every source."""
        return (*self.comparisons, *self.evaluations, *self.runs)


def read_sources(folders: Sequence[Path]) -> Sources:
    """Recognise and read the folders; a run's own `evaluation/` is read with it."""
    if not folders:
        raise InputError("give at least one folder: a run, an evaluation or a comparison")
    unique = list({folder.resolve(): folder for folder in folders}.values())
    comparisons: list[Source] = []
    evaluations: list[Source] = []
    runs: list[Source] = []
    for folder, label in zip(unique, _labels(unique), strict=True):
        if not folder.is_dir():
            raise InputError(
                f"{str(folder)!r} is not a folder: give a run, an evaluation or a comparison"
            )
        present = [name for name in KNOWN_FILES if (folder / name).is_file()]
        if not present:
            raise InputError(
                f"{str(folder)!r} holds none of {', '.join(KNOWN_FILES)}: give the --output folder "
                "of msae train, eval or compare"
            )
        if COMPARISON_FILE in present:
            comparisons.append(Source(label, folder, _read_comparison(folder / COMPARISON_FILE)))
        if SUMMARY_FILE in present:
            evaluations.append(Source(label, folder, read_summary(folder / SUMMARY_FILE)))
        if RUN_FILE in present:
            runs.append(Source(label, folder, _read_run(folder / RUN_FILE)))
            own = folder / EVALUATION_FOLDER
            if (own / SUMMARY_FILE).is_file() and own.resolve() not in unique:
                summary = read_summary(own / SUMMARY_FILE)
                evaluations.append(Source(f"{label}/{own.name}", own, summary))
    return Sources(comparisons, evaluations, runs)


def _labels(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    labels = [path[-1] for path in parts]
    depth = 1
    while len(set(labels)) < len(labels) and depth < max(map(len, parts)):
        depth += 1
        repeated = {label for label, n in Counter(labels).items() if n > 1}
        labels = [
            "/".join(path[-depth:]) if label in repeated else label
            for path, label in zip(parts, labels, strict=True)
        ]
    return labels


def _read_comparison(path: Path) -> Mapping[str, Any]:
    content = read_format(path, COMPARISON_FORMAT, StoredComparison)
    if content.get("kind") not in TITLES:
        raise InputError(
            f"{str(path)!r}: kind must be one of {', '.join(TITLES)}; got {content.get('kind')!r}"
        )
    return content


def _read_run(path: Path) -> Mapping[str, Any]:
    content = read_json_object(path, StoredRun)
    if "saes" not in content:
        raise InputError(f"{str(path)!r} is no record of msae train: it names no 'saes'")
    # Its status as it is: the run's process may have died without a word.
    return read_run_record(path.parent) or content


def flat_facts(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as names and texts, in their order."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat_facts(value, f"{name}.")
        elif isinstance(value, list):
            yield name, ", ".join(str(item) for item in cast("list[object]", value))
        elif value is not None:
            yield name, str(value)


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among metrics."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and isfinite(value)
    }


@dataclass(frozen=True)
class TrainedSAE:
    """One SAE's folder."""

    name: str  # unique in the report
    method: str  # what it is an instance of
    l0_target: float | None  # the L0 that was asked for; None when not recorded
    seed: int | None  # of the training; None when not recorded
    folder: Path  # holds the logs
    export: Path | None  # holds the weights; None when nothing was exported
    rows: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]  # `cfg.json` of the export; empty without one
    source: str  # label of the comparison or run that it is of
    recorded_as: str  # its name there
    # Which SAEs it is shown with: the comparison it is of, and the hook where that has several;
    # empty for those of training runs.
    cohort: str = ""
    # What a comparison measured of it, by `evaluation/metric`.
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def training(self) -> Mapping[str, Any]:
        """The training configuration that SAELens' metadata keeps; empty when there is none."""
        metadata = self.config.get("metadata") or {}
        return metadata.get("training_architecture_details") or {}

    @property
    def steps(self) -> int:
        """Training steps, from the log or the metadata; 0 when neither says."""
        logged = [int(row["step"]) for row in self.rows if "step" in row]
        metadata = self.config.get("metadata") or {}
        return max(logged, default=int(metadata.get("training_steps") or 0))

    def decoder(self) -> torch.Tensor | None:
        """W_dec (d_sae, d_in); None without weights."""
        if self.export is None:
            return None
        path = self.export / SAE_WEIGHTS_FILENAME
        try:
            with safe_open(path, framework="pt") as tensors:
                return tensors.get_tensor("W_dec").float()
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{str(path)!r} holds no decoder that can be read ({error}): export it again"
            ) from error

    def frequencies(self) -> torch.Tensor | None:
        """(d_sae,) share of tokens on which latents fired in training; None when not stored."""
        if self.export is None or not (self.export / SPARSITY_FILENAME).is_file():
            return None
        stored = _tensor(self.export / SPARSITY_FILENAME, "sparsity")
        return 10 ** stored.double()

    def activations(self) -> torch.Tensor | None:
        """(n, d_in) activations kept from the export check; None when there are none."""
        path = self.folder / ACTIVATIONS_FILENAME
        return _tensor(path, "activations") if path.is_file() else None

    def contexts(self) -> list[Mapping[str, Any]]:
        """Latents in context that the comparison stored; none when it did not."""
        path = self.folder / CONTEXTS_FILE
        return (read_json_object(path).get("latents") or []) if path.is_file() else []

    def weight_hashes(self) -> set[str]:
        """sha256 of the exported weights and of their JumpReLU copy's."""
        files = [self.export, self.folder / JUMPRELU_FOLDER]
        paths = [folder / SAE_WEIGHTS_FILENAME for folder in files if folder is not None]
        return {file_sha256(path) for path in paths if path.is_file()}


def _tensor(path: Path, name: str) -> torch.Tensor:
    try:
        return load_file(path)[name]
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error


def trained_saes(sources: Sources) -> list[TrainedSAE]:
    """Every SAE whose folder is there, each once; rows point at it relative to the comparison."""
    found: dict[Path, TrainedSAE] = {}
    for source in sources.comparisons:
        rows = source.content["rows"]
        several_hooks = len({row.get("hook") for row in rows}) > 1
        for row in rows:
            folder = source.folder / str(row.get("folder"))
            if not row.get("folder") or not folder.is_dir() or folder.resolve() in found:
                continue
            sae = _read_sae(source, str(row["name"]), row.get("l0_target"), row.get("seed"), folder)
            found[folder.resolve()] = replace(
                sae,
                method=str(row["method"]),
                cohort=f"{source.label}, {row['hook']}" if several_hooks else source.label,
                metrics=finite(row["metrics"]),
            )
    for run in sources.runs:
        for name, folder in sae_roots(run.folder, run.content).items():
            if folder.is_dir() and folder.resolve() not in found:
                l0, seed = run_l0_target(run, name), run.content.get("seed")
                sae = _read_sae(run, name, l0, seed, folder)
                unique = name if len(sources.runs) == 1 else f"{run.label}/{name}"
                found[folder.resolve()] = replace(sae, name=unique)
    return list(found.values())


def run_l0_target(run: Source, name: str) -> float | None:
    """The L0 that an SAE of a run was trained for; None for one without such a setting."""
    export = run.content["saes"][name].get("export") or {}
    if export.get("l0_target") is not None:
        return float(export["l0_target"])
    config = run.content.get("config") or {}
    # A recipe of one SAE has it under `sae`, of several under `saes`.
    settings = (config.get("saes") or {}).get(name) or config.get("sae") or {}
    return float(settings["k"]) if settings.get("k") is not None else None


def _read_sae(
    source: Source, name: str, l0_target: float | None, seed: int | None, folder: Path
) -> TrainedSAE:
    places = [folder / SAE_FOLDER, folder]
    export = next((p for p in places if (p / SAE_WEIGHTS_FILENAME).is_file()), None)
    config: Mapping[str, Any] = {}
    if export is not None and (export / SAE_CFG_FILENAME).is_file():
        config = read_json_object(export / SAE_CFG_FILENAME, StoredConfig)
    return TrainedSAE(
        name=name,
        method=name,
        l0_target=l0_target,
        seed=seed,
        folder=folder,
        export=export,
        rows=read_rows(folder / METRICS_FILE),
        events=read_rows(folder / REVIVALS_FILE, dict[str, Any]),
        config=config,
        source=source.label,
        recorded_as=name,
    )


VARIANTS = {variant.name: variant for variant in ladder_variants()}


def is_variant(method: str) -> bool:
    """Whether a method belongs to the ladder alone: its references stand among others too."""
    return method in VARIANTS and VARIANTS[method].against is not None
