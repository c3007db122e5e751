"""`summary.json` and `summary.csv`: what was measured, what it means, and what was not."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import yaml

from msae_plugin.common.files import versions, write_json_atomic, write_text_atomic
from msae_plugin.common.stored import StoredSummary, read_format
from msae_plugin.common.table import csv_cell
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
        spread = statistics.stdev(values.values()) if len(values) > 1 and not repeated else None
        entry["metrics"][name] = {
            "mean": statistics.fmean(values.values()),
            "std": spread,
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


def standing(summary: Mapping[str, Any]) -> list[str]:
    """Where the SAEs of a summary.json stand among SAEBench's published ones, a line per metric.

    Those are of Gemma-2-2B, layer 12; of other models, hooks, widths and L0s there is none.
    """
    place = files("msae_plugin.evaluation") / "published.yaml"
    published = cast("Mapping[str, Any]", yaml.safe_load(place.read_text(encoding="utf-8")))
    measured: dict[str, dict[str, float]] = {}
    for entry in summary["results"]:
        for name, value in entry.get("metrics", {}).items():
            own = measured.setdefault(entry["sae"], {})
            own[f"{entry['evaluation']}/{name}"] = float(value["mean"])
    lines: list[str] = []
    for name, record in summary["saes"].items():
        model = str(record.get("model_name") or (summary.get("model") or {}).get("name"))
        own = measured.get(name, {})
        if (
            model.rsplit("/", 1)[-1] != published["model"]
            or record.get("hook_name") != published["hook"]
            or "core/l0" not in own
        ):
            continue
        for metric, table in published["metrics"].items():
            at = {
                method: interpolated(points, own["core/l0"])
                for method, points in table.get(record.get("d_sae"), {}).items()
            }
            scores = {method: score for method, score in at.items() if score is not None}
            if metric not in own or not scores:
                continue
            ahead = sum(own[metric] > score for score in scores.values())
            best_first = sorted(scores, key=lambda method: -scores[method])
            digits = 4 if table["mark"] == "V" else 3
            shown = ", ".join(f"{method} {scores[method]:.{digits}f}" for method in best_first)
            lines.append(
                f"{name}: {table['heading']} {own[metric]:.{digits}f} at L0 {own['core/l0']:.1f}, "
                f"ahead of {ahead} of {len(scores)} published SAEs of {record['d_sae']:,} latents "
                f"there: {shown} ({published['source']}, {_MARKS[table['mark']]}; interpolated "
                "between their L0s)"
            )
    return lines
