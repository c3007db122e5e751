"""Comparisons, evaluations and demos as benches: rows, definitions, protocol, what is missing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from msae_plugin.reporting.document import slug
from msae_plugin.reporting.metrics import Definition, read_definition
from msae_plugin.reporting.rows import Bench, Missing, Row, row_from
from msae_plugin.reporting.sources import (
    RunSource,
    Source,
    Sources,
    TrainedSAE,
    flat_facts,
    run_l0_target,
    variant_of,
)

_TITLES = {"language_model": "Language model", "ground_truth": "Ground truth"}
# What a comparison may say of itself beside rows and definitions.
_PROTOCOL_KEYS = ("model", "data", "seeds", "protocol", "device", "versions")
_NOT_PROTOCOL = {"per_seed", "weights_sha256"}


def benches(sources: Sources, trained: Sequence[TrainedSAE]) -> list[Bench]:
    """Everything that was measured, one bench per source."""
    several = len(sources.comparisons) > 1
    found: list[Bench] = []
    for source in sources.comparisons:
        found += _of_comparison(source, labelled=several)
    by_hash: dict[str, TrainedSAE] = {}
    if sources.evaluations:
        by_hash = {digest: sae for sae in trained for digest in sae.weight_hashes()}
    found += [_of_evaluation(source, by_hash) for source in sources.evaluations]
    found += [_of_demo(run, run.demo) for run in sources.runs if run.demo is not None]
    names: set[str] = set()
    for bench in found:
        if bench.name in names:
            # Ids and file names are made of it.
            raise ValueError(f"two benches are called {bench.name!r}")
        names.add(bench.name)
    return found


def _of_comparison(source: Source, *, labelled: bool) -> list[Bench]:
    """A bench per hook: what reads elsewhere is not compared."""
    content = source.content
    kind = str(content["kind"])
    rows = [
        _as_variant(row_from(values)) for values in cast("list[Mapping[str, Any]]", content["rows"])
    ]
    title = _TITLES[kind]
    missing = [
        Missing(
            source.label,
            str(entry.get("what") or entry.get("name") or "something"),
            str(entry.get("status") or "failed").replace("_", " "),
            str(entry.get("reason") or "no reason was recorded"),
        )
        for entry in cast("list[Mapping[str, Any]]", content.get("not_measured") or [])
    ]
    recorded = cast("list[Mapping[str, Any]]", content["rows"])
    for row, values in zip(rows, recorded, strict=True):
        missing += _missing_of_row(source.label, row, values.get("reason"))
    measured = [row for row in rows if row.metrics]
    protocol = {key: content[key] for key in _PROTOCOL_KEYS if content.get(key) not in (None, {})}
    hooks = list(dict.fromkeys(row.hook for row in measured)) or [None]
    found: list[Bench] = []
    for hook in hooks:
        parts = [str(hook)] if len(hooks) > 1 else []
        parts += [source.label] if labelled else []
        found.append(
            Bench(
                name=slug(" ".join([kind, *parts])),
                title=f"{title} ({', '.join(parts)})" if parts else title,
                kind=kind,
                seeds_are="training seeds",
                rows=[row for row in measured if row.hook == hook],
                definitions=_definitions(content["definitions"]),
                facts=[*_hook_fact(hook), *flat_facts(protocol)],
                # Told once, with the first.
                missing=missing if hook == hooks[0] else [],
                reference=content.get("reference"),
            )
        )
    return found


def _as_variant(row: Row) -> Row:
    """The row with the ladder's facts where it lacks them."""
    variant = variant_of(row.method)
    if variant is None or row.part is not None:
        return row
    return replace(
        row,
        against=row.against or variant.against,
        part=variant.group,
        mechanism=variant.mechanism,
        claim=row.claim or variant.claim,
    )


def _hook_fact(hook: str | None) -> list[tuple[str, str]]:
    return [] if hook is None else [("hook", hook)]


def _missing_of_row(label: str, row: Row, reason: str | None) -> list[Missing]:
    if not row.metrics:
        return [
            Missing(label, row.name, "not measured", reason or "the row holds no metric"),
        ]
    found: list[Missing] = []
    if row.training_steps == 0:
        found.append(
            Missing(label, row.name, "never trained", "0 training steps: its numbers are of noise")
        )
    if row.l0_missed is not None and row.l0_target is not None:
        found.append(
            Missing(
                label,
                f"{row.name} at its target L0",
                "missed",
                f"L0 {row.l0_missed:.1f} where {row.l0_target:g} was asked for",
            )
        )
    if row.unmeasured:
        names = ", ".join(row.unmeasured)
        found.append(
            Missing(label, f"{names} of {row.name}", "not measured", "no finite value recorded")
        )
    return found


def _definitions(given: Mapping[str, Any]) -> dict[str, Definition]:
    return {name: read_definition(name, value) for name, value in given.items()}


