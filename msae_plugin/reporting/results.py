"""Results of comparisons, evaluations and demos: measurements, definitions, what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from msae_plugin.reporting.document import slug
from msae_plugin.reporting.measurements import (
    FACTS,
    Definition,
    Missing,
    Results,
    long_frame,
    read_definition,
)
from msae_plugin.reporting.sources import (
    VARIANTS,
    RunSource,
    Source,
    Sources,
    TrainedSAE,
    finite,
    flat_facts,
    run_l0_target,
)

Facts = Mapping[str, Any]
MeasuredSAE = tuple[Facts, Mapping[str, float]]

_TITLES = {"language_model": "Language model", "ground_truth": "Ground truth"}
# What a comparison may say of itself beside rows and definitions.
_PROTOCOL_KEYS = ("model", "data", "seeds", "protocol", "device", "versions")
_NOT_PROTOCOL = {"per_seed", "weights_sha256"}


def results_of(sources: Sources, trained: Sequence[TrainedSAE]) -> list[Results]:
    """Everything that was measured; `trained` tells which SAEs an evaluation measured."""
    several = len(sources.comparisons) > 1
    found: list[Results] = []
    for source in sources.comparisons:
        found += _of_comparison(source, labelled=several)
    by_hash: dict[str, TrainedSAE] = {}
    if sources.evaluations:
        by_hash = {digest: sae for sae in trained for digest in sae.weight_hashes()}
    found += [_of_evaluation(source, by_hash) for source in sources.evaluations]
    found += [_of_demo(run, run.demo) for run in sources.runs if run.demo is not None]
    names = [results.name for results in found]
    for name in names:
        if names.count(name) > 1:
            # Ids and file names are made of it.
            raise ValueError(f"two sets of results are called {name!r}")
    return found


def _of_comparison(source: Source, *, labelled: bool) -> list[Results]:
    """Results by hook: SAEs that read elsewhere are not compared."""
    content = source.content
    kind = str(content["kind"])
    recorded = content["rows"]
    missing = [
        Missing(
            source.label,
            str(entry.get("what") or entry.get("name") or "something"),
            str(entry.get("status") or "failed").replace("_", " "),
            str(entry.get("reason") or "no reason was recorded"),
        )
        for entry in (content.get("not_measured") or [])
    ]
    saes: list[MeasuredSAE] = []
    for values in recorded:
        saes.append(_measured_sae(values))
        missing += _missing_of_sae(source.label, *saes[-1], values)
    measured = [sae for sae in saes if sae[1]]
    protocol = {key: content[key] for key in _PROTOCOL_KEYS if content.get(key) not in (None, {})}
    hooks = list(dict.fromkeys(facts["hook"] for facts, _ in measured)) or [None]
    definitions = _definitions(content["definitions"])
    found: list[Results] = []
    for hook in hooks:
        parts = [str(hook)] if len(hooks) > 1 else []
        parts += [source.label] if labelled else []
        title = _TITLES[kind]
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
            )
        )
    return found


def _measured_sae(values: Mapping[str, Any]) -> MeasuredSAE:
    """Facts and finite metrics of a row of a `comparison.json`; what it lacks is not recorded."""
    facts: dict[str, Any] = {key: values.get(key) for key in FACTS}
    for key in ("l0_target", "lr", "seconds"):
        facts[key] = float(facts[key]) if isinstance(facts[key], (int, float)) else None
    control = facts["control"]
    missed = values.get("l0_measured") if values.get("l0_matched") is False else None
    facts.update(
        name=str(values["name"]),
        method=str(values["method"]),
        architecture=str(facts["architecture"] or ""),
        # `control: true` says that it is one, a text says what for.
        control=str(control) if control else None,
        part=values.get("group"),
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
    return facts, finite(values["metrics"])


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
    unmeasured = ", ".join(metric for metric in recorded["metrics"] if metric not in metrics)
    if unmeasured:
        reason = "no finite value recorded"
        yield Missing(label, f"{unmeasured} of {name}", "not measured", reason)


def _definitions(given: Mapping[str, Any]) -> dict[str, Definition]:
    return {name: read_definition(name, value) for name, value in given.items()}


def _of_evaluation(source: Source, by_hash: Mapping[str, TrainedSAE]) -> Results:
    content = source.content
    saes = content["saes"]
    results = content["results"]
    known = {
        name: by_hash[str(record.get("weights_sha256"))]
        for name, record in saes.items()
        if str(record.get("weights_sha256")) in by_hash
    }
    measured, seeds_are = _evaluated_saes(saes, results, known)
    definitions = _definitions(content["metrics"])
    model = content.get("model") or {}
    protocol = {
        "model": {k: v for k, v in model.items() if k not in _NOT_PROTOCOL},
        "evaluated": content.get("created"),
        "evaluation seeds": content.get("seeds"),
        "versions": content.get("versions"),
        "evaluations": (content.get("config") or {}).get("evaluations"),
    }
    return Results(
        name=slug(f"evaluation-{source.label}"),
        title=f"Evaluation ({source.label})",
        kind="language_model",
        seeds_are=seeds_are,
        frame=long_frame(measured, definitions),
        definitions=definitions,
        facts=list(flat_facts({key: value for key, value in protocol.items() if value})),
        missing=_missing_of_evaluation(source.label, saes, results),
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
    scores = pd.DataFrame(
        [
            (entry["sae"], f"{entry['evaluation']}/{metric}", int(seed), float(value))
            for entry in results
            for metric, recorded in (entry.get("metrics") or {}).items()
            for seed, value in recorded["per_seed"].items()
        ],
        columns=pd.Index(["sae", "metric", "seed", "value"]),
    )
    found: list[MeasuredSAE] = []
    for name, record in saes.items():
        sae, own = known.get(name), scores[scores["sae"] == name]
        facts = {
            "name": name,
            "method": name,
            "architecture": str(record.get("architecture") or ""),
            "l0_target": None if sae is None else sae.l0_target,
            "training_steps": None if sae is None else sae.steps or None,
        }
        if of_seeds and sae is not None:
            means = own.groupby("metric")["value"].mean()
            found.append(({**facts, "method": sae.method, "seed": sae.seed}, means.to_dict()))
        else:
            for seed, part in own.groupby("seed"):
                metrics = dict(zip(part["metric"], part["value"], strict=True))
                found.append(({**facts, "seed": seed}, metrics))
    kept = [sae for sae in found if sae[1]]
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


def _of_demo(run: RunSource, demo: Mapping[str, Any]) -> Results:
    comparison = demo.get("comparison") or {}
    texts = comparison.get("definitions") or {}
    settings = demo.get("settings") or {}
    records = run.content["saes"]
    evaluated = comparison.get("saes") or []
    saes: list[MeasuredSAE] = []
    missing: list[Missing] = []
    for values in evaluated:
        name = str(values["name"])
        record = records.get(name, {})
        row = {
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
        saes.append(_measured_sae(row))
        missing += _missing_of_sae(run.label, *saes[-1], row)
    n_tokens = evaluated[0].get("n_tokens", 0) if evaluated else 0
    definitions = {
        f"heldout/{key}": _demo_definition(f"heldout/{key}", text, f"{n_tokens:,} held-out tokens")
        for key, text in texts.items()
    }
    return Results(
        name=slug(f"heldout-{run.label}"),
        title=f"Held-out text ({run.label})",
        kind="language_model",
        seeds_are="training seeds",
        frame=long_frame([sae for sae in saes if sae[1]], definitions),
        definitions=definitions,
        facts=list(flat_facts({k: v for k, v in settings.items() if v is not None})),
        missing=missing,
    )


def _demo_definition(name: str, text: str, tokens: str) -> Definition:
    """demo.json has one sentence per metric, which ends in which way is better."""
    sentence, _, direction = text.partition("; ")
    higher = {"higher": True, "lower": False}.get(direction.split(" ")[0] if direction else "")
    return Definition(name, sentence, "", tokens, "msae", higher)
