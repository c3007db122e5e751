"""SAELens' own evaluation of exported SAEs against the features that are known to be there.

OUTPUT/ground_truth/<name>.json holds each SAE's numbers under a key of everything they depend on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sae_lens import SAE
from sae_lens.synthetic import eval_sae_on_synthetic_data

from msae_plugin.common.cache import key_digest, tensors_sha256
from msae_plugin.common.files import write_json_atomic
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.comparison.recorded_samples import RecordedSamples
from msae_plugin.comparison.synthetic_source import SyntheticSource
from msae_plugin.evaluation.decoder_overlap import mean_max_decoder_cosine
from msae_plugin.evaluation.outcomes import Reporter, require_real

FOLDER = "ground_truth"


@dataclass(frozen=True)
class Candidate:
    """An exported SAE to judge.

    Args:
        name: Unique.
        seed: Whose ground truth it was trained on.
        load: Gives the SAE.
    """

    name: str
    seed: int
    load: Callable[[], SAE[Any]]


def measure_ground_truth(
    config: CompareConfig,
    output: Path,
    candidates: Sequence[Candidate],
    source: SyntheticSource,
    report: Reporter,
) -> dict[str, dict[str, float]]:
    """Metrics of every SAE by name; what was measured before is read.

    Args:
        config: The comparison, of ground truth.
        output: Its folder.
        candidates: The SAEs.
        source: The ground truth.
        report: Shows progress.

    Raises:
        RunFailure: A metric is not a number.
    """
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, float]] = {}
    samples: tuple[int, RecordedSamples] | None = None
    # By seed: a ground truth of each seed's own is made once.
    for number, candidate in enumerate(sorted(candidates, key=lambda one: one.seed)):
        report("judging against the ground truth", number, len(candidates))
        sae = candidate.load()
        key = _key(config, candidate, sae)
        path = folder / f"{candidate.name}.json"
        stored = _stored(path, key)
        if stored is None:
            if samples is None or samples[0] != candidate.seed:
                samples = candidate.seed, record_samples(config, source, candidate.seed)
            stored = judge(config, source, sae, candidate.seed, samples[1])
            require_real(stored, f"SAE {candidate.name!r}")
            write_json_atomic(path, {"key": key, "metrics": stored})
        found[candidate.name] = stored
    return found


def record_samples(config: CompareConfig, source: SyntheticSource, seed: int) -> RecordedSamples:
    """The samples on which all SAEs of a seed are judged."""
    section = config.synthetic
    assert section is not None, "only a comparison on ground truth is judged so"
    with source.stream(config.training.seed, "evaluation", str(seed)).active():
        return RecordedSamples.record(
            source.model(seed).activation_generator, section.eval_samples, section.eval_batch_size
        )


def judge(
    config: CompareConfig,
    source: SyntheticSource,
    sae: SAE[Any],
    seed: int,
    samples: RecordedSamples,
) -> dict[str, float]:
    """`ground_truth/...` of one SAE on recorded samples of its seed."""
    section = config.synthetic
    assert section is not None, "as in record_samples"
    result = eval_sae_on_synthetic_data(
        sae,
        source.model(seed).feature_dict,
        samples.rewind(),
        num_samples=section.eval_samples,
        batch_size=section.eval_batch_size,
    )
    classified = result.classification
    values = {
        "f1": classified.f1_score,
        "precision": classified.precision,
        "recall": classified.recall,
        "mcc": result.mcc,
        "uniqueness": result.uniqueness,
        "explained_variance": result.explained_variance,
        "shrinkage": result.shrinkage,
        "dead_latents": result.dead_latents,
        "dead_share": result.dead_latents / sae.cfg.d_sae,
        "l0": result.sae_l0,
        "true_l0": result.true_l0,
        "mean_max_decoder_cosine": mean_max_decoder_cosine(sae.W_dec),
    }
    return {f"ground_truth/{name}": float(value) for name, value in values.items()}


def _key(config: CompareConfig, candidate: Candidate, sae: SAE[Any]) -> str:
    section = config.synthetic
    assert section is not None, "as in judge"
    return key_digest(
        {
            "model": section.model,
            "own": section.new_model_per_seed,
            "samples": [section.eval_samples, section.eval_batch_size],
            "seeds": [config.training.seed, candidate.seed],
            "sae": tensors_sha256(sae.state_dict()),
        }
    )


def _stored(path: Path, key: str) -> dict[str, float] | None:
    try:
        stored: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cast("dict[str, float]", stored["metrics"]) if stored.get("key") == key else None
