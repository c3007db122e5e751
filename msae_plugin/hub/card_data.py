"""What a model card says of one SAE, read from the files in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from msae_plugin.architecture.config import ARCHITECTURE
from msae_plugin.hub.measured import is_summary
from msae_plugin.hub.sources import hub_dataset
from msae_plugin.reporting.evaluation_tables import columns_of
from msae_plugin.saes.describe import mechanisms_on
from msae_plugin.saes.health import recorded_messages

FIGURES_FOLDER = "figures"


# Published scores swing 15x inside one architecture: it is in the table, with its spread, and not
# among the numbers that the Hub shows beside the model's name.
NEVER_HEADLINED = ("unlearning",)


@dataclass(frozen=True)
class Score:
    """One number of a card.

    Args:
        metric: SAEBench's name, or ours.
        mean: Over seeds.
        std: Over seeds; None for one seed.
        seeds: Which.
    """

    metric: str
    mean: float
    std: float | None
    seeds: tuple[int, ...]

    def text(self) -> str:
        """For a table."""
        spread = "" if self.std is None else f" ± {self.std:.3f}"
        return f"{self.mean:.4g}{spread}" if abs(self.mean) >= 10 else f"{self.mean:.3f}{spread}"


@dataclass(frozen=True)
class CardEntry:
    """One SAE of a repository.

    Args:
        folder: Its folder.
        config: cfg.json.
        run: runner_cfg.json; empty without one.
        export: The check made at export; empty without one.
        summary: summary.json; None when it was not evaluated.
        has_twin: Whether there is a `jumprelu` twin.
        figures: Its figures, as paths in the repository.
    """

    folder: str
    config: Mapping[str, Any]
    run: Mapping[str, Any]
    export: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    has_twin: bool
    figures: tuple[str, ...] = ()

    @property
    def metadata(self) -> Mapping[str, Any]:
        """SAELens' metadata."""
        return cast("Mapping[str, Any]", self.config.get("metadata") or {})

    @property
    def details(self) -> Mapping[str, Any]:
        """Configuration of the training architecture."""
        return cast("Mapping[str, Any]", self.metadata.get("training_architecture_details") or {})

    @property
    def needs_plugin(self) -> bool:
        """Whether only this package can load it."""
        return self.config.get("architecture") == ARCHITECTURE

    @property
    def trained_as(self) -> str:
        """Architecture that it was trained as."""
        return str(self.metadata.get("training_architecture") or self.config.get("architecture"))

    @property
    def l0(self) -> float | None:
        """Active latents per token, at export where that was measured."""
        recorded = self.export.get("l0_exported", self.metadata.get("l0"))
        return None if recorded is None else float(recorded)

    @property
    def mechanisms(self) -> list[str]:
        """What a multiscale SAE has switched on."""
        if self.trained_as != ARCHITECTURE:
            return []
        return mechanisms_on({**self.details, **self.config})

    @property
    def warnings(self) -> list[str]:
        """In which ways it failed to learn."""
        return recorded_messages(self.export.get("health"))

    def recorded(self, name: str) -> str:
        """A field of the metadata, for a table."""
        value = self.metadata.get(name)
        if value is None:
            return "not recorded"
        return f"{value:,}" if isinstance(value, int) and name != "seed" else str(value)

    def scores(self, evaluation: str) -> list[Score]:
        """The headline numbers of an evaluation; empty where it was not measured."""
        for row in self._rows():
            if row.get("evaluation") == evaluation and row.get("status") == "measured":
                return _scores(evaluation, row)
        return []

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
        for row in self._rows():
            if row.get("evaluation") == evaluation and row.get("status") == "measured":
                facts = cast("Mapping[str, Any]", row.get("facts") or {})
                said += [str(row["note"])] if row.get("note") else []
                said += [
                    f"{name.replace('_', ' ')}: {value}"
                    for name, value in facts.items()
                    if isinstance(value, bool | int | float | str)
                ]
        return list(dict.fromkeys(said))

    def evaluations(self) -> list[str]:
        """Evaluations with a number."""
        return [str(r["evaluation"]) for r in self._rows() if r.get("status") == "measured"]

    def _rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows of this SAE; those of its twin, which computes the same, come after."""
        if self.summary is None:
            return []
        rows = cast("list[Mapping[str, Any]]", self.summary["results"])
        saes = cast("Mapping[str, Mapping[str, Any]]", self.summary["saes"])
        return sorted(rows, key=lambda row: str(saes.get(str(row["sae"]), {}).get("reference", "")))

    def settings(self, evaluation: str) -> Mapping[str, Any]:
        """Configuration of an evaluation."""
        config = cast("Mapping[str, Any]", (self.summary or {}).get("config") or {})
        evaluations = cast("Mapping[str, Any]", config.get("evaluations") or {})
        return cast("Mapping[str, Any]", evaluations.get(evaluation) or {})

    def definition(self, evaluation: str, metric: str) -> Mapping[str, Any]:
        """What a metric means."""
        definitions = cast("Mapping[str, Any]", (self.summary or {}).get("metrics") or {})
        return cast("Mapping[str, Any]", definitions.get(f"{evaluation}/{metric}") or {})

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
    metrics = cast("Mapping[str, Mapping[str, Any]]", row.get("metrics") or {})
    return [
        Score(
            metric=name,
            mean=float(metrics[name]["mean"]),
            std=None if metrics[name].get("std") is None else float(metrics[name]["std"]),
            seeds=tuple(int(seed) for seed in metrics[name].get("per_seed") or row["seeds"]),
        )
        for name, _ in columns_of(evaluation, [row])
    ]


def usable_summary(value: object) -> Mapping[str, Any] | None:
    """A summary in a format that this version reads, else None."""
    return cast("Mapping[str, Any]", value) if is_summary(value) else None
