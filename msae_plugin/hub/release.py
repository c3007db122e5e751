"""For SAELens' list of releases and for Neuronpedia: the entry and the command, as text."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from msae_plugin.hub.card_data import CardEntry
from msae_plugin.hub.sources import hub_dataset, hub_model
from msae_plugin.reporting import sae_dashboard
from msae_plugin.saes.export import TWIN_FOLDER

_UNKNOWN_DATASET = "DATASET_ON_THE_HUB"


def plain_path(entry: CardEntry) -> str | None:
    """Folder that SAELens loads without this package; None where there is none."""
    if not entry.needs_plugin:
        return entry.folder
    return f"{entry.folder}/{TWIN_FOLDER}" if entry.has_twin else None


def pretrained_saes_stanza(repo: str, entries: Sequence[CardEntry]) -> str:
    """What to add to SAELens' `pretrained_saes.yaml`; the twin stands for what needs this package.

    Args:
        repo: `user/name`.
        entries: SAEs of the release. Those that SAELens alone cannot load are left out.

    Returns:
        YAML, one release per language model; empty when nothing can be listed.
    """
    releases: dict[str, dict[str, Any]] = {}
    for entry in entries:
        path = plain_path(entry)
        if path is None:
            continue
        recorded = entry.recorded("model_name")
        model = hub_model(recorded) or recorded
        release = releases.setdefault(
            model, {"conversion_func": None, "model": model, "repo_id": repo, "saes": []}
        )
        listed: dict[str, Any] = {"id": entry.folder, "path": path}
        if entry.l0 is not None:
            listed["l0"] = round(entry.l0, 1)
        scores = {score.metric: score.mean for score in entry.scores("core")}
        for name in ("explained_variance_streaming", "explained_variance_legacy"):
            if name in scores:
                listed.setdefault("variance_explained", round(scores[name], 4))
        release["saes"].append(listed)
    name = repo.replace("/", "-")
    named = {
        name if len(releases) == 1 else f"{name}-{model.rsplit('/', 1)[-1]}": release
        for model, release in releases.items()
    }
    return yaml.safe_dump(named, sort_keys=False) if named else ""


def dashboard_command(repo: str, entry: CardEntry) -> str | None:
    """The SAEDashboard command that makes Neuronpedia's files for one SAE.

    Args:
        repo: `user/name`.
        entry: The SAE.

    Returns:
        A line for a shell (arguments of sae-dashboard 0.8), None where SAELens alone cannot load
        the SAE.
    """
    path = plain_path(entry)
    if path is None:
        return None
    context = entry.metadata.get("context_size")
    words = [
        "python", "-m", "sae_dashboard.neuronpedia.neuronpedia_runner",
        "--sae-set", repo,
        "--sae-path", path,
        "--np-set-name", repo.split("/", 1)[1].lower(),
        "--dataset-path", hub_dataset(_dataset(entry)) or _UNKNOWN_DATASET,
        *(() if context is None else ("--n-tokens-in-prompt", str(context))),
        "--output-dir", "neuronpedia_outputs/",
    ]  # fmt: skip
    return shlex.join(words)


def _dataset(entry: CardEntry) -> str | None:
    value = entry.metadata.get("dataset_path")
    return None if value is None else str(value)


def dashboard_hint() -> str:
    """What is needed to run the command."""
    if sae_dashboard.is_installed():
        return "SAEDashboard is installed here"
    return f"SAEDashboard is not installed here: {sae_dashboard.INSTALL}"
