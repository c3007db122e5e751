"""[R] Revival of dead latents, and what became of them.

A latent that has not fired for a window, and whose direction overlaps a live latent's enough to
interfere with it, is re-aimed at what the dictionary misses. Its optimiser state is reset, for
exactly its rows. Each revival is an event; after `revival_survival_steps` a second event says how
often the latent has fired since and whether it lives.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from typing_extensions import Self, override

from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.mechanisms.base import Latents, Mechanism, Step
from msae_plugin.architecture.mechanisms.orthogonality import unit_rows

_NEVER = -1

logger = logging.getLogger(__name__)


class RevivalRecord(Mechanism):
    """Who is dead, who was revived when, and how the revived have done."""

    steps_since_fired: torch.Tensor
    revived_at: torch.Tensor
    tokens_fired: torch.Tensor
    totals: torch.Tensor

    def __init__(self, d_sae: int, device: torch.device) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []
        self.optimizer: torch.optim.Optimizer | None = None
        zeros = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.register_exact(
            steps_since_fired=zeros,
            revived_at=torch.full_like(zeros, _NEVER),
            tokens_fired=zeros.clone(),
            # Revivals, those judged after their time, and those found alive then.
            totals=torch.zeros(3, dtype=torch.int64, device=device),
        )

    @override
    @classmethod
    def of(cls, cfg: MultiScaleTrainingSAEConfig, device: torch.device) -> Self | None:
        return cls(cfg.d_sae, device) if cfg.revival_every else None

    @override
    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        """Judge the latents revived before, and re-aim those that are dead now."""
        cfg, sae, now = step.cfg, step.sae, step.schedule.step
        if now == 0 or now % cfg.revival_every:
            return
        dead_steps = cfg.revival_dead_steps
        self.events += self.judge(now, cfg.revival_survival_steps, dead_steps, step.n_tokens)
        most = max(1, int(cfg.revival_max_fraction * cfg.d_sae))
        latents, neighbours, cosines = revival_candidates(
            self, sae.W_dec, dead_steps, cfg.revival_min_cosine, most
        )
        if latents.numel() == 0:
            return
        missed, _ = sae.ranks.concatenated(sae.errors(step.sae_in))
        directions = new_directions(missed, latents.numel())
        n_new = directions.shape[0]
        latents, neighbours, cosines = latents[:n_new], neighbours[:n_new], cosines[:n_new]
        kept = torch.nn.functional.cosine_similarity(sae.W_dec[latents].float(), directions, dim=-1)
        re_aim(latents, directions, ~self.dead(dead_steps), sae.W_enc, sae.b_enc, sae.W_dec)
        if self.optimizer is not None:
            rows = [(sae.W_enc, 1), (sae.b_enc, 0), (sae.W_dec, 0)]
            reset_optimizer_rows(self.optimizer, latents, rows)
        elif int(self.totals[0]) == 0:
            logger.warning(
                "revival without the optimiser: the moments of revived latents are kept; "
                "train with `msae train`, or call sae.attach_optimizer(optimizer)"
            )
        self.mark_revived(latents, now)
        self.events += revival_events(now, latents, neighbours, cosines, 1 - kept)

    @override
    def on_latents(self, latents: Latents, step: Step) -> None:
        self.observe(latents.fired)

    @override
    def metrics(self, cfg: MultiScaleTrainingSAEConfig, step: int) -> dict[str, Any]:
        return self.summary(step)

    @override
    def recordable(self, cfg: MultiScaleTrainingSAEConfig) -> bool:
        return True  # what it changes is changed before the step

    @torch.no_grad()
    def observe(self, fired_tokens: torch.Tensor) -> None:
        """Count a step in which each latent fired on so many tokens (d_sae,)."""
        self.steps_since_fired += 1
        self.steps_since_fired.masked_fill_(fired_tokens > 0, 0)
        self.tokens_fired += fired_tokens.to(self.tokens_fired.dtype)

    def dead(self, window: int) -> torch.Tensor:
        """(d_sae,) bool: has not fired for at least `window` steps."""
        return self.steps_since_fired >= window

    @torch.no_grad()
    def mark_revived(self, latents: torch.Tensor, step: int) -> None:
        """Start the after-life of the latents (n,)."""
        self.steps_since_fired[latents] = 0
        self.tokens_fired[latents] = 0
        self.revived_at[latents] = step
        self.totals[0] += latents.numel()

    @torch.no_grad()
    def judge(
        self, step: int, survival_steps: int, window: int, tokens_per_step: int
    ) -> list[dict[str, Any]]:
        """Events for the latents whose time has come at this step."""
        due = ((self.revived_at >= 0) & (step - self.revived_at >= survival_steps)).nonzero()
        events: list[dict[str, Any]] = []
        for latent in due.flatten().tolist():
            survived = int(self.steps_since_fired[latent]) < window
            seen = (step - int(self.revived_at[latent])) * tokens_per_step
            events.append(
                {
                    "event": "outcome",
                    "step": step,
                    "latent": latent,
                    "revived_at": int(self.revived_at[latent]),
                    "firing_rate": int(self.tokens_fired[latent]) / max(seen, 1),
                    "survived": survived,
                }
            )
            self.totals[1] += 1
            self.totals[2] += int(survived)
            self.revived_at[latent] = _NEVER
        return events

    def summary(self, step: int) -> dict[str, float]:
        """Totals for the metrics log: revivals, per 1000 steps, and share found alive."""
        revived, judged, alive = self.totals.tolist()
        return {
            "revivals_total": float(revived),
            "reactivation_frequency": 1000 * revived / max(step, 1),
            "revival_survival_rate": alive / judged if judged else float("nan"),
        }


@torch.no_grad()
def interference(
    W_dec: torch.Tensor, dead: torch.Tensor, rows_at_a_time: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest cosine of each dead latent to a live one, and that neighbour, in their order.

    With nothing alive the cosines are -1 and the neighbours 0.
    """
    directions, _ = unit_rows(W_dec)
    live_index = (~dead).nonzero().squeeze(1)
    dead_rows = directions[dead]
    if live_index.numel() == 0:
        n_dead = dead_rows.shape[0]
        return dead_rows.new_full((n_dead,), -1.0), live_index.new_zeros(n_dead)
    live_rows = directions[live_index]
    best = [(block @ live_rows.T).max(dim=1) for block in dead_rows.split(rows_at_a_time)]
    cosines = torch.cat([found.values for found in best])
    return cosines, live_index[torch.cat([found.indices for found in best])]


