"""From comparisons and evaluations to the one long table of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pandas as pd

from msae_plugin.common.stored import read_json_object
from msae_plugin.comparison.language_model import EVALUATION_FOLDER
from msae_plugin.evaluation.outcomes import MetricDefinition
from msae_plugin.evaluation.summary import JSON_FILE as SUMMARY_FILE
from msae_plugin.evaluation.summary import read_summary, unmeasured
from msae_plugin.reporting.document import slug
from msae_plugin.reporting.results import (
    FACTS,
    Facts,
    MeasuredSAE,
    Missing,
    Results,
    long_frame,
    read_definition,
)
from msae_plugin.reporting.sources import (
    TITLES,
    VARIANTS,
    Source,
    Sources,
    TrainedSAE,
    finite,
    flat_facts,
)


def results_of(sources: Sources, trained: Sequence[TrainedSAE]) -> list[Results]:
    """Everything that was measured; `trained` tells which SAEs an evaluation measured.

    An evaluation of SAEs that a comparison measured too, by the hash of their weights, is further
    columns of that comparison's table: one SAE is one row wherever its numbers come from.
    """
    several = len(sources.comparisons) > 1
    found: list[Results] = []
    for source in sources.comparisons:
        found += _of_comparison(source, labelled=several)
    by_hash: dict[str, TrainedSAE] = {}
    if sources.evaluations:
        by_hash = {digest: sae for sae in trained for digest in sae.weight_hashes()}
    for source in sources.evaluations:
        known = {
            name: by_hash[str(record.get("weights_sha256"))]
            for name, record in source.content["saes"].items()
            if str(record.get("weights_sha256")) in by_hash
        }
        found = _joined(found, source, known) or [*found, _of_evaluation(source, known)]
    # Ids and file names are made of the name, in which what tells two hooks apart may be lost.
    seen: Counter[str] = Counter()
    for place, results in enumerate(found):
        seen[results.name] += 1
        if seen[results.name] > 1:
            found[place] = replace(results, name=f"{results.name}-{seen[results.name]}")
    return found


def _of_comparison(source: Source, *, labelled: bool) -> list[Results]:
    """Results by hook: SAEs that read elsewhere are not compared."""
    content = source.content
    kind = str(content["kind"])
    missing = [
        Missing(
            source.label,
            str(item.get("what") or item.get("name") or "something"),
            str(item.get("status") or "failed").replace("_", " "),
            str(item.get("reason") or "no reason was recorded"),
        )
        for item in (content.get("not_measured") or [])
    ]
    saes: list[MeasuredSAE] = []
    for row in content["rows"]:
        saes.append(_measured_sae(row))
        missing += _missing_of_sae(source.label, *saes[-1], row)
    measured = [sae for sae in saes if sae[1]]
    shown = ("model", "data", "seeds", "protocol", "device", "versions")
    protocol = {key: content[key] for key in shown if content.get(key) not in (None, {})}
    hooks = list(dict.fromkeys(facts["hook"] for facts, _ in measured)) or [None]
    definitions = _definitions(content["definitions"])
    evaluation = source.folder / EVALUATION_FOLDER / SUMMARY_FILE
    sets = _by_data_set(evaluation) if evaluation.is_file() else {}
    found: list[Results] = []
    for hook in hooks:
        parts = [str(hook)] if len(hooks) > 1 else []
        parts += [source.label] if labelled else []
        title = TITLES[kind]
        found.append(
            Results(
                name=slug(" ".join([kind, *parts])),
                title=f"{title} ({', '.join(parts)})" if parts else title,
                kind=kind,
                seeds_are="training seeds",
                frame=long_frame([sae for sae in measured if sae[0]["hook"] == hook], definitions),
                definitions=definitions,
                facts=[*([] if hook is None else [("hook", hook)]), *flat_facts(protocol)],
                # Told once, with the first.
                missing=missing if hook == hooks[0] else [],
                reference=content.get("reference"),
                source=source.label,
                sets=sets,
            )
        )
    return found


def _by_data_set(summary: Path) -> dict[tuple[str, str], dict[str, float]]:
    """Values by data set, of SAE and metric, from SAEBench's files of the probing evaluations."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for entry in read_summary(summary)["results"]:
        evaluation = str(entry["evaluation"])
        for name in entry.get("files") or [] if evaluation.startswith("sparse_probing") else []:
            path = summary.parent / str(name)
            details = read_json_object(path).get("eval_result_details") if path.is_file() else None
            for detail in cast("list[Mapping[str, Any]]", details or []):
                for metric, value in finite(detail).items():
                    values = found.setdefault((str(entry["sae"]), f"{evaluation}/{metric}"), {})
                    values.setdefault(str(detail["dataset_name"]), []).append(value)
    return {
        key: {name: sum(values) / len(values) for name, values in sets.items()}
        for key, sets in found.items()
    }