def _of_evaluation(source: Source, by_hash: Mapping[str, TrainedSAE]) -> Bench:
    content = source.content
    saes = cast("Mapping[str, Mapping[str, Any]]", content["saes"])
    results = cast("list[Mapping[str, Any]]", content["results"])
    known = {
        name: by_hash[str(record.get("weights_sha256"))]
        for name, record in saes.items()
        if str(record.get("weights_sha256")) in by_hash
    }
    rows, seeds_are = _evaluation_rows(saes, results, known)
    model = cast("Mapping[str, Any]", content.get("model") or {})
    protocol = {
        "model": {k: v for k, v in model.items() if k not in _NOT_PROTOCOL},
        "evaluated": content.get("created"),
        "evaluation seeds": content.get("seeds"),
        "versions": content.get("versions"),
        "evaluations": cast("Mapping[str, Any]", content.get("config") or {}).get("evaluations"),
    }
    return Bench(
        name=slug(f"evaluation-{source.label}"),
        title=f"Evaluation ({source.label})",
        kind="language_model",
        seeds_are=seeds_are,
        rows=rows,
        definitions=_definitions(content["metrics"]),
        facts=list(flat_facts({key: value for key, value in protocol.items() if value})),
        missing=_missing_of_evaluation(source.label, saes, results),
    )


def _evaluation_rows(
    saes: Mapping[str, Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    known: Mapping[str, TrainedSAE],
) -> tuple[list[Row], str]:
    """A row per SAE where they are of several training seeds, else one per evaluation seed."""
    instances = [(sae.method, sae.l0_target, sae.seed) for sae in known.values()]
    of_seeds = len(known) == len(saes) and len({key[:2] for key in instances}) < len(instances)
    of_seeds = of_seeds and len(set(instances)) == len(instances)
    rows: list[Row] = []
    for name, record in saes.items():
        per_seed: dict[int, dict[str, float]] = {}
        for entry in results:
            if entry.get("sae") != name:
                continue
            for metric, value in cast("Mapping[str, Any]", entry.get("metrics") or {}).items():
                for seed, number in cast("Mapping[str, float]", value["per_seed"]).items():
                    key = f"{entry['evaluation']}/{metric}"
                    per_seed.setdefault(int(seed), {})[key] = float(number)
        sae = known.get(name)
        common = Row(
            name,
            name,
            architecture=str(record.get("architecture") or ""),
            l0_target=None if sae is None else sae.l0_target,
            training_steps=None if sae is None else sae.steps or None,
        )
        if of_seeds and sae is not None:
            metrics = {
                metric: statistics.fmean(m[metric] for m in per_seed.values() if metric in m)
                for metric in dict.fromkeys(k for m in per_seed.values() for k in m)
            }
            rows.append(replace(common, method=sae.method, seed=sae.seed, metrics=metrics))
        else:
            rows += [
                replace(common, seed=seed, metrics=metrics)
                for seed, metrics in sorted(per_seed.items())
            ]
    kept = [row for row in rows if row.metrics]
    return kept, "training seeds" if of_seeds else "evaluation seeds"


def _missing_of_evaluation(
    label: str, saes: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> list[Missing]:
    """One entry for all SAEs that lack an evaluation for the same reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for entry in results:
        if entry.get("status") != "measured":
            key = (str(entry["evaluation"]), str(entry.get("status")), str(entry.get("reason")))
            reasons.setdefault(key, []).append(str(entry["sae"]))
    found: list[Missing] = []
    for (evaluation, status, reason), names in reasons.items():
        who = "all SAEs" if len(names) == len(saes) > 1 else ", ".join(names)
        found.append(Missing(label, f"{evaluation} of {who}", status.replace("_", " "), reason))
    return found


def _of_demo(run: RunSource, demo: Mapping[str, Any]) -> Bench:
    comparison = cast("Mapping[str, Any]", demo.get("comparison") or {})
    texts = cast("Mapping[str, str]", comparison.get("definitions") or {})
    settings = cast("Mapping[str, Any]", demo.get("settings") or {})
    rows: list[Row] = []
    recorded = cast("Mapping[str, Mapping[str, Any]]", run.content["saes"])
    for values in cast("list[Mapping[str, Any]]", comparison.get("saes") or []):
        name = str(values["name"])
        record = recorded.get(name, {})
        rows.append(
            row_from(
                {
                    "name": name,
                    "method": name,
                    "architecture": record.get("architecture"),
                    "l0_target": run_l0_target(run, name) if record else None,
                    "seed": run.content.get("seed"),
                    "lr": settings.get("lr"),
                    "training_steps": run.content.get("steps"),
                    "training_tokens": run.content.get("tokens"),
                    "metrics": {f"heldout/{key}": values.get(key) for key in texts},
                }
            )
        )
    counts = next(iter(cast("list[Mapping[str, Any]]", comparison.get("saes") or [])), {})
    tokens = f"{counts.get('n_tokens', 0):,} held-out tokens"
    return Bench(
        name=slug(f"heldout-{run.label}"),
        title=f"Held-out text ({run.label})",
        kind="language_model",
        seeds_are="training seeds",
        rows=[row for row in rows if row.metrics],
        definitions={
            f"heldout/{key}": _demo_definition(f"heldout/{key}", text, tokens)
            for key, text in texts.items()
        },
        facts=list(flat_facts({k: v for k, v in settings.items() if v is not None})),
        missing=[m for row in rows for m in _missing_of_row(run.label, row, None)],
    )


def _demo_definition(name: str, text: str, tokens: str) -> Definition:
    """demo.json has one sentence per metric, which ends in which way is better."""
    sentence, _, direction = text.partition("; ")
    higher = {"higher": True, "lower": False}.get(direction.split(" ")[0] if direction else "")
    return Definition(name, sentence, "", tokens, "msae", higher)
