"""[C] Rank-r sketch of the co-activation matrix C = E[f f^T], never formed.

Y = C Omega is linear in C, so its running mean over batches is exact, and costs O(tokens d_sae r)
per batch. The Nystrom approximation C ~ Y (Omega^T Y)^+ Y^T recovers C (Tropp et al. 2017,
arXiv 1706.05736, algorithm 3); its error is measured on random probes that it has not seen.
"""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Self, override

from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.mechanisms.base import Latents, Mechanism, Step
from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.architecture.step_schedule import Number

_OVERSAMPLING = 8
_N_PROBES = 8


class CoactivationSketch(Mechanism):
    """Streaming sketch of the second moments of the latents, in float32 whatever the autocast."""

    test_matrix: torch.Tensor
    sample: torch.Tensor
    diagonal: torch.Tensor

    def __init__(self, d_sae: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.rank = min(rank, d_sae)
        self.n_sketch = min(self.rank + _OVERSAMPLING, d_sae)
        width = self.n_sketch + _N_PROBES
        float32: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.register_exact(
            # One matrix holds the test vectors of the sketch and, in its last columns, the probes.
            test_matrix=torch.randn(d_sae, width, **float32),
            sample=torch.zeros(d_sae, width, **float32),
            diagonal=torch.zeros(d_sae, **float32),
        )

    @override
    @classmethod
    def of(cls, cfg: MultiScaleTrainingSAEConfig, device: torch.device) -> Self | None:
        return cls(cfg.d_sae, cfg.sketch_rank, device) if cfg.sketch_rank else None

    @override
    def on_latents(self, latents: Latents, step: Step) -> None:
        self.update(latents.feature_acts, step.schedule.statistics_rate, step.sae.ranks)

    @override
    def metrics(self, cfg: MultiScaleTrainingSAEConfig, step: int) -> dict[str, Any]:
        return {"sketch_error": self.relative_error(self.factors())}

    @torch.no_grad()
    def update(self, feature_acts: torch.Tensor, rate: Number, ranks: Ranks = ALONE) -> None:
        """Fold in one batch of latents (n_tokens, d_sae)."""
        with torch.autocast(feature_acts.device.type, enabled=False):
            acts = feature_acts.float()
            product = acts.T @ (acts @ self.test_matrix) / acts.shape[0]
            self.sample.lerp_(ranks.mean(product), rate)
            # A norm instead of a mean of squares: no second dense copy of the latents.
            squares = torch.linalg.vector_norm(acts, dim=0).square() / acts.shape[0]
            self.diagonal.lerp_(ranks.mean(squares), rate)

    @torch.no_grad()
    def factors(self) -> torch.Tensor:
        """(d_sae, r) factor F with C ~ F F^T, the best of rank r within the sketch."""
        omega, sample = self.test_matrix[:, : self.n_sketch], self.sample[:, : self.n_sketch]
        # A shift of the size of rounding makes the core positive definite; it is taken out below.
        shift = torch.finfo(torch.float32).eps * sample.norm() * omega.shape[0] ** 0.5
        if shift == 0:
            return torch.zeros_like(sample[:, : self.rank])
        shifted = sample + shift * omega
        core = omega.T @ shifted
        eigenvalues, vectors = torch.linalg.eigh((core + core.T) / 2)
        inverse_root = vectors * eigenvalues.clamp(min=shift.item()).rsqrt()
        left, singular, _ = torch.linalg.svd(shifted @ inverse_root, full_matrices=False)
        strengths = (singular.square() - shift).clamp(min=0).sqrt()
        return (left * strengths)[:, : self.rank]

    @torch.no_grad()
    def relative_error(self, factors: torch.Tensor) -> torch.Tensor:
        """Relative Frobenius error of C ~ F F^T, estimated from unseen probes; 0 is exact."""
        probes, truth = self.test_matrix[:, self.n_sketch :], self.sample[:, self.n_sketch :]
        gap = truth - factors @ (factors.T @ probes)
        return gap.norm() / truth.norm().clamp(min=1e-12)

    def normalised(self, factors: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """(n, n) co-activation cosines among chosen latents (n,), from the factors."""
        rows = factors[latents] / self.diagonal[latents].sqrt().clamp(min=1e-12)[:, None]
        return rows @ rows.T