def _measured_sae(row: Mapping[str, Any]) -> MeasuredSAE:
    """Facts and finite metrics of a row of a `comparison.json`; what it lacks is not recorded."""
    facts: dict[str, Any] = {key: row.get(key) for key in FACTS}
    for key in ("l0_target", "lr", "seconds"):
        facts[key] = float(facts[key]) if isinstance(facts[key], (int, float)) else None
    missed = row.get("l0_measured") if row.get("l0_matched") is False else None
    facts.update(
        name=str(row["name"]),
        method=str(row["method"]),
        architecture=str(facts["architecture"] or ""),
        # `control: true` says that it is one, a text says what for.
        control=str(facts["control"]) if facts["control"] else None,
        part=row.get("group"),
        l0_missed=float(missed) if isinstance(missed, (int, float)) else None,
    )
    variant = VARIANTS.get(facts["method"])
    if variant is not None and facts["part"] is None:
        facts.update(
            against=facts["against"] or variant.against,
            part=variant.group,
            mechanism=variant.mechanism,
            claim=facts["claim"] or variant.claim,
        )
    return facts, finite(row["metrics"])


def _missing_of_sae(
    label: str, facts: Facts, metrics: Mapping[str, float], recorded: Mapping[str, Any]
) -> Iterator[Missing]:
    name, missed, target = facts["name"], facts["l0_missed"], facts["l0_target"]
    if not metrics:
        reason = recorded.get("reason") or "the row holds no metric"
        yield Missing(label, name, "not measured", reason)
        return
    if facts["training_steps"] == 0:
        yield Missing(label, name, "never trained", "0 training steps: its numbers are of noise")
    if missed is not None and target is not None:
        reason = f"L0 {missed:.1f} where {target:g} was asked for"
        yield Missing(label, f"{name} at its target L0", "missed", reason)
    lacking = ", ".join(metric for metric in recorded["metrics"] if metric not in metrics)
    if lacking:
        reason = "no finite value recorded"
        yield Missing(label, f"{lacking} of {name}", "not measured", reason)


def _definitions(given: Mapping[str, Any]) -> dict[str, MetricDefinition]:
    return {name: read_definition(value) for name, value in given.items()}


def _scores(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Every number of a summary: SAE, metric, evaluation seed, value."""
    return pd.DataFrame(
        [
            (entry["sae"], f"{entry['evaluation']}/{metric}", int(seed), float(value))
            for entry in results
            for metric, recorded in (entry.get("metrics") or {}).items()
            for seed, value in recorded["per_seed"].items()
        ],
        columns=pd.Index(["sae", "metric", "seed", "value"]),
    )


def _joined(
    found: Sequence[Results], source: Source, known: Mapping[str, TrainedSAE]
) -> list[Results] | None:
    """The results with an evaluation's numbers; None where one of its SAEs is in none of them."""
    homes: dict[str, tuple[str, str]] = {}
    for name, sae in known.items():
        for results in found:
            if results.source == sae.source and sae.recorded_as in set(results.saes["name"]):
                homes[name] = results.name, sae.recorded_as
    # An SAE beside its JumpReLU copy is no one row: they are shown side by side.
    if set(homes) != set(source.content["saes"]) or len(set(homes.values())) < len(homes):
        return None
    content, scores = source.content, _scores(source.content["results"])
    definitions = _definitions(content["metrics"])
    joined: list[Results] = []
    for results in found:
        more, own = (
            results,
            {row: name for name, (home, row) in homes.items() if home == results.name},
        )
        parts = [results.frame]
        for row, facts in results.saes.set_index("name", drop=False).iterrows():
            means = scores[scores["sae"] == own.get(str(row))].groupby("metric")["value"].mean()
            present = set(results.frame.loc[results.frame["name"] == row, "metric"])
            for metric, value in means.items():
                if metric not in present:
                    unit = definitions[str(metric)].unit
                    new = {**facts.to_dict(), "metric": metric, "value": value, "unit": unit}
                    parts.append(pd.DataFrame([new], dtype=object))
        if own:
            told = flat_facts({"evaluated": content.get("created"), **_settings(content)})
            more = replace(
                results,
                frame=pd.concat(parts, ignore_index=True),
                definitions={**definitions, **results.definitions},
                facts=[*results.facts, *((f"{source.label}: {name}", text) for name, text in told)],
                missing=[
                    *results.missing,
                    *_missing_of_evaluation(source.label, content["saes"], content["results"]),
                ],
            )
        joined.append(more)
    return joined


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "evaluation seeds": content.get("seeds"),
        "versions": content.get("versions"),
        "evaluations": (content.get("config") or {}).get("evaluations"),
    }


