"""`summary.json` and `summary.csv`: what was measured, what it means, and what was not."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from msae_plugin.common.files import versions, write_json_atomic, write_text_atomic
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


def write_summary(contents: Mapping[str, Any], output: Path) -> None:
    """Write both files, each in one step."""
    write_json_atomic(output / JSON_FILE, contents)
    write_text_atomic(output / CSV_FILE, summary_csv(contents))
