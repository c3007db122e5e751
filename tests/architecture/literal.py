"""The equations of docs/method.md written out token by token, in float64 and with dense matrices.

Slow and obvious on purpose: loops over tokens and latents, a full d_sae x d_sae co-activation
matrix, one decoding per prefix and per budget, autograd for every gradient. It shares no code with
the package; AuxK is SAELens' own function.
"""

from __future__ import annotations

import math

import torch
from sae_lens.saes.topk_sae import act_times_W_dec, calculate_topk_aux_acts

from msae_plugin import MultiScaleTrainingSAE, MultiScaleTrainingSAEConfig


def running_rate(decay: float, step: int) -> float:
    """An exponential mean that is the plain mean for its first 1 / (1 - decay) values."""
    return max(1 - decay, 1 / (step + 1))


def scaled_gradient(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The same value; its gradient is multiplied by the factor."""
    return tensor.detach() + factor * (tensor - tensor.detach())


def literal_units(tokens: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Geometric median (Weiszfeld, from the mean) and median distance per root of the width."""
    median = sum(tokens, torch.zeros_like(tokens[0])) / len(tokens)
    for _ in range(32):
        distances = [float((token - median).norm()) for token in tokens]
        if not any(distances):
            return median, 1.0
        smallest = 1e-3 * sum(distances) / len(distances)
        weights = [1 / max(distance, smallest) for distance in distances]
        weighted = [w * token for w, token in zip(weights, tokens, strict=True)]
        median = sum(weighted, torch.zeros_like(median)) / sum(weights)
    distances = sorted(float((token - median).norm()) for token in tokens)
    return median, distances[(len(distances) - 1) // 2] / math.sqrt(len(median))


class LiteralSAE:
    """Reference for one training SAE; parameters are read from it, statistics are its own."""

    def __init__(self, cfg: MultiScaleTrainingSAEConfig) -> None:
        self.cfg = cfg
        d_sae = cfg.d_sae
        self.rings = [0] * d_sae
        self.firing_rate = torch.zeros(d_sae, dtype=torch.float64)
        self.pre_mean = torch.zeros(d_sae, dtype=torch.float64)
        self.pre_square = torch.ones(d_sae, dtype=torch.float64)
        self.z = cfg.zscore_z
        self.allowance = torch.zeros(d_sae, dtype=torch.float64)
        self.C = torch.zeros(d_sae, d_sae, dtype=torch.float64)
        self.neighbours: list[list[int]] | None = None
        self.contribution = torch.ones(d_sae, dtype=torch.float64)
        self.input_variance = 0.0
        self.norm_variance = 0.0
        self.p: dict[str, torch.Tensor] = {}

    def accept_rings(self, rings: list[int], step: int) -> None:
        """Take the rings of the package after checking that they follow from the firing rates.

        They are not derived again because rates tie, and float32 breaks ties in its own way.
        """
        cfg, widths = self.cfg, self.prefix_widths()
        for ring, width in enumerate(widths):
            assert sum(r <= ring for r in rings) == width
        if step == 0:
            assert rings == sorted(rings)
        elif cfg.prefix_sort_every == 0 or step % cfg.prefix_sort_every:
            assert rings == self.rings
        else:
            for ring in range(1, len(widths)):
                inner = [float(self.firing_rate[i]) for i, r in enumerate(rings) if r < ring]
                outer = [float(self.firing_rate[i]) for i, r in enumerate(rings) if r >= ring]
                assert min(inner) >= max(outer) - 1e-6
        self.rings = rings

    # ---- parameters ---------------------------------------------------------------------------

    def read_parameters(self, sae: MultiScaleTrainingSAE) -> None:
        self.p = {
            name: parameter.detach().clone().to(torch.float64).requires_grad_()
            for name, parameter in sae.named_parameters()
        }

    def gradients(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.p.items()
        }

    def decoder_norms(self) -> list[torch.Tensor]:
        return [row.norm() for row in self.p["W_dec"]]

    # ---- [N], [A] -----------------------------------------------------------------------------

    def eps(self) -> float:
        relative = self.cfg.norm_eps_mode == "relative"
        return self.cfg.norm_eps * (self.norm_variance if relative else 1.0)

    def centred(self, x_c: torch.Tensor) -> torch.Tensor:
        return x_c - x_c.sum() / len(x_c) if self.cfg.norm_centre else x_c

    def normalise_token(self, x_c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x_hat (d_in,) and scale(x) of one token."""
        cfg, p = self.cfg, self.p
        if not cfg.norm_scales:
            return x_c, torch.ones((), dtype=torch.float64)
        prefix = "mechanisms.normalisation."
        centred = self.centred(x_c)
        variance = (centred**2).sum() / cfg.d_in
        unit = centred / (variance + self.eps()).sqrt()
        n = len(cfg.norm_scales)
        logits = [torch.zeros((), dtype=torch.float64) for _ in range(n)]
        if n > 1:
            logits = [logits[s] + p[prefix + "mixture_logits"][s] for s in range(n)]
        if cfg.norm_attention:
            query = unit @ p[prefix + "attention.W_query"]
            temperature = p[prefix + "attention.log_temperature"].exp()
            keys = p[prefix + "attention.keys"]
            logits = [logits[s] + temperature * (query * keys[s]).sum() for s in range(n)]
        total = sum(logit.exp() for logit in logits)
        mixture = [logit.exp() / total for logit in logits]
        x_hat = torch.zeros(cfg.d_in, dtype=torch.float64)
        inverse_scale = torch.zeros((), dtype=torch.float64)
        for s, scale in enumerate(cfg.norm_scales):
            if cfg.norm_eps_mode == "absolute":
                deviation = (scale * (variance + self.eps())).sqrt()
            else:
                deviation = (scale * variance + self.eps()).sqrt()
            gate = torch.ones((), dtype=torch.float64)
            if cfg.norm_gate:
                score = (unit * p[prefix + "gate_weight"][s]).sum() / cfg.d_in
                gate = 2 / (1 + torch.exp(-(score + p[prefix + "gate_bias"][s])))
            branch = gate * centred / deviation
            if cfg.norm_affine:
                branch = p[prefix + "gain"][s] * branch + p[prefix + "bias"][s]
            x_hat = x_hat + mixture[s] * branch
            inverse_scale = inverse_scale + mixture[s] * gate / deviation
        return x_hat, 1 / inverse_scale

    shift: torch.Tensor | float = 0.0
    scale: float = 1.0

    # ---- [Z], [S] -----------------------------------------------------------------------------

    def deviation(self) -> torch.Tensor:
        return (self.pre_square - self.pre_mean**2).clamp(min=0).sqrt().clamp(min=1e-6)

    def selected(self, pre: torch.Tensor, budget: int) -> set[tuple[int, int]]:
        """The `budget` largest of the positive entries, by score."""
        scored: list[tuple[float, int, int]] = []
        a = self.cfg.standardise
        deviation = self.deviation()
        for t in range(pre.shape[0]):
            for i in range(pre.shape[1]):
                if pre[t, i] > 0:
                    score = (pre[t, i] - a * self.pre_mean[i]) / deviation[i] ** a
                    score = score + self.allowance[i]
                    scored.append((float(score), t, i))
        scored.sort(reverse=True)
        return {(t, i) for _, t, i in scored[:budget]}

    def above_z(self, pre: torch.Tensor) -> set[tuple[int, int]]:
        threshold = self.pre_mean + self.z * self.deviation()
        return {
            (t, i)
            for t in range(pre.shape[0])
            for i in range(pre.shape[1])
            if pre[t, i] > threshold[i] and pre[t, i] > 0
        }

    def budgets(self, n_tokens: int, step: int) -> dict[float, int]:
        cfg = self.cfg
        k = cfg.k
        if step < cfg.k_anneal_steps:
            share = step / cfg.k_anneal_steps
            k = cfg.k_initial_multiplier * cfg.k * (1 - share) + cfg.k * share
        return {s: int(s * k * n_tokens + 1e-9) for s in [1.0, *cfg.sparsity_scales]}

    # ---- losses -------------------------------------------------------------------------------

    def loss(
        self, x: torch.Tensor, step: int, dead: torch.Tensor | None, l1: float
    ) -> dict[str, torch.Tensor]:
        """All loss terms of one training step on x (n_tokens, d_in); updates the statistics."""
        cfg, p = self.cfg, self.p
        n_tokens = x.shape[0]
        with torch.no_grad():
            if step == 0 and cfg.input_normalization == "first_batch":
                self.shift, self.scale = literal_units(list(x))
                self.scale = 1.0 if cfg.norm_scales else self.scale
            x = (x - self.shift) / self.scale
            if cfg.unit_norm_decoder:
                for i in range(cfg.d_sae):
                    p["W_dec"][i] /= p["W_dec"][i].norm()
            if cfg.aligned_encoder:
                for i in range(cfg.d_sae):
                    missing = 1 - p["W_enc"][:, i] @ p["W_dec"][i]
                    p["W_enc"][:, i] += missing * p["W_dec"][i] / (p["W_dec"][i] ** 2).sum()
            variances = [(self.centred(t) ** 2).mean() for t in x - p["b_dec"]]
            rate = running_rate(cfg.firing_rate_decay, step)
            batch_variance = float(sum(variances) / n_tokens)
            self.norm_variance += rate * (batch_variance - self.norm_variance)

        x_c = [token - p["b_dec"] for token in x]
        normalised = [self.normalise_token(token) for token in x_c]
        norms = self.decoder_norms()
        unit_norm = torch.stack(norms) if cfg.rescale_acts_by_decoder_norm else 1.0
        pre = torch.stack(
            [(x_hat @ p["W_enc"] + p["b_enc"]) * unit_norm for x_hat, _ in normalised]
        )
        scale = torch.stack([token_scale for _, token_scale in normalised])

        with torch.no_grad():
            rate = running_rate(cfg.statistics_decay, step)
            self.pre_mean += rate * (pre.mean(0) - self.pre_mean)
            self.pre_square += rate * ((pre**2).mean(0) - self.pre_square)
        budgets = self.budgets(n_tokens, step)
        if cfg.selection == "zscore":
            chosen = {1.0: self.above_z(pre.detach())}
        else:
            chosen = {s: self.selected(pre.detach(), budget) for s, budget in budgets.items()}

        factors = self.importance_factors()
        coefficients = scale[:, None] * pre / unit_norm
        W_dec = p["W_dec"]
        if cfg.importance_power:
            coefficients = scaled_gradient(scale[:, None] * pre / unit_norm, factors)
            W_dec = scaled_gradient(p["W_dec"], factors[:, None])
        target = x - cfg.skip_scale * torch.stack(x_c) if cfg.skip_scale else x

        def error(reconstruction: torch.Tensor) -> torch.Tensor:
            squares = ((reconstruction - target) ** 2).sum(-1)
            return squares.sum() / n_tokens

        def decode(pairs: set[tuple[int, int]], latents: set[int]) -> torch.Tensor:
            rows = []
            for t in range(n_tokens):
                row = torch.zeros(cfg.d_in, dtype=torch.float64)
                for i in sorted(latents):
                    if (t, i) in pairs:
                        row = row + coefficients[t, i] * W_dec[i]
                rows.append(row)
            return torch.stack(rows)

        terms: dict[str, torch.Tensor] = {}
        everything = set(range(cfg.d_sae))
        widths = self.prefix_widths()
        previous: set[int] = set()
        main = torch.zeros_like(x)
        for width in widths:
            latents = {i for i in everything if self.rings[i] <= widths.index(width)}
            if cfg.detach_inner_prefixes and previous:
                base = (p["b_dec"] + decode(chosen[1.0], previous)).detach()
                main = base + decode(chosen[1.0], latents - previous)
            else:
                main = p["b_dec"] + decode(chosen[1.0], latents)
            previous = latents
            if width < cfg.d_sae and cfg.prefix_weight > 0:
                terms[f"inner_mse_loss_{width}"] = cfg.prefix_weight * error(main)
        terms["mse_loss"] = error(main)
        if cfg.sparsity_scale_weight > 0:
            for s in cfg.sparsity_scales:
                wide = p["b_dec"] + decode(chosen[s], everything)
                terms[f"mse_loss_at_{s:g}k"] = cfg.sparsity_scale_weight * error(wide)

        if cfg.aux_loss_coefficient:
            residual = (target - main).detach()
            terms["auxiliary_reconstruction_loss"] = cfg.aux_loss_coefficient * self.auxk(
                pre, scale, residual, dead
            )
        if l1 and cfg.l1_coefficient:
            penalty = torch.zeros((), dtype=torch.float64)
            for t, i in sorted(chosen[1.0]):
                per_latent = 1 / factors[i] if cfg.importance_power else 1.0
                penalty = penalty + per_latent * coefficients[t, i] * norms[i]
            terms["l1_loss"] = l1 * penalty / n_tokens
        penalty = self.orthogonality(x, step)
        if penalty is not None:
            terms["orthogonality_loss"] = penalty

        with torch.no_grad():
            acts = torch.zeros(n_tokens, cfg.d_sae, dtype=torch.float64)
            for t, i in chosen[1.0]:
                acts[t, i] = scale[t] * pre[t, i]
            self.observe(acts, step, len(chosen[1.0]) / n_tokens, budgets[1.0] / n_tokens)
            if cfg.firing_floor or cfg.dense_share_limit < 1:
                scores = [float(pre[t, i] + self.allowance[i]) for t, i in chosen[1.0]]
                self.follow_floor(min(scores, default=0.0), step)
        return terms

    def follow_floor(self, cut: float, step: int) -> None:
        """Up a step below the floor, to the cut at most; down a step when too many are dense."""
        cfg = self.cfg
        k = cfg.k
        if step < cfg.k_anneal_steps:
            share = step / cfg.k_anneal_steps
            k = cfg.k_initial_multiplier * cfg.k * (1 - share) + cfg.k * share
        rates = [float(rate) for rate in self.firing_rate]
        dense = 0.1 if 6 * cfg.k / cfg.d_sae <= 0.1 else 8 * cfg.k / cfg.d_sae
        share = sum(rate for rate in rates if rate > dense) / max(sum(rates), 1e-30)
        cut = max(cut, 0.0)
        step = cfg.firing_floor_rate * cut
        for i, rate in enumerate(rates):
            allowance = float(self.allowance[i])
            if rate > dense and share > cfg.dense_share_limit:
                allowance -= step
            elif rate < cfg.firing_floor * k / cfg.d_sae:
                allowance += step
            elif allowance > 0:
                allowance = max(allowance - step, 0.0)
            else:
                allowance = min(allowance + step, 0.0)
            self.allowance[i] = min(allowance, cut)

    def prefix_widths(self) -> list[int]:
        d_sae = self.cfg.d_sae
        widths = {min(d_sae, max(1, round(share * d_sae))) for share in self.cfg.prefix_fractions}
        return sorted(widths | {d_sae})

    def auxk(
        self,
        pre: torch.Tensor,
        scale: torch.Tensor,
        residual: torch.Tensor,
        dead: torch.Tensor | None,
    ) -> torch.Tensor:
        """SAELens' TopK auxiliary loss, with scale(x)."""
        n_dead = 0 if dead is None else int(dead.sum())
        if dead is None or n_dead == 0:
            return torch.zeros((), dtype=torch.float64)
        k_aux = max(self.cfg.d_in // 2, 1)
        acts = calculate_topk_aux_acts(min(k_aux, n_dead), pre, dead)
        reconstruction = act_times_W_dec(
            acts * scale[:, None], self.p["W_dec"], self.cfg.rescale_acts_by_decoder_norm
        )
        errors = (reconstruction - residual).pow(2).sum(-1)
        return min(n_dead / k_aux, 1.0) * errors.mean()

    # ---- [O], [C] -----------------------------------------------------------------------------

    def cosine(self, i: int, j: int) -> torch.Tensor:
        a, b = self.p["W_dec"][i], self.p["W_dec"][j]
        return (a * b).sum() / (a.norm() * b.norm())

    def coactivation(self, i: int, j: int) -> float:
        moment, spread_i, spread_j = self.C[i, j], self.C[i, i], self.C[j, j]
        if spread_i * spread_j <= 1e-24:
            return 0.0
        return float(moment / math.sqrt(spread_i * spread_j))

    def pair_weight(self, i: int, j: int) -> float:
        if self.cfg.orthogonality_weighting == "none":
            return 1.0
        return min(1.0, max(0.0, self.coactivation(i, j) - self.cfg.orthogonality_tau))

    def nearest(self) -> list[list[int]]:
        count = min(self.cfg.neighbour_count, self.cfg.d_sae - 1)
        found = []
        for i in range(self.cfg.d_sae):
            others = [j for j in range(self.cfg.d_sae) if j != i]
            others.sort(key=lambda j: -float(self.cosine(i, j)))
            found.append(others[:count])
        return found

    def orthogonality(self, x: torch.Tensor, step: int) -> torch.Tensor | None:
        """The penalty over all pairs (one chunk), or over neighbours; None when not due."""
        cfg = self.cfg
        if cfg.orthogonality_coefficient == 0:
            return None
        variance = float(((x - x.mean(0)) ** 2).mean(0).sum())
        self.input_variance += running_rate(0.99, step) * (variance - self.input_variance)
        if step % cfg.orthogonality_every:
            return None
        d_sae = cfg.d_sae
        total = torch.zeros((), dtype=torch.float64)
        if cfg.orthogonality_pairs == "chunks" and cfg.orthogonality_weighting == "none":
            for i in range(d_sae):
                cosines = [self.cosine(i, j) for j in range(d_sae) if j != i]
                if cosines:
                    total = total + max(cosines, key=float) ** 2 / d_sae
        else:
            lists = [[j for j in range(d_sae) if j != i] for i in range(d_sae)]
            if cfg.orthogonality_pairs == "neighbours":
                weighted = cfg.orthogonality_weighting != "none"
                lists = (self.neighbours or [[]] * d_sae) if weighted else self.nearest()
            for i, others in enumerate(lists):
                for j in others:
                    weight = self.pair_weight(i, j)
                    total = total + weight * self.cosine(i, j).clamp(min=0) ** 2 / d_sae
        scale = cfg.orthogonality_coefficient * cfg.orthogonality_every * self.input_variance
        return scale * total

    # ---- statistics ---------------------------------------------------------------------------

    def importance_factors(self) -> torch.Tensor:
        if self.contribution.sum() == 0:
            return torch.full_like(self.contribution, 0.1 if self.cfg.importance_power else 1.0)
        relative = self.contribution / self.contribution.mean()
        return (relative**self.cfg.importance_power).clamp(0.1, 10.0)

    def observe(self, acts: torch.Tensor, step: int, l0: float, k: float) -> None:
        cfg, n_tokens = self.cfg, acts.shape[0]
        fired = (acts > 0).double().mean(0)
        rate = running_rate(cfg.firing_rate_decay, step)
        self.firing_rate += rate * (fired - self.firing_rate)
        if cfg.selection == "zscore":
            target = cfg.k
            self.z += cfg.zscore_z_lr * max(-1.0, min(1.0, (l0 - target) / target))
        if cfg.orthogonality_weighting != "none" and step % cfg.neighbour_refresh_every == 0:
            self.neighbours = self.nearest()
        rate = running_rate(cfg.statistics_decay, step)
        batch = torch.zeros_like(self.C)
        for t in range(n_tokens):
            batch += torch.outer(acts[t], acts[t]) / n_tokens
        self.C += rate * (batch - self.C)
        norms = torch.stack(self.decoder_norms()).detach()
        size = torch.ones_like(norms) if cfg.rescale_acts_by_decoder_norm else norms
        rate = running_rate(cfg.statistics_decay, step)
        self.contribution += rate * (acts.abs().mean(0) * size - self.contribution)
