"""`summary.json` and `summary.csv`: what was measured, what it means, and what was not."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import yaml

from msae_plugin.common.files import versions, write_json_atomic, write_text_atomic
from msae_plugin.common.stored import StoredSummary, read_format
from msae_plugin.common.table import csv_cell, spread
from msae_plugin.evaluation.outcomes import MetricDefinition, ScoreResult

FORMAT = 1
JSON_FILE, CSV_FILE = "summary.json", "summary.csv"
CSV_COLUMNS = (
    "sae", "evaluation", "metric", "status", "mean", "std", "n_seeds", "unit", "source",
    "definition", "reason",
)  # fmt: skip
RECORDED_VERSIONS = (
    "msae-plugin", "sae-bench", "sae-probes", "sae-lens", "transformer-lens", "torch",
    "transformers", "datasets",
)  # fmt: skip

BySeed = Mapping[int, ScoreResult]


def result_entry(sae: str, evaluation: str, outcomes: BySeed, output: Path) -> dict[str, Any]:
    """The entry of one SAE and evaluation.

    An SAE that failed with one seed failed: its other seeds' numbers are in their own files, but a
    mean over the seeds that happened to work is not reported.
    """
    bad = {seed: o for seed, o in outcomes.items() if o.status != "measured"}
    entry: dict[str, Any] = {
        "sae": sae,
        "evaluation": evaluation,
        "status": "measured",
        "reason": None,
        "seeds": sorted(outcomes),
        "files": [
            o.file.relative_to(output).as_posix()
            for _, o in sorted(outcomes.items())
            if o.file is not None
        ],
        "metrics": {},
    }
    if bad:
        seed, first = min(bad.items())
        entry["status"] = first.status
        several = len({outcome.reason for outcome in outcomes.values()}) > 1
        entry["reason"] = f"seed {seed}: {first.reason}" if several else first.reason
        return entry
    texts = [o.facts["text"] for o in outcomes.values() if "text" in o.facts]
    repeated = len(texts) > 1 and len(set(texts)) < len(texts)
    if repeated:
        entry["note"] = (
            "different seeds gave the same text (a streamed data set of one shard is not "
            "shuffled): no spread is given"
        )
    names = next(iter(outcomes.values())).metrics
    for name in names:
        values = {seed: o.metrics[name] for seed, o in sorted(outcomes.items())}
        over_seeds = spread(values.values())
        entry["metrics"][name] = {
            "mean": over_seeds.mean,
            "std": None if repeated else over_seeds.std,
            "per_seed": {str(seed): value for seed, value in values.items()},
        }
    facts = {k: v for o in outcomes.values() for k, v in o.facts.items() if k != "text"}
    if facts:
        entry["facts"] = facts
    return entry


def summary(
    *,
    model: Mapping[str, Any],
    seeds: Sequence[int],
    config: Mapping[str, Any],
    saes: Mapping[str, Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    definitions: Mapping[str, Mapping[str, MetricDefinition]],
) -> dict[str, Any]:
    """The contents of `summary.json`.

    A metric without definition is a KeyError: a number that nobody explains is not reported.
    """
    defined: dict[str, Any] = {}
    for entry in results:
        for name in entry["metrics"]:
            evaluation = str(entry["evaluation"])
            defined[f"{evaluation}/{name}"] = asdict(definitions[evaluation][name])
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(*RECORDED_VERSIONS),
        "model": dict(model),
        "seeds": list(seeds),
        "config": dict(config),
        "saes": {name: dict(record) for name, record in saes.items()},
        "results": [dict(entry) for entry in results],
        "metrics": defined,
    }


def summary_csv(contents: Mapping[str, Any]) -> str:
    """One row per SAE, evaluation and metric; one without a metric for what was not measured."""
    stream = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(stream, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for entry in contents["results"]:
        common = {key: csv_cell(entry[key]) for key in ("sae", "evaluation", "status", "reason")}
        if not entry["metrics"]:
            writer.writerow(common)
        for name, value in entry["metrics"].items():
            definition = contents["metrics"][f"{entry['evaluation']}/{name}"]
            writer.writerow(
                common
                | {
                    "metric": csv_cell(name),
                    "mean": value["mean"],
                    "std": value["std"],
                    "n_seeds": len(value["per_seed"]),
                    **{key: csv_cell(definition[key]) for key in ("unit", "source", "definition")},
                }
            )
    return stream.getvalue()


def read_summary(path: Path) -> dict[str, Any]:
    """A checked `summary.json`."""
    return read_format(path, FORMAT, StoredSummary)


def write_summary(contents: Mapping[str, Any], output: Path) -> None:
    """Write both files, each in one step."""
    write_json_atomic(output / JSON_FILE, contents)
    write_text_atomic(output / CSV_FILE, summary_csv(contents))


def unmeasured(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], list[str]]:
    """The SAEs without numbers, by evaluation, status in words, and reason."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for entry in results:
        if entry.get("status") != "measured":
            status = str(entry.get("status")).replace("_", " ")
            key = (str(entry["evaluation"]), status, str(entry.get("reason")))
            found.setdefault(key, []).append(str(entry["sae"]))
    return found


