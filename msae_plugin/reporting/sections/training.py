"""Training runs and their curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msae_plugin.common.table import CellValue, Table, columns
from msae_plugin.reporting.document import Block, Bullets, Place, Section, Text, slug
from msae_plugin.reporting.figures import Style, curves
from msae_plugin.reporting.measurements import Missing
from msae_plugin.reporting.sources import RunSource, Sources, TrainedSAE, is_variant, run_l0_target
from msae_plugin.saes.health import recorded_messages

MOST_CURVES_OF_L0 = 3


def runs_section(runs: Sequence[RunSource]) -> Section | None:
    """A row per SAE of every run; None without runs."""
    if not runs:
        return None
    rows: list[list[CellValue]] = []
    for run in runs:
        record = run.content
        for name, sae in record["saes"].items():
            final = sae.get("final") or {}
            export = sae.get("export") or {}
            rows.append(
                [
                    name if len(runs) == 1 else f"{run.label}/{name}",
                    str(sae.get("architecture") or "not recorded"),
                    str(record.get("status") or "not recorded"),
                    record.get("seed"),
                    final.get("step"),
                    final.get("tokens"),
                    run_l0_target(run, name),
                    export.get("l0_exported"),
                    final.get("explained_variance"),
                    final.get("loss"),
                    final.get("dead_latents"),
                    sae.get("tokens_per_second"),
                    record.get("wall_seconds"),
                ]
            )
    headings = (
        ("name", "SAE", ""), ("architecture", "architecture", ""), ("status", "run", ""),
        ("seed", "seed", ""), ("steps", "steps", ""), ("tokens", "tokens", ""),
        ("l0_target", "target L0", ""), ("l0_exported", "L0 of the export", ""),
        ("explained_variance", "explained variance", "last log window"),
        ("final_loss", "final loss", "last log window"),
        ("dead_latents", "dead", "latents, at the end"),
        ("tokens_per_second", "speed", "tokens/s, SAE alone"),
        ("wall_seconds", "time of the run", "s, all its SAEs"),
    )  # fmt: skip
    table = Table(
        "training-runs",
        "Training runs. Explained variance and loss are those of the training batches of the last "
        "log window, at the L0 of training; they are no evaluation.",
        columns(*headings),
        rows,
    )
    return Section("runs", "Training runs", [table])


def health_section(sources: Sources) -> Section | None:
    """SAEs that failed to learn, a line each; None when all are healthy."""
    found = [
        f"{run.label}, {name}: {message}"
        for run in sources.runs
        for name, sae in run.content["saes"].items()
        for message in recorded_messages(sae.get("health"))
    ]
    found += [
        f"{source.label}, {row['name']}: {message}"
        for source in sources.comparisons
        for row in source.content["rows"]
        for message in recorded_messages(row.get("health"))
    ]
    if not found:
        return None
    return Section("health", "Read this first: SAEs that failed to learn", [Bullets(found)])


def missing_of_runs(runs: Sequence[RunSource], *, evaluated: bool) -> list[Missing]:
    """Unfinished and unmeasured parts of runs."""
    found: list[Missing] = []
    for run in runs:
        status = str(run.content.get("status") or "not recorded")
        if status != "complete":
            reason = str(run.content.get("failure") or "the run did not reach its end")
            found.append(Missing(run.label, "the whole run", status, reason))
        saes = run.content["saes"]
        for name in saes:
            if status == "complete" and not saes[name].get("export"):
                found.append(Missing(run.label, name, "not exported", "no export is recorded"))
        if run.content.get("steps") == 0:
            found.append(Missing(run.label, "all SAEs", "never trained", "0 training steps"))
        if run.demo is None and not evaluated:
            found.append(
                Missing(
                    run.label,
                    "held-out metrics",
                    "not measured",
                    "a training run measures none: give the folder of `msae eval` too",
                )
            )
    return found


def curves_section(
    place: Place, trained: Sequence[TrainedSAE], styles: Mapping[str, Style]
) -> Section | None:
    """Explained variance and dead latents over training; None without logs."""
    logged = [sae for sae in trained if len(sae.rows) > 1]
    if not logged:
        return None
    # Fifty lines would hide one another; a ladder's references are no variants.
    methods = [sae for sae in logged if not is_variant(sae.method)]
    variants = len(logged) > len(methods) > 0
    logged = methods or logged
    targets = list(dict.fromkeys(sae.l0_target for sae in logged))
    blocks: list[Block] = [
        Text(
            "Values of training batches, one line per SAE. Where k is annealed, early values are "
            "at a higher L0 and are not comparable with others."
            + (" Variants of the ladder are left out." if variants else "")
        )
    ]
    for l0 in targets[:MOST_CURVES_OF_L0]:
        of_target = [sae for sae in logged if sae.l0_target == l0]
        where = "" if l0 is None else f", target L0 {l0:g}"
        tag = "" if l0 is None else f"-l0-{slug(f'{l0:g}')}"
        for key, heading, bottom, top in (
            ("explained_variance", "explained variance ↑", 0.0, 1.0),
            ("dead_latents", "dead latents ↓", None, None),
        ):
            lines = [line for sae in of_target if (line := _line(sae, key)) is not None]
            blocks += curves(
                place.named(f"training-{key.replace('_', '-')}{tag}"),
                heading,
                f"{heading[:-2].capitalize()} during training{where}.",
                lines,
                styles,
                bottom=bottom,
                top=top,
            )
    if len(targets) > MOST_CURVES_OF_L0:
        left = ", ".join(f"{l0:g}" for l0 in targets[MOST_CURVES_OF_L0:] if l0 is not None)
        blocks.append(Text(f"Not drawn: target L0 {left}; each SAE's metrics.jsonl has them."))
    return Section(place.named("training"), place.titled("Training curves"), blocks)


def _line(sae: TrainedSAE, key: str) -> tuple[str, list[float], list[float]] | None:
    points = [
        (float(row["tokens"]), float(row[key]))
        for row in sae.rows
        if row.get(key) is not None and row.get("tokens") is not None
    ]
    return (sae.method, [x for x, _ in points], [y for _, y in points]) if points else None
