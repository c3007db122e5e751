"""The sections of a comparison that a training recipe does not have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class SyntheticSection:
    """Ground truth in place of a language model and text (`sae_lens.synthetic`).

    Attributes:
        model: Fields of SAELens' `SyntheticModelConfig`. Its `seed` is that of the ground truth.
        new_model_per_seed: Each seed has a ground truth of its own (the model's seed plus the
            seed); false keeps one, as SynthSAEBench does.
        eval_samples: Samples that the exported SAEs are judged on.
        eval_batch_size: Samples at a time.
        autocast: Generate the samples in bfloat16.
        saes_at_once: SAEs that are trained side by side on the same samples; null is all of a seed.
        device: auto, cpu, cuda or mps; auto is cuda when there is one.
    """

    model: dict[str, Any] = field(default_factory=dict[str, Any])
    new_model_per_seed: bool = False
    eval_samples: int = 50_000
    eval_batch_size: int = 4096
    autocast: bool = False
    saes_at_once: int | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


@dataclass
class SearchSection:
    """How coefficients are tuned of architectures that are not told an L0.

    Attributes:
        tokens: Length of a trial; null is a quarter of training.tokens.
        tolerance: Relative distance of L0 from its target at which the search ends.
        max_trials: Short trials at most.
        corrections: Whole runs at most that are thrown away because their L0 missed the target.
    """

    tokens: int | None = None
    tolerance: float = 0.05
    max_trials: int = 8
    corrections: int = 2


@dataclass
class HeldoutSection:
    """What every SAE of a language model is measured on.

    Attributes:
        tokens: Held-out tokens for explained variance, L0 and dead latents.
        loss_tokens: How many of them the losses are measured on; they need whole passes.
        contexts: Latents whose top activating contexts are stored, for the first seed of each
            method at the first L0, less the ladder's variants that are compared with another;
            0 for none.
    """

    tokens: int = 40_000
    loss_tokens: int = 5_000
    contexts: int = 8


@dataclass
class LadderSection:
    """The source's runs and mechanisms as methods (see `comparison.ladder`).

    Attributes:
        groups: `cumulative` (baseline and runs 1 to 10), `alone` (each mechanism on BatchTopK),
            `default` (the default preset with each of its mechanisms removed, or one more).
        leave_out: Names of variants that are not trained.
    """

    groups: list[Literal["cumulative", "alone", "default"]] = field(
        default_factory=lambda: ["cumulative", "alone", "default"]
    )
    leave_out: list[str] = field(default_factory=list[str])
