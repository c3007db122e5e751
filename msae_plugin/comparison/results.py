"""`comparison.json`: one row per SAE, what its numbers mean, and what was not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import versions, write_json_atomic
from msae_plugin.common.stored import StoredMetrics, read_json_object
from msae_plugin.comparison.methods import Control
from msae_plugin.comparison.recipe import SYNTHETIC_HOOK, CompareConfig
from msae_plugin.evaluation.outcomes import definitions

COMPARISON_FILE = "comparison.json"
FORMAT = 1
_VERSIONS = (
    "msae-plugin", "sae-lens", "sae-bench", "sae-probes", "transformer-lens", "torch",
    "transformers", "datasets",
)  # fmt: skip


@dataclass
class Measured:
    """Measurements of the SAEs of a comparison."""

    # By SAE and `evaluation/metric`
    metrics: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    # Of metrics that are not a comparison's own
    definitions: dict[str, Any] = field(default_factory=dict[str, Any])
    # What was not measured: `what`, `status` and `reason`
    missing: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    def add(self, name: str, metrics: Mapping[str, float]) -> None:
        """Add numbers of one SAE."""
        self.metrics.setdefault(name, {}).update(metrics)

    def miss(self, what: str, status: str, reason: str) -> None:
        """Add what was not measured."""
        self.missing.append({"what": what, "status": status, "reason": reason})


def store_metrics(path: Path, key: str, metrics: Mapping[str, float]) -> None:
    """Keep an SAE's numbers under a key of everything that they depend on."""
    write_json_atomic(path, {"key": key, "metrics": dict(metrics)})


def stored_metrics(path: Path, key: str) -> dict[str, float] | None:
    """What `store_metrics` kept under this key; None without it."""
    try:
        stored = read_json_object(path, StoredMetrics)
    except InputError:
        return None
    return cast("dict[str, float]", stored["metrics"]) if stored["key"] == key else None


def training_metrics(record: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, float]:
    """`training/...` of an SAE from its `run.json`."""
    final: Mapping[str, Any] = record["saes"][row["name"]]["final"]
    found = {
        "training/final_loss": final.get("loss"),
        "training/explained_variance": final.get("explained_variance"),
        "training/dead_latents": final.get("dead_latents"),
        "training/step_ms": 1000 * row["seconds"] / row["training_steps"],
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def control_row(control: Control, d_in: int) -> dict[str, Any]:
    """The row of a control that was made and not trained."""
    entry = control.of
    return {
        "name": control.name,
        "method": control.method,
        "architecture": "identity" if entry is None else "permuted",
        "preset": None,
        "hook": None if control.hook == SYNTHETIC_HOOK else control.hook,
        "l0_target": None if entry is None else entry.l0,
        "seed": None if entry is None else entry.seed,
        "lr": None,
        "folder": None,
        "training_steps": None,
        "training_tokens": None,
        "search_tokens": 0,
        "seconds": None,
        "control": (
            f"the residual stream itself, {d_in} latents"
            if entry is None
            else f"{entry.name} with its decoder rows permuted"
        ),
    }


def comparison_contents(
    config: CompareConfig,
    rows: Sequence[Mapping[str, Any]],
    measured: Measured,
    record: Mapping[str, Any],
    device: str,
    failures: Mapping[str, str],
) -> dict[str, Any]:
    """The contents of `comparison.json`."""
    full: list[dict[str, Any]] = []
    for row in rows:
        if not row["control"] and not row["training_steps"]:
            raise RunFailure(
                f"SAE {row['name']!r} has zero training steps: nothing is reported of it; delete "
                f"{row['folder']} and compare again"
            )
        metrics = measured.metrics.get(str(row["name"]), {})
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise RunFailure(f"SAE {row['name']!r}: {bad[0]} is {metrics[bad[0]]}")
        full.append({**row, "metrics": dict(metrics)})
    names = {name for row in full for name in row["metrics"]}
    own = {
        name: asdict(found) for name, found in definitions("comparison").items() if name in names
    }
    missing = [
        {"what": name, "status": "failed", "reason": reason} for name, reason in failures.items()
    ]
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kind": config.kind,
        "config": config.to_dict(),
        "versions": versions(*_VERSIONS),
        **record,
        "device": device,
        "seeds": list(config.seeds),
        "reference": config.reference,
        "protocol": _protocol(config),
        "rows": full,
        "definitions": {**own, **measured.definitions},
        "not_measured": [*missing, *measured.missing],
    }


def _protocol(config: CompareConfig) -> dict[str, Any]:
    training = config.training
    facts: dict[str, Any] = {
        "target L0": list(config.l0),
        "training tokens per SAE": training.tokens,
        "mini-batch": training.batch_size_tokens,
        "learning rate": training.lr,
        "threshold": "set so that the mean L0 on fresh activations is the target",
        "seeds": "initialisation, order of the activations, what an SAE draws"
        + (
            "; each seed has a ground truth of its own"
            if config.synthetic is not None and config.synthetic.new_model_per_seed
            else ""
        ),
        "search tokens": "of the search of a coefficient, shared by the seeds of a method and L0",
    }
    if config.synthetic is not None:
        facts["judged on"] = f"{config.synthetic.eval_samples:,} samples"
    else:
        facts["held-out tokens"] = config.heldout.tokens
        facts["held-out tokens for losses"] = config.heldout.loss_tokens
    return facts
