"""A comparison on ground truth: samples made as they are needed, features that are known.

Batch `number` of a seed is drawn from a random stream of its own, so that it can be had again.

Making samples is most of the cost of judging an SAE on two cores (72 % at 2048 features); all SAEs
of a seed are judged on the same ones anyway. Latent features are sparse, so they are kept sparse.

OUTPUT/ground_truth/<name>.json holds each SAE's numbers under a key of everything they depend on.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from sae_lens.synthetic import (
    ActivationGenerator,
    SyntheticModel,
    SyntheticModelConfig,
    eval_sae_on_synthetic_data,
)

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import human_bytes, key_digest, tensors_sha256
from msae_plugin.common.interruption import InterruptionGuard
from msae_plugin.common.progress import Report
from msae_plugin.common.recipes import unknown_key_message
from msae_plugin.common.seeding import RandomStream, derive_seed
from msae_plugin.comparison.activations import SAMPLE_TOKENS
from msae_plugin.comparison.methods import Entry, Expansion, sae_folder, with_permuted_decoder
from msae_plugin.comparison.recipe import SYNTHETIC_HOOK, CompareConfig, SyntheticSettings
from msae_plugin.comparison.results import Measured, store_metrics, stored_metrics
from msae_plugin.evaluation.heldout import mean_max_decoder_cosine
from msae_plugin.evaluation.outcomes import require_real
from msae_plugin.saes.export import SAE_FOLDER
from msae_plugin.saes.health import dense_share, encoder_decoder_alignment
from msae_plugin.training.plans import default_device, require_room


def model_config(section: SyntheticSettings) -> SyntheticModelConfig:
    """SAELens' configuration of the ground truth."""
    known = {item.name for item in dataclasses.fields(SyntheticModelConfig)}
    for key in section.model:
        if key not in known:
            raise InputError(unknown_key_message(key, known, "synthetic.model"))
    for key in ("num_features", "hidden_dim", "firing_probability", "seed"):
        if section.model.get(key) is None:
            raise InputError(f"'synthetic.model.{key}' is missing")
    try:
        return SyntheticModelConfig.from_dict(copy.deepcopy(section.model))
    # SAELens checks some values, and leaves others to its dataclasses and registries.
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"'synthetic.model': {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


class SyntheticSource:
    """Ground-truth models and their samples, `batch_size` per mini-batch."""

    def __init__(self, section: SyntheticSettings, batch_size: int) -> None:
        self.config = model_config(section)
        self.device = default_device(section.device)
        self.side_by_side = section.saes_at_once
        self._section = section
        self._batch_size = batch_size
        # The model of the seed that was asked for last: seeds are trained one after another.
        self._model: tuple[int, SyntheticModel] | None = None

    def model(self, seed: int) -> SyntheticModel:
        """The ground truth of a seed."""
        own = self._section.new_model_per_seed
        model_seed = cast("int", self.config.seed) + (seed if own else 0)
        if self._model is None or self._model[0] != model_seed:
            config = dataclasses.replace(self.config, seed=model_seed)
            # Features are made orthogonal by gradient descent, with a progress bar.
            with torch.enable_grad(), contextlib.redirect_stderr(io.StringIO()):
                self._model = model_seed, SyntheticModel(config, device=self.device)
        return self._model[1]

    def stream(self, seed: int, *labels: str) -> RandomStream:
        """Random numbers for one purpose."""
        return RandomStream(derive_seed(seed, "ground truth", *labels), self.device)

    def d_in(self, _hook: str) -> int:
        """Width of the samples."""
        return self.config.hidden_dim

    def batch(self, _hook: str, seed: int, number: int) -> torch.Tensor:
        """Batch `number` of the seed."""
        return self._sample(seed, "train", number, self._batch_size)

    def fresh(self, _hook: str, seed: int, count: int) -> list[torch.Tensor]:
        """Batches from streams that training does not draw from."""
        return [self._sample(seed, "fresh", n, self._batch_size) for n in range(count)]

    def samples(self, _hook: str, seed: int) -> torch.Tensor:
        """Samples for the export check."""
        return self._sample(seed, "check", 0, SAMPLE_TOKENS).float()

    @torch.no_grad()
    def _sample(self, seed: int, purpose: str, number: int, count: int) -> torch.Tensor:
        model = self.model(seed)
        kind = torch.device(self.device).type
        with (
            self.stream(seed, purpose, str(number)).active(),
            torch.autocast(kind, dtype=torch.bfloat16, enabled=self._section.autocast),
        ):
            return model.sample(count)

    def describe(self, metadata: SAEMetadata, _hook: str) -> None:
        """There is no language model to name."""
        metadata.dataset_path = "sae_lens.synthetic"

    def record(self) -> dict[str, Any]:
        """The ground truth's configuration."""
        described = (
            f"ground truth: {self.config.num_features:,} features in {self.config.hidden_dim} "
            f"dimensions, seed {self.config.seed}"
            + (" + the SAE's seed" if self._section.new_model_per_seed else "")
        )
        model: Mapping[str, Any] = self.config.to_dict()
        return {
            "model": {"name": "sae_lens.synthetic", **model},
            "data": {"description": described},
        }


