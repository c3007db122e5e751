"""Did an SAE learn? Checks over its training log, each with the likely cause and a setting.

Pure functions over the rows of `metrics.jsonl` and the numbers of the export check. The thresholds
are explained in docs/faq.md ("Is my SAE healthy?"). A healthy run gives no findings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, cast

import torch

from msae_plugin.architecture.config import DENSE_RATE

FindingKind = Literal[
    "negative_explained_variance",
    "low_explained_variance",
    "loss_still_falling",
    "mostly_dead",
    "mostly_dense",
    "l0_off_target",
]
Row = Mapping[str, Any]

# SAEs that are of use keep more: at L0 32 the shipped presets reach .7 to .8 on language models,
# .5 to .6 on synthetic data. Runs that had only begun to learn ended at .08 to .25.
LOW_EXPLAINED_VARIANCE = 0.3
# Between the last two quarters of a run. Less is noise of the training batches.
RISING_EXPLAINED_VARIANCE = 0.01
# From the mean of the third quarter of a run to that of the last. On a power law of the length,
# 15 % here means that a run of twice the length would end a quarter lower. Short runs that are of
# use fell by 7 to 8 % (600 steps on synthetic data; 100k tokens of SmolLM2, by their variance).
STEEP_LOSS_FALL = 0.15
# A decaying learning rate lowers the loss by itself, in finished runs as well.
STEEP_LOSS_FALL_WITH_DECAY = 0.25
DECAYED_RATE = 0.9  # of the third quarter's mean rate: below it the rate counts as decaying
# Share of the latents. AuxK and revival keep it near 0; half is a dictionary of half the width.
MOSTLY_DEAD = 0.5
# Silence over the last log window says something where an average latent would have fired this
# often in it: nobody then is silent by chance, and few are rare enough to be.
FIRINGS_TO_JUDGE_SILENCE = 20
# log10 of a firing rate of zero, as SAELens writes it.
SILENT_LOG10_RATE = -10.0
# Share of the L0. On SmolLM2 at L0 31, BatchTopK spends .33 on dense latents after 100k tokens
# and .59 after a million, `features` .63.
MOSTLY_DENSE = 0.75
# A running threshold of rate .01 (SAELens' batchtopk) gives 5 times k after 100 steps and k after
# 500; on other documents than it was set on, the L0 differs by up to 20 %.
L0_RATIO = 1.25

# What can be judged during the run, by the share of its steps. Dead latents need their window and
# revival some time; k may be annealed over the first 40 %, and until then more latents are dense.
EARLY_CHECKS: Mapping[float, tuple[FindingKind, ...]] = {
    0.10: ("negative_explained_variance",),
    0.25: ("negative_explained_variance", "mostly_dead"),
    0.50: ("negative_explained_variance", "mostly_dead", "mostly_dense"),
}


@dataclass(frozen=True)
class HealthFinding:
    """One way in which an SAE failed to learn."""

    kind: FindingKind
    message: str  # one line: the number, the likely cause, what to change
    setting: str  # the recipe's key to change first; `sae.` stands for the SAE's own section


def recorded_messages(recorded: object) -> list[str]:
    """The lines of findings as export.json, run.json and comparison.json hold them."""
    findings = cast("Sequence[Mapping[str, Any]]", recorded or ())
    return [str(finding["message"]) for finding in findings]


def assess(
    rows: Sequence[Row],
    *,
    d_sae: int | None = None,
    l0_target: float | None = None,
    l0_exported: float | None = None,
    explained_variance: float | None = None,
) -> list[HealthFinding]:
    """Judge an SAE by its training log and its export; empty for a healthy one.

    Columns that are missing from the log are not judged. The explained variance is the export's;
    None takes the last row's.
    """
    last = rows[-1] if rows else {}
    off_target = _l0(l0_exported, l0_target)
    # A wrong threshold spoils the export's explained variance and says nothing of the training.
    if explained_variance is None or off_target is not None:
        explained_variance = last.get("explained_variance")
    found = [
        off_target,
        _explained_variance(explained_variance, rows) or _loss(rows),
        _dead(rows, d_sae),
        _dense(last, d_sae),
    ]
    return [finding for finding in found if finding is not None]


def _explained_variance(value: float | None, rows: Sequence[Row]) -> HealthFinding | None:
    if value is None or value >= LOW_EXPLAINED_VARIANCE:
        return None
    if value < 0:
        return HealthFinding(
            "negative_explained_variance",
            f"explained variance is {value:.3g}, worse than the mean activation alone: the large "
            "mean or scale of the inputs is probably not learned; set input_normalization: "
            "first_batch for this SAE where it is none, else raise training.tokens or training.lr",
            "sae.input_normalization",
        )
    quarters = _last_quarters(rows, "explained_variance")
    if quarters is not None and quarters[1] - quarters[0] < RISING_EXPLAINED_VARIANCE:
        return HealthFinding(
            "low_explained_variance",
            f"explained variance is only {value:.3f} and no longer rises: the learning rate "
            "probably does not suit the scale of the inputs; set input_normalization: first_batch "
            "for this SAE where it is none, else change training.lr",
            "training.lr",
        )
    return HealthFinding(
        "low_explained_variance",
        f"explained variance is only {value:.3f}: the run is probably too short for its learning "
        "rate; raise training.tokens or training.lr",
        "training.tokens",
    )


def _loss(rows: Sequence[Row]) -> HealthFinding | None:
    losses = _last_quarters(rows, "loss")
    if losses is None or losses[0] <= 0:
        return None
    rates = _last_quarters(rows, "lr")
    decays = rates is not None and rates[1] < DECAYED_RATE * rates[0]
    fall = 1 - losses[1] / losses[0]
    if fall <= (STEEP_LOSS_FALL_WITH_DECAY if decays else STEEP_LOSS_FALL):
        return None
    return HealthFinding(
        "loss_still_falling",
        f"the loss still fell by {fall:.0%} from the third quarter of the run to the last: the run "
        "is too short; raise training.tokens",
        "training.tokens",
    )


def _dead(rows: Sequence[Row], d_sae: int | None) -> HealthFinding | None:
    last = rows[-1] if rows else {}
    share = last.get("dead_share")
    if share is not None and share > MOSTLY_DEAD:
        return HealthFinding(
            "mostly_dead",
            f"{share:.0%} of the latents are dead: the learning rate is probably too high or the "
            "mean of the inputs too large; lower training.lr, or set input_normalization: "
            "first_batch for this SAE",
            "training.lr",
        )
    l0, median = last.get("l0"), last.get("log10_firing_rate_p50")
    if d_sae is None or l0 is None or median is None or median > SILENT_LOG10_RATE:
        return None
    window_tokens = float(last.get("tokens", 0))
    if len(rows) > 1:
        window_tokens -= float(rows[-2].get("tokens", 0))
    if window_tokens * l0 / d_sae < FIRINGS_TO_JUDGE_SILENCE:
        return None
    return HealthFinding(
        "mostly_dead",
        f"more than half of the latents fired on none of the last {window_tokens:,.0f} tokens, and "
        "most do not count as dead yet, so that nothing revives them; lower "
        "training.dead_feature_window",
        "training.dead_feature_window",
    )


def _dense(last: Row, d_sae: int | None) -> HealthFinding | None:
    share, l0 = last.get("dense_share"), last.get("l0")
    if share is None or share <= MOSTLY_DENSE:
        return None
    what = f"{share:.0%} of the active latents fire on more than {DENSE_RATE:.0%} of the tokens"
    if d_sae is not None and l0 is not None and l0 > DENSE_RATE * d_sae:
        return HealthFinding(
            "mostly_dense",
            f"{what}: {l0:.0f} of {d_sae:,} active latents per token are not sparse; lower the "
            "SAE's k (or raise its sparsity coefficient), or raise its d_sae",
            "sae.d_sae",
        )
    return HealthFinding(
        "mostly_dense",
        f"{what}: they probably carry the mean of the inputs or a few massive tokens; set "
        "data.exclude_special_tokens: true, and input_normalization: first_batch for this SAE",
        "data.exclude_special_tokens",
    )


def _l0(exported: float | None, target: float | None) -> HealthFinding | None:
    if not exported or not target or 1 / L0_RATIO <= exported / target <= L0_RATIO:
        return None
    return HealthFinding(
        "l0_off_target",
        f"the exported SAE has L0 {exported:.1f} where {target:g} was trained for: its threshold "
        "has not caught up; raise training.calibrate_batches or training.tokens",
        "training.calibrate_batches",
    )


def _last_quarters(rows: Sequence[Row], key: str) -> tuple[float, float] | None:
    """Means of a column over the third and the last quarter of the steps; None without either."""
    known = [row for row in rows if row.get("step") is not None and row.get(key) is not None]
    if not known:
        return None
    end = float(known[-1]["step"])
    third = [float(row[key]) for row in known if end / 2 < row["step"] <= 3 * end / 4]
    last = [float(row[key]) for row in known if row["step"] > 3 * end / 4]
    return (fmean(third), fmean(last)) if third and last else None


class HealthWatch:
    """The checks during a run: at a few points, and each finding of an SAE once."""

    def __init__(self, total_steps: int, widths: Mapping[str, int]) -> None:
        self._total_steps, self._widths = total_steps, widths  # d_sae of each SAE
        self._due = {name: sorted(EARLY_CHECKS) for name in widths}
        self._said: dict[str, set[FindingKind]] = {name: set() for name in widths}
        self._previous: dict[str, Row] = {}

    def check(self, name: str, row: Row) -> list[str]:
        """Warnings that a new log row of an SAE gives rise to, one line each.

        The end of the run gives none here: it is judged with the export.
        """
        rows = [*([self._previous[name]] if name in self._previous else []), row]
        self._previous[name] = row
        step = int(row["step"])
        reached = [share for share in self._due[name] if step >= share * self._total_steps]
        if not reached or step >= self._total_steps:
            return []
        self._due[name] = self._due[name][len(reached) :]
        kinds = set(EARLY_CHECKS[reached[-1]]) - self._said[name]
        if reached[-1] == min(EARLY_CHECKS) and not self._stays_negative(rows):
            kinds.discard("negative_explained_variance")
        findings = [f for f in assess(rows, d_sae=self._widths[name]) if f.kind in kinds]
        self._said[name].update(finding.kind for finding in findings)
        where = f"{name}, step {step:,} of {self._total_steps:,}"
        return [f"{where}: {finding.message}" for finding in findings]

    def _stays_negative(self, rows: Sequence[Row]) -> bool:
        """Whether explained variance, at its present pace, is negative at half of the run.

        Every run begins below zero, where the mean is to be learned.
        """
        points = [(float(row["step"]), row.get("explained_variance")) for row in rows]
        (step_before, before), (step, now) = points[0], points[-1]
        if before is None or now is None or step == step_before:
            return False
        pace = (now - before) / (step - step_before)
        return now + pace * (self._total_steps / 2 - step) < 0


# Evenly sampled: their mean cosine has a standard error below .01. All of 16,384 latents of a
# model of width 2304 would take as long as a training step: one of two matrices is read against
# its memory order.
ALIGNED_LATENTS = 2048


def dense_share(firings: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Share of the L0 that dense latents take, zero-dimensional.

    `firings` (d_sae,) says how many of the tokens each latent fired on.
    """
    dense = firings > DENSE_RATE * n_tokens
    return (firings * dense).sum() / firings.sum().clamp(min=1)


@torch.no_grad()
def encoder_decoder_alignment(sae: torch.nn.Module, live: torch.Tensor) -> float | None:
    """Mean cosine of a latent's encoder and decoder direction over the live latents.

    `live` is (d_sae,) bool. None for an SAE without W_enc (d_in, d_sae) and W_dec (d_sae, d_in).
    """
    W_enc: Any = getattr(sae, "W_enc", None)
    W_dec: Any = getattr(sae, "W_dec", None)
    if not (isinstance(W_enc, torch.Tensor) and isinstance(W_dec, torch.Tensor)) or not live.any():
        return None
    latents = live.to(W_enc.device).nonzero().squeeze(1)
    latents = latents[:: -(-len(latents) // ALIGNED_LATENTS)]
    return float(torch.cosine_similarity(W_enc[:, latents], W_dec[latents].T, dim=0).mean())