@torch.no_grad()
def new_directions(errors: torch.Tensor, count: int) -> torch.Tensor:
    """(at most count, d_in) unit directions that the dictionary misses; fewer where they are few.

    Errors (n_tokens, d_in) of tokens drawn in proportion to their squared error.
    """
    errors = errors.float()
    squared = errors.square().sum(dim=-1)
    n_usable = int((squared > 0).sum())
    count = min(count, n_usable)
    if count == 0:
        return errors[:0]
    drawn = torch.multinomial(squared / squared.sum(), count, replacement=False)
    return errors[drawn] / squared[drawn].sqrt()[:, None]


@torch.no_grad()
def re_aim(
    latents: torch.Tensor,
    directions: torch.Tensor,
    live: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
) -> None:
    """Point latents (n,) at new unit directions (n, d_in), in place.

    They get the mean norms of the live latents, or 1 and 0.1 when nothing lives.
    """
    some_live = bool(live.any())
    encoder_norm = W_enc.norm(dim=0)[live].mean() if some_live else W_enc.new_tensor(1.0)
    decoder_norm = W_dec.norm(dim=1)[live].mean() if some_live else W_dec.new_tensor(0.1)
    W_enc[:, latents] = (directions.to(W_enc.dtype) * encoder_norm).T
    W_dec[latents] = directions.to(W_dec.dtype) * decoder_norm
    b_enc[latents] = 0


@torch.no_grad()
def reset_optimizer_rows(
    optimizer: torch.optim.Optimizer,
    latents: torch.Tensor,
    parameters: Sequence[tuple[torch.nn.Parameter, int]],
) -> None:
    """Forget the optimiser's moments of exactly the revived latents.

    Each parameter comes with the dimension along which latents are counted.
    """
    for parameter, dim in parameters:
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                value.index_fill_(dim, latents, 0)


@torch.no_grad()
def revival_candidates(
    record: RevivalRecord, W_dec: torch.Tensor, window: int, min_cosine: float, max_count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dead latents that interfere with live ones, the worst first, their neighbours and cosines.

    A `min_cosine` not above zero admits every dead latent.
    """
    dead = record.dead(window)
    index = dead.nonzero().squeeze(1)
    if index.numel() == 0:
        return index, index, W_dec.new_zeros(0)
    cosines, neighbours = interference(W_dec, dead)
    eligible = (cosines >= min_cosine) if min_cosine > 0 else torch.ones_like(cosines).bool()
    chosen = eligible.nonzero().squeeze(1)
    chosen = chosen[torch.argsort(cosines[chosen], descending=True, stable=True)][:max_count]
    return index[chosen], neighbours[chosen], cosines[chosen]


@torch.no_grad()
def revival_events(
    step: int,
    latents: torch.Tensor,
    neighbours: torch.Tensor,
    cosines: torch.Tensor,
    travelled: torch.Tensor,
) -> list[dict[str, Any]]:
    """One event per revived latent, for `revivals.jsonl`."""
    columns = (latents.tolist(), neighbours.tolist(), cosines.tolist(), travelled.tolist())
    return [
        {
            "event": "revival",
            "step": step,
            "latent": latent,
            "old_neighbour": neighbour,
            "old_cosine": cosine,
            "source": "error_samples",
            "distance_travelled": distance,
        }
        for latent, neighbour, cosine, distance in zip(*columns, strict=True)
    ]