class RecordedSamples:
    """Recorded samples in place of a generator; from the beginning again with `rewind`.

    Batches are sparse feature activations (n_samples, n_features) in the order of the draw.
    """

    def __init__(self, batches: Sequence[torch.Tensor]) -> None:
        self._batches = list(batches)
        self._next = 0

    @classmethod
    def record(
        cls, generator: ActivationGenerator, n_samples: int, batch_size: int
    ) -> RecordedSamples:
        """Draw `n_samples` in batches of `batch_size`, the last one smaller, as SAELens does."""
        sizes = [batch_size] * (n_samples // batch_size)
        if n_samples % batch_size:
            sizes.append(n_samples % batch_size)
        with torch.no_grad():
            return cls([generator.sample(size).to_sparse() for size in sizes])

    def rewind(self) -> ActivationGenerator:
        """Begin again; itself, as the generator it stands for: SAELens calls `sample` alone."""
        self._next = 0
        return cast("ActivationGenerator", self)

    def first(self, n_batches: int) -> list[torch.Tensor]:
        """The first batches, sparse."""
        return self._batches[:n_batches]

    def sample(self, n_samples: int) -> torch.Tensor:
        """The next batch, dense (n_samples, n_features); ValueError if not recorded so."""
        if self._next == len(self._batches):
            raise ValueError(f"only {len(self._batches)} batches were recorded")
        batch = self._batches[self._next]
        if batch.shape[0] != n_samples:
            raise ValueError(f"batch of {batch.shape[0]} samples recorded, {n_samples} asked for")
        self._next += 1
        return batch.to_dense()


FOLDER = "ground_truth"
_SPARSE_ENTRY_BYTES = 2 * torch.int64.itemsize + torch.float32.itemsize
_BATCHES_FOR_DENSE_SHARE = 4


@dataclass(frozen=True)
class Candidate:
    """An exported SAE to judge."""

    name: str
    entry: Entry  # What it is, or is made of
    permuted: bool = False  # Its decoder directions belong to other latents: a control


class GroundTruthTestbed:
    """Samples, metrics and controls of a comparison on ground truth."""

    def __init__(self, config: CompareConfig, output: Path, report: Report) -> None:
        if config.synthetic is None:
            raise InputError("there is no 'synthetic' in the recipe")
        self.config = config
        self.output = output
        self._report = report
        self._section = config.synthetic
        self._source = SyntheticSource(config.synthetic, config.training.batch_size_tokens)
        self.device = self._source.device

    def check(self) -> None:
        """Refuse features and batches of samples that this machine cannot hold."""
        model, section = self._source.config, self._section
        row = torch.float32.itemsize * (model.num_features + model.hidden_dim)
        sizes = {
            "synthetic.model.num_features": torch.float32.itemsize
            * model.num_features
            * model.hidden_dim,
            "training.batch_size_tokens": self.config.training.batch_size_tokens * row,
            "synthetic.eval_batch_size": min(section.eval_batch_size, section.eval_samples) * row,
            # Of every one at least a feature is kept: two int64 indices and a value.
            "synthetic.eval_samples": section.eval_samples * _SPARSE_ENTRY_BYTES,
        }
        for name, needed in sizes.items():
            what = f"{name} takes {human_bytes(needed)} at once"
            require_room(needed, self.device, what, name)

    def widths(self) -> dict[str, int]:
        """Width of the samples."""
        return {SYNTHETIC_HOOK: self._source.d_in(SYNTHETIC_HOOK)}

    def source(self, guard: InterruptionGuard) -> SyntheticSource:
        """The samples."""
        del guard
        self._report("making the ground truth")
        return self._source

    def measure(
        self,
        expansion: Expansion,
        trained: Sequence[Entry],
        source: Mapping[str, Any],
        *,
        evaluations: bool = True,
    ) -> Measured:
        """SAELens' metrics of the trained SAEs and the controls; there are no evaluations."""
        del source, evaluations
        controls = [
            Candidate(control.name, control.of, permuted=True)
            for control in expansion.controls
            if control.of is not None and control.of in trained
        ]
        candidates = [Candidate(entry.name, entry) for entry in trained]
        return Measured(self._metrics([*candidates, *controls]))

    def _metrics(self, candidates: Sequence[Candidate]) -> dict[str, dict[str, float]]:
        """Metrics of every SAE by name; what was measured before is read."""
        folder = self.output / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        found: dict[str, dict[str, float]] = {}
        samples: tuple[int, RecordedSamples] | None = None
        # By seed: a ground truth of each seed's own is made once.
        for number, candidate in enumerate(sorted(candidates, key=lambda one: one.entry.seed)):
            self._report("judging against the ground truth", number, len(candidates))
            sae, seed = self._load(candidate), candidate.entry.seed
            key = self._key(seed, sae)
            path = folder / f"{candidate.name}.json"
            stored = stored_metrics(path, key)
            if stored is None:
                if samples is None or samples[0] != seed:
                    samples = seed, self._record_samples(seed)
                stored = self._judge(sae, seed, samples[1])
                require_real(stored, f"SAE {candidate.name!r}")
                store_metrics(path, key, stored)
            found[candidate.name] = stored
        return found

    def _load(self, candidate: Candidate) -> SAE[Any]:
        folder = sae_folder(self.output, candidate.entry.name) / SAE_FOLDER
        sae = SAE.load_from_disk(folder, device=self.device)
        if not candidate.permuted:
            return sae
        return with_permuted_decoder(sae, derive_seed(candidate.entry.seed, "permuted decoder"))

    def _record_samples(self, seed: int) -> RecordedSamples:
        """The samples on which all SAEs of a seed are judged."""
        section, source = self._section, self._source
        with source.stream(self.config.training.seed, "evaluation", str(seed)).active():
            generator = source.model(seed).activation_generator
            return RecordedSamples.record(generator, section.eval_samples, section.eval_batch_size)

    def _judge(self, sae: SAE[Any], seed: int, samples: RecordedSamples) -> dict[str, float]:
        """`ground_truth/...` of one SAE on recorded samples of its seed."""
        result = eval_sae_on_synthetic_data(
            sae,
            self._source.model(seed).feature_dict,
            samples.rewind(),
            num_samples=self._section.eval_samples,
            batch_size=self._section.eval_batch_size,
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
        values["dense_share"] = self._dense_share(sae, seed, samples)
        alignment = encoder_decoder_alignment(sae, torch.ones(sae.cfg.d_sae, dtype=torch.bool))
        if alignment is not None:
            values["encoder_decoder_alignment"] = alignment
        return {f"ground_truth/{name}": float(value) for name, value in values.items()}

    @torch.no_grad()
    def _dense_share(self, sae: SAE[Any], seed: int, samples: RecordedSamples) -> float:
        """Over the first batches: SAELens does not hand out its firing rates."""
        model, firings, count = self._source.model(seed), torch.zeros(sae.cfg.d_sae), 0
        for batch in samples.first(_BATCHES_FOR_DENSE_SHARE):
            features = batch.to_dense()
            latents = sae.encode(model.feature_dict(features).to(sae.device, sae.dtype))
            firings += (latents != 0).sum(0).float().cpu()
            count += len(features)
        return float(dense_share(firings, count))

    def _key(self, seed: int, sae: SAE[Any]) -> str:
        section = self._section
        return key_digest(
            {
                "model": section.model,
                "own": section.new_model_per_seed,
                "samples": [section.eval_samples, section.eval_batch_size],
                "seeds": [self.config.training.seed, seed],
                "sae": tensors_sha256(sae.state_dict()),
            }
        )
