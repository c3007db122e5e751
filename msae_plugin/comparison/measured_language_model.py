"""Held-out metrics of the SAEs of a language model, and latents in context.

OUTPUT/heldout/<name>.json holds each SAE's numbers under a key of everything they depend on: what
has been measured is not measured again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from msae_plugin.common.cache import key_digest
from msae_plugin.common.files import write_json_atomic
from msae_plugin.comparison.methods import sae_folder
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.data.windows import Window, iterate_windows
from msae_plugin.evaluation.context_rendering import contexts_as_json
from msae_plugin.evaluation.contexts import ContextCollector
from msae_plugin.evaluation.heldout import HeldoutMetrics, LatentBatch, evaluate_many
from msae_plugin.evaluation.outcomes import Reporter
from msae_plugin.models.loading import LanguageModel
from msae_plugin.saes.load import Subject

FOLDER = "heldout"
CONTEXTS_FILE = "contexts.json"
# Every group costs one run of the model over the held-out text, half a minute of a slow core for
# 20,000 tokens; a kill costs what was measured of a group.
_AT_ONCE = 32
_CONTEXTS_PER_LATENT = 5


@dataclass(frozen=True)
class HeldoutText:
    """What the SAEs are judged on.

    Args:
        language_model: The model.
        texts: Held-out documents.
        autocast: Whether the model runs in bfloat16, as it did for the training activations.
        hooks: Hook of each SAE, as the model knows it.
    """

    language_model: LanguageModel
    texts: Sequence[str]
    autocast: bool
    hooks: Mapping[str, str]


def heldout_keys(
    config: CompareConfig, activations_key: str, subjects: Sequence[Subject]
) -> dict[str, str]:
    """A digest of everything that an SAE's held-out metrics depend on, by name."""
    heldout = config.heldout
    shared = [activations_key, heldout.tokens, heldout.loss_tokens]
    return {s.name: key_digest({"shared": shared, "sae": s.weights_sha256}) for s in subjects}


def stored_heldout(output: Path, keys: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Metrics by name, of the SAEs that were measured with these keys."""
    found: dict[str, dict[str, float]] = {}
    for name, key in keys.items():
        try:
            stored = json.loads((output / FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if stored.get("key") == key:
            found[name] = cast("dict[str, float]", stored["metrics"])
    return found


def measure_heldout(
    config: CompareConfig,
    output: Path,
    subjects: Sequence[Subject],
    keys: Mapping[str, str],
    text: HeldoutText,
    with_contexts: Sequence[str],
    report: Reporter,
) -> None:
    """Measure SAEs and store what was found, a few at a time.

    Args:
        config: The comparison.
        output: Its folder.
        subjects: The SAEs.
        keys: From `heldout_keys`.
        text: Model and text.
        with_contexts: Names of those whose top activating contexts go to their folders.
        report: Shows progress.

    Raises:
        InputError: There is too little held-out text.
    """
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(subjects), _AT_ONCE):
        group = subjects[start : start + _AT_ONCE]
        message = f"held-out text: SAEs {start + 1} to {start + len(group)} of {len(subjects)}"
        collectors = {
            subject.name: ContextCollector(
                subject.sae.cfg.d_sae, config.data.context_size, _CONTEXTS_PER_LATENT
            )
            for subject in group
            if subject.name in with_contexts
        }
        report(message, 0, config.heldout.tokens)
        found = _evaluate(config, group, text, collectors, report, message)
        _write_contexts(config, output, group, collectors, text)
        for name, metrics in found.items():
            write_json_atomic(
                folder / f"{name}.json", {"key": keys[name], "metrics": as_metrics(metrics)}
            )


def as_metrics(found: HeldoutMetrics) -> dict[str, float]:
    """`heldout/...` by name; what could not be measured is left out."""
    values: dict[str, Any] = found.to_dict()
    for count in ("d_sae", "n_tokens", "n_loss_tokens"):
        values.pop(count)
    values["dead_share"] = found.dead_latents / found.d_sae
    return {f"heldout/{key}": float(value) for key, value in values.items() if value is not None}


def _evaluate(
    config: CompareConfig,
    group: Sequence[Subject],
    text: HeldoutText,
    collectors: Mapping[str, ContextCollector],
    report: Reporter,
    message: str,
) -> dict[str, HeldoutMetrics]:
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        report(message, min(done, config.heldout.tokens), config.heldout.tokens)

    def observe(batch: LatentBatch) -> None:
        if batch.name in collectors:
            collectors[batch.name].update(batch)

    return evaluate_many(
        {subject.name: subject.sae for subject in group},
        text.language_model,
        {subject.name: text.hooks[subject.name] for subject in group},
        text.texts,
        context_size=config.data.context_size,
        max_tokens=config.heldout.tokens,
        max_loss_tokens=config.heldout.loss_tokens,
        prepend_bos=config.data.prepend_bos,
        autocast=text.autocast,
        observer=observe if collectors else None,
        progress=advance,
    )


def _write_contexts(
    config: CompareConfig,
    output: Path,
    group: Sequence[Subject],
    collectors: Mapping[str, ContextCollector],
    text: HeldoutText,
) -> None:
    if not collectors:
        return
    windows = _windows(config, text)
    for subject in group:
        collector = collectors.get(subject.name)
        if collector is None:
            continue
        decoder = subject.sae.W_dec
        latents = collector.strongest(decoder, config.heldout.contexts)
        profiles = collector.profiles(latents, decoder, windows, text.language_model.tokenizer)
        write_json_atomic(
            sae_folder(output, subject.name) / CONTEXTS_FILE,
            {"latents": contexts_as_json(profiles)},
        )


def _windows(config: CompareConfig, text: HeldoutText) -> list[Window]:
    model, size = text.language_model, config.data.context_size
    windows = iterate_windows(
        model.model, model.tokenizer, text.texts, size, prepend_bos=config.data.prepend_bos
    )
    return list(islice(windows, max(1, config.heldout.tokens // size)))
