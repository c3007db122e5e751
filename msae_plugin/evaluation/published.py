"""Where an SAE stands among SAEBench's published ones: of Gemma-2-2B, layer 12, and no other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.resources import files
from itertools import pairwise
from typing import Any, cast

import yaml

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
    """A line per SAE and metric of a summary.json; none of other models, hooks, widths and L0s."""
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