def _of_evaluation(source: Source, known: Mapping[str, TrainedSAE]) -> Results:
    content = source.content
    measured, seeds_are = _evaluated_saes(content["saes"], content["results"], known)
    definitions = _definitions(content["metrics"])
    hidden = {"per_seed", "weights_sha256"}
    model = {k: v for k, v in (content.get("model") or {}).items() if k not in hidden}
    protocol = {"model": model, "evaluated": content.get("created"), **_settings(content)}
    return Results(
        name=slug(f"evaluation-{source.label}"),
        title=f"Evaluation ({source.label})",
        kind="language_model",
        seeds_are=seeds_are,
        frame=long_frame(measured, definitions),
        definitions=definitions,
        facts=list(flat_facts({key: value for key, value in protocol.items() if value})),
        missing=_missing_of_evaluation(source.label, content["saes"], content["results"]),
        source=source.label,
    )


def _evaluated_saes(
    saes: Mapping[str, Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    known: Mapping[str, TrainedSAE],
) -> tuple[list[MeasuredSAE], str]:
    """Each SAE once where they are of several training seeds, else once per evaluation seed."""
    instances = [(sae.method, sae.l0_target, sae.seed) for sae in known.values()]
    of_seeds = len(known) == len(saes) and len({key[:2] for key in instances}) < len(instances)
    of_seeds = of_seeds and len(set(instances)) == len(instances)
    alone = Counter((sae.method, sae.l0_target) for sae in known.values())
    scores = _scores(results)
    found: list[MeasuredSAE] = []
    for name, record in saes.items():
        sae, own = known.get(name), scores[scores["sae"] == name]
        # Named as the run or comparison names it, unless that is the name of another here too.
        is_named = sae is not None and (of_seeds or alone[sae.method, sae.l0_target] == 1)
        facts = {
            "name": name,
            "method": sae.method if is_named and sae is not None else name,
            "architecture": str(record.get("architecture") or ""),
            "l0_target": None if sae is None else sae.l0_target,
            "training_steps": None if sae is None else sae.steps or None,
        }
        if of_seeds and sae is not None:
            means = own.groupby("metric")["value"].mean()
            found.append(({**facts, "seed": sae.seed}, means.to_dict()))
        else:
            for seed, part in own.groupby("seed"):
                metrics = dict(zip(part["metric"], part["value"], strict=True))
                found.append(({**facts, "seed": seed}, metrics))
    kept = [sae for sae in found if sae[1]]
    return kept, "training seeds" if of_seeds else "evaluation seeds"


def _missing_of_evaluation(
    label: str, saes: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> list[Missing]:
    """One item for all SAEs that lack an evaluation for the same reason."""
    found: list[Missing] = []
    for (evaluation, status, reason), names in unmeasured(results).items():
        who = "all SAEs" if len(names) == len(saes) > 1 else ", ".join(names)
        found.append(Missing(label, f"{evaluation} of {who}", status, reason))
    return found
