"""What `msae compare` prints at its end: a table, what failed to learn, what was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from msae_plugin.comparison.statistics import spread
from msae_plugin.saes.health import recorded_messages

_COLUMNS = {
    "language_model": (
        ("L0", "heldout/l0", 1),
        ("expl. var.", "heldout/explained_variance", 4),
        ("loss rec.", "heldout/loss_recovered", 4),
        ("dead", "heldout/dead_latents", 0),
        ("cosine", "heldout/mean_max_decoder_cosine", 3),
    ),
    "ground_truth": (
        ("L0", "ground_truth/l0", 1),
        ("F1", "ground_truth/f1", 3),
        ("MCC", "ground_truth/mcc", 3),
        ("expl. var.", "ground_truth/explained_variance", 3),
        ("dead", "ground_truth/dead_latents", 0),
    ),
}


def comparison_for_terminal(contents: Mapping[str, Any]) -> RenderableType:
    """A table of means and standard deviations over seeds, by method and L0.

    Args:
        contents: Of comparison.json.
    """
    columns = _COLUMNS[str(contents["kind"])]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for heading in ("target", "seeds", *(name for name, _, _ in columns), "ms/step"):
        table.add_column(heading, overflow="fold", justify="right")
    groups: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for row in contents["rows"]:
        groups.setdefault((row["method"], row["l0_target"]), []).append(row)
    for (method, l0), rows in groups.items():
        matched = all(row.get("l0_matched", True) for row in rows)
        target = "-" if l0 is None else f"{l0:g}" + ("" if matched else " (missed)")
        cells = [_cell(rows, metric, digits) for _, metric, digits in columns]
        cells.append(_cell(rows, "training/step_ms", 1))
        table.add_row(Text(method), target, str(len(rows)), *cells)
    missing = [
        Text(f"{item['status']}: {item['what']}: {item['reason']}")
        for item in contents["not_measured"]
    ]
    health = [
        Text(f"warning: {row['name']}: {message}")
        for row in contents["rows"]
        for message in recorded_messages(row.get("health"))
    ]
    return Group(table, *health, *missing)


def _cell(rows: Sequence[Mapping[str, Any]], metric: str, digits: int) -> str:
    values = [row["metrics"][metric] for row in rows if metric in row["metrics"]]
    if not values:
        return "-"
    found = spread(values)
    deviation = "" if found.std is None else f" ± {found.std:.{digits}f}"
    return f"{found.mean:.{digits}f}{deviation}"