_MARKS = {
    "V": "from the authors' results, reproduced within .0045",
    "D": "read off their plots, within .003",
}


def interpolated(points: Mapping[int, float], l0: float) -> float | None:
    """The score at an L0, linear in its logarithm; None outside of the published ones."""
    for (low, below), (high, above) in pairwise(sorted(points.items())):
        if low <= l0 <= high:
            share = math.log(l0 / low) / math.log(high / low)
            return below + share * (above - below)
    return None


@dataclass(frozen=True)
class Standing:
    """SAEs among SAEBench's published ones of their model, hook and width, by one metric."""

    metric: str  # key of the summary
    heading: str
    source: str
    mark: str  # how exact the published numbers are
    d_sae: int
    published: Mapping[str, Mapping[int, float]]  # by method, score by L0
    own: Mapping[str, tuple[float, float]]  # by SAE, L0 and score

    def lines(self) -> Iterator[str]:
        """Where each SAE stands; none outside of the published L0s."""
        digits = 4 if self.mark == "V" else 3
        for name, (l0, score) in self.own.items():
            at = {method: interpolated(points, l0) for method, points in self.published.items()}
            scores = {method: value for method, value in at.items() if value is not None}
            if not scores:
                continue
            ahead = sum(score > value for value in scores.values())
            best_first = sorted(scores, key=lambda method: -scores[method])
            shown = ", ".join(f"{method} {scores[method]:.{digits}f}" for method in best_first)
            yield (
                f"{name}: {self.heading} {score:.{digits}f} at L0 {l0:.1f}, ahead of {ahead} of "
                f"{len(scores)} published SAEs of {self.d_sae:,} latents there: {shown} "
                f"({self.source}, {_MARKS[self.mark]}; interpolated between their L0s)"
            )


def standings(summary: Mapping[str, Any]) -> list[Standing]:
    """The SAEs of a summary.json among SAEBench's published ones, by metric and width.

    Those are of Gemma-2-2B, layer 12; of other models, hooks and widths there is none.
    """
    place = files("msae_plugin.evaluation") / "published.yaml"
    published = cast("Mapping[str, Any]", yaml.safe_load(place.read_text(encoding="utf-8")))
    measured: dict[str, dict[str, float]] = {}
    for entry in summary["results"]:
        for name, value in entry.get("metrics", {}).items():
            own = measured.setdefault(entry["sae"], {})
            own[f"{entry['evaluation']}/{name}"] = float(value["mean"])
    named = str((summary.get("model") or {}).get("name"))
    there = {
        name: int(record.get("d_sae") or 0)
        for name, record in summary["saes"].items()
        if str(record.get("model_name") or named).rsplit("/", 1)[-1] == published["model"]
        and record.get("hook_name") == published["hook"]
        and "core/l0" in measured.get(name, {})
    }
    found: list[Standing] = []
    for metric, table in published["metrics"].items():
        for d_sae in sorted(set(there.values()) & set(table)):
            own = {
                name: (measured[name]["core/l0"], measured[name][metric])
                for name, width in there.items()
                if width == d_sae and metric in measured[name]
            }
            if own:
                heading, mark = table["heading"], table["mark"]
                source = published["source"]
                found.append(Standing(metric, heading, source, mark, d_sae, table[d_sae], own))
    return found
