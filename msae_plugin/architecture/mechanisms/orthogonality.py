"""[O] Orthogonality of decoder directions: chunks, nearest neighbours, OrtSAE's penalty.

    penalty = mean_i sum_j w_ij relu(cos(d_i, d_j))^2,   w_ij = min(1, relu(c_ij - tau))

The gradient is written out by hand and gathered while the penalty is computed, chunk by chunk, so
that nothing of size d_sae x d_sae is ever kept, and nothing at all for the backward pass but one
(d_sae, d_in) gradient. OrtSAE's form (arXiv 2509.22033) has the maximum over j
in place of the weighted sum:

    penalty = mean over chunks of mean_i max_j cos(d_i, d_j)^2

With c_i the cosine to the nearest latent j(i), n the norms and s the share of a latent in the mean,
the gradient with respect to row i is a weighted sum of few decoder rows:

    a_i d_j(i) / (n_i n_j) + sum over i' with j(i') = i of a_i' d_i' / (n_i n_i') - b_i d_i / n_i^2
    a_i = 2 s c_i,   b_i = a_i c_i + sum over these i' of a_i' c_i'

Hence one `bag_sum` over three pairs per latent, made when the gradient is asked for. Written out
over directions and norms it was twelve passes over the decoder and a fifth of a bf16 step on a GPU.

The full matrix EMA(f_i f_j) takes 17 GB at 65k latents. Only pairs that overlap in direction can be
penalised, so the moments are followed exactly for the nearest neighbours of each latent, in
(d_sae, neighbour_count) numbers, and at a cost proportional to the active latents.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.autograd.function import FunctionCtx
from typing_extensions import Self, override

from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.kernels.decoding import DecodeKernel, bag_sum
from msae_plugin.architecture.mechanisms.base import Latents, Mechanism, Step
from msae_plugin.architecture.mechanisms.sketch import CoactivationSketch
from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.architecture.step_schedule import Number

ChunkWeights = Callable[[torch.Tensor], torch.Tensor]
# Numbers per temporary: 16 MiB of float32 for pairs and decoder rows, 64 MiB for rows of the Gram
# matrix, of which an efficient product needs enough at a time (128 at d_sae 131,072).
_BLOCK_SIZE = 2**22
_SEARCH_BLOCK_SIZE = 2**24
# The mean nearest cosine in the log is taken over so many latents, evenly spaced, against all: over
# all 16,384 of width 2304 it is 1.2 TFLOP, eight times what the encoder of the step costs.
_LATENTS_MEASURED = 1024


class _WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to one tensor is already known."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx,
        tensor: torch.Tensor,  # noqa: ARG004  it is what the gradient is handed to
        value: torch.Tensor,
        gradient: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None


def _attach(tensor: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    result = _WithGradient.apply(tensor, value.to(tensor.dtype), gradient.to(tensor.dtype))
    assert isinstance(result, torch.Tensor)
    return result


def unit_rows(W_dec: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(d_sae, d_in) directions of decoder rows, zero for zero rows, and their (d_sae, 1) norms."""
    rows = W_dec.detach()
    rows = rows if rows.dtype == torch.float64 else rows.float()
    norms = rows.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return rows / norms, norms


def _through_norm(
    grad_unit: torch.Tensor, directions: torch.Tensor, norms: torch.Tensor
) -> torch.Tensor:
    """Gradient with respect to the rows, from the gradient with respect to their directions."""
    along = (grad_unit * directions).sum(dim=-1, keepdim=True)
    return (grad_unit - along * directions) / norms


def chunk_penalty(
    W_dec: torch.Tensor,
    chunks: list[torch.Tensor],
    chunk_weights: ChunkWeights,
) -> torch.Tensor:
    """Weighted penalty over all pairs within each chunk of latents.

    `chunk_weights` maps a chunk (n,) to the weights (n, n) of its pairs. It estimates the sum over
    the whole dictionary: it is divided by the share of pairs that fell into a chunk together.
    """
    d_sae = W_dec.shape[0]
    with torch.no_grad(), torch.autocast(W_dec.device.type, enabled=False):
        # A latent is in one chunk, where its gradient is complete: one buffer is all that is kept.
        gradient = torch.zeros_like(W_dec, dtype=torch.promote_types(W_dec.dtype, torch.float32))
        total = gradient.new_zeros(())
        n_pairs = sum(chunk.numel() * (chunk.numel() - 1) for chunk in chunks)
        if n_pairs == 0:
            return _attach(W_dec, total, gradient)
        for group in chunks_together(chunks, W_dec.device):
            members = torch.stack(group)  # (n_together, n_in_chunk)
            rows, norms = unit_rows(W_dec[members])
            cosines = rows @ rows.mT
            scale = (d_sae - 1) / n_pairs
            cosines.diagonal(dim1=-2, dim2=-1).fill_(0)
            overlap = cosines.clamp_(min=0)
            weights = torch.stack([chunk_weights(chunk).fill_diagonal_(0) for chunk in group])
            total += scale * (weights * overlap.pow(2)).sum()
            slope = weights * overlap
            grad_unit = 2 * scale * ((slope + slope.mT) @ rows)
            gradient[members] = _through_norm(grad_unit, rows, norms)
    return _attach(W_dec, total, gradient)


def pair_penalty(
    W_dec: torch.Tensor, first: torch.Tensor, second: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Penalty over a list of pairs: 1/d_sae sum_p w_p relu(cos(d_first, d_second))^2."""
    d_sae = W_dec.shape[0]
    with torch.no_grad(), torch.autocast(W_dec.device.type, enabled=False):
        gradient = torch.zeros_like(W_dec, dtype=torch.promote_types(W_dec.dtype, torch.float32))
        total = gradient.new_zeros(())
        block = max(1, _BLOCK_SIZE // W_dec.shape[1])
        for start in range(0, first.numel(), block):
            i, j = first[start : start + block], second[start : start + block]
            w = weights[start : start + block].to(gradient.dtype)
            (rows_i, _), (rows_j, _) = unit_rows(W_dec[i]), unit_rows(W_dec[j])
            overlap = (rows_i * rows_j).sum(dim=-1).clamp(min=0)
            total += (w * overlap.pow(2)).sum() / d_sae
            slope = (2 * w * overlap / d_sae)[:, None]
            gradient.index_add_(0, i, slope * rows_j)
            gradient.index_add_(0, j, slope * rows_i)
        # So far the gradient of the directions; in place, a block of rows at a time.
        for start in range(0, d_sae, block):
            own = slice(start, start + block)
            gradient[own] = _through_norm(gradient[own], *unit_rows(W_dec[own]))
    return _attach(W_dec, total, gradient)


def coactivation_weights(coactivation: torch.Tensor, tau: float) -> torch.Tensor:
    """min(1, relu(c - tau)): pairs that fire together more than tau are pushed apart.

    Without the upper bound the penalty is unstable.
    """
    return (coactivation - tau).clamp(min=0, max=1)


def random_chunks(d_sae: int, chunk_size: int, device: torch.device) -> list[torch.Tensor]:
    """A random partition of the dictionary into chunks of nearly equal size."""
    n_chunks = max(1, -(-d_sae // chunk_size))
    return list(torch.randperm(d_sae, device=device).chunk(n_chunks))


@torch.no_grad()
def nearest_neighbours(
    W_dec: torch.Tensor, count: int, rows_at_a_time: int, latents: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest decoder neighbours, by cosine, a block of rows at a time.

    Of `latents` (n,), or of all, among all: cosines (n, count), descending, and indices (n, count).
    The decoder is not copied: cosines are divided by the norms of the neighbours afterwards.
    """
    d_sae = W_dec.shape[0]
    count = min(count, d_sae - 1)
    if latents is None:
        latents = torch.arange(d_sae, device=W_dec.device)
    rows_at_a_time = max(1, min(rows_at_a_time, _SEARCH_BLOCK_SIZE // d_sae))
    cosines: list[torch.Tensor] = []
    indices: list[torch.Tensor] = []
    with torch.autocast(W_dec.device.type, enabled=False):
        rows = W_dec if W_dec.dtype == torch.float64 else W_dec.float()
        norms = rows.norm(dim=-1).clamp(min=1e-8)
        for own in latents.split(rows_at_a_time):
            block = (rows[own] / norms[own, None]) @ rows.T
            block /= norms
            block.scatter_(1, own[:, None], -torch.inf)
            top = block.topk(count, dim=1)
            cosines.append(top.values)
            indices.append(top.indices)
    return torch.cat(cosines), torch.cat(indices)


def mean_nearest_cosine(W_dec: torch.Tensor, rows_at_a_time: int) -> torch.Tensor:
    """Mean cosine of a decoder row to its nearest neighbour, over latents evenly spaced."""
    d_sae = W_dec.shape[0]
    sample = torch.arange(0, d_sae, -(-d_sae // _LATENTS_MEASURED), device=W_dec.device)
    return nearest_neighbours(W_dec, 1, rows_at_a_time, sample)[0].mean()


def chunks_together(
    chunks: Sequence[torch.Tensor], device: torch.device
) -> list[list[torch.Tensor]]:
    """Chunks in groups that are handled together: of equal size, one at a time on a CPU.

    A CPU keeps one chunk in its cache; a GPU would spend the time on starting kernels.
    """
    groups: list[list[torch.Tensor]] = []
    for chunk in chunks:
        size = chunk.numel()
        room = 1 if device.type == "cpu" else max(1, _BLOCK_SIZE // max(1, size * size))
        if groups and groups[-1][0].numel() == size and len(groups[-1]) < room:
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return groups


class _NearestInChunks(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx,
        W_dec: torch.Tensor,
        cosine: torch.Tensor,
        nearest: torch.Tensor,
        share: torch.Tensor,
        norms: torch.Tensor,
        kernel: DecodeKernel,
    ) -> torch.Tensor:
        ctx.save_for_backward(W_dec, cosine, nearest, share, norms)
        ctx.kernel = kernel  # pyright: ignore[reportAttributeAccessIssue]
        return (share * cosine.square()).sum().to(W_dec.dtype)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        W_dec, cosine, nearest, share, norms = ctx.saved_tensors
        slope = 2 * grad_output.to(cosine.dtype) * share * cosine
        along = slope * cosine
        along = along + torch.zeros_like(along).index_add(0, nearest, along)
        across = slope / (norms * norms[nearest])
        own = torch.arange(nearest.numel(), device=nearest.device)
        gradient = bag_sum(
            W_dec,
            torch.cat([nearest, own, own]),
            torch.cat([across, across, -along / norms.square()]),
            torch.cat([own, nearest, own]),
            own.numel(),
            ctx.kernel,
        )
        return gradient.to(W_dec.dtype), None, None, None, None, None


def nearest_in_chunks_penalty(
    W_dec: torch.Tensor, chunks: Sequence[torch.Tensor], kernel: DecodeKernel = "auto"
) -> torch.Tensor:
    """OrtSAE's penalty over a partition of the latents.

    A chunk of one latent has no pair and adds nothing; zero rows have no direction: cosine 0.
    """
    with torch.no_grad(), torch.autocast(W_dec.device.type, enabled=False):
        rows = W_dec if W_dec.dtype == torch.float64 else W_dec.float()
        norms = rows.norm(dim=-1).clamp(min=1e-8)
        cosine, share = torch.zeros_like(norms), torch.zeros_like(norms)
        nearest = torch.arange(norms.numel(), device=norms.device)
        for group in chunks_together(chunks, W_dec.device):
            members = torch.stack(group)  # (n_together, n_in_chunk)
            if members.shape[1] == 1:
                continue
            own_rows, own_norms = rows[members], norms[members]
            cosines = own_rows @ own_rows.mT
            cosines /= own_norms[..., None]
            cosines /= own_norms[:, None]
            cosines.diagonal(dim1=-2, dim2=-1).fill_(-2)
            largest, at = cosines.max(dim=-1)
            cosine[members] = largest
            nearest[members] = members.gather(1, at)
            # Not `share[members] = number`: that copies the number to the device at each step.
            share.index_fill_(0, members.flatten(), 1 / (len(chunks) * members.shape[1]))
    result = _NearestInChunks.apply(W_dec, cosine, nearest, share, norms, kernel)
    assert isinstance(result, torch.Tensor)
    return result


class NeighbourCoactivation(Mechanism):
    """Running second moments of neighbouring latents; at most d_sae - 1 neighbours each."""

    neighbours: torch.Tensor
    pair_moment: torch.Tensor
    pair_weight: torch.Tensor
    second_moment: torch.Tensor

    def __init__(self, d_sae: int, count: int, device: torch.device) -> None:
        super().__init__()
        count = min(count, d_sae - 1)
        index = torch.arange(d_sae, device=device)[:, None] + torch.arange(
            1, count + 1, device=device
        )
        float32: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.register_exact(
            neighbours=index % d_sae,
            # pair_moment / pair_weight is the running mean of f_i f_j; the weight tells a pair that
            # was just listed from one that was followed for long.
            pair_moment=torch.zeros(d_sae, count, **float32),
            pair_weight=torch.zeros(d_sae, count, **float32),
            second_moment=torch.zeros(d_sae, **float32),
        )

    @override
    @classmethod
    def of(cls, cfg: MultiScaleTrainingSAEConfig, device: torch.device) -> Self | None:
        wanted = cfg.orthogonality_coefficient > 0 and cfg.orthogonality_weighting != "none"
        if not wanted or cfg.orthogonality_pairs != "neighbours":
            return None
        return cls(cfg.d_sae, cfg.neighbour_count, device)

    @override
    def on_latents(self, latents: Latents, step: Step) -> None:
        cfg = step.cfg
        if step.schedule.step % cfg.neighbour_refresh_every == 0:
            self.refresh(step.sae.W_dec, cfg.orthogonality_chunk_size)
        tokens, active, acts = latents.tokens, latents.latents, latents.feature_acts
        rate, ranks = step.schedule.statistics_rate, step.sae.ranks
        self.update(acts, acts[tokens, active], tokens, active, rate, ranks)

    @torch.no_grad()
    def refresh(self, W_dec: torch.Tensor, rows_at_a_time: int) -> None:
        """Search the neighbours anew; the moments of pairs that stay neighbours are kept."""
        if self.neighbours.shape[1] == 0:
            return
        _, fresh = nearest_neighbours(W_dec, self.neighbours.shape[1], rows_at_a_time)
        for start in range(0, fresh.shape[0], rows_at_a_time):
            block = slice(start, start + rows_at_a_time)
            same = fresh[block, :, None] == self.neighbours[block, None, :]
            for moments in (self.pair_moment, self.pair_weight):
                moments[block] = (same * moments[block, None, :]).sum(dim=-1)
        self.neighbours = fresh

    @torch.no_grad()
    def update(
        self,
        feature_acts: torch.Tensor,
        values: torch.Tensor,
        tokens: torch.Tensor,
        latents: torch.Tensor,
        rate: Number,
        ranks: Ranks = ALONE,
    ) -> None:
        """Fold one batch into the moments.

        `values` (n_pairs,) are `feature_acts` at the pairs, among which all active ones are.
        """
        n_tokens = feature_acts.shape[0]
        values = values.float()
        moment = torch.zeros_like(self.second_moment)
        squares = ranks.mean(moment.index_add(0, latents, values.square()) / n_tokens)
        self.second_moment.lerp_(squares, rate)
        partner = feature_acts[tokens[:, None], self.neighbours[latents]].float()
        products = torch.zeros_like(self.pair_moment)
        products.index_add_(0, latents, values[:, None] * partner)
        self.pair_moment.lerp_(ranks.mean(products / n_tokens), rate)
        self.pair_weight.lerp_(torch.ones_like(self.pair_weight), rate)

    def normalised(self) -> torch.Tensor:
        """(d_sae, count) cosine over tokens with each neighbour; zero if a latent has not fired."""
        moment = self.pair_moment / self.pair_weight.clamp(min=1e-8)
        spread = self.second_moment
        scale = (spread[:, None] * spread[self.neighbours]).sqrt()
        return torch.where(scale > 1e-12, moment / scale.clamp(min=1e-12), 0.0)


class Orthogonality(Mechanism):
    """The penalty of a step, in units of the running variance of the activations."""

    input_variance: torch.Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_exact(input_variance=torch.zeros((), dtype=torch.float32, device=device))

    @override
    @classmethod
    def of(cls, cfg: MultiScaleTrainingSAEConfig, device: torch.device) -> Self | None:
        return cls(device) if cfg.orthogonality_coefficient > 0 else None

    @override
    def loss(self, step: Step) -> dict[str, torch.Tensor]:
        cfg = step.cfg
        with torch.no_grad():
            variance = step.sae.ranks.var_mean(step.sae_in.float())[0].sum()
            self.input_variance.lerp_(variance, step.schedule.statistics_rate)
        if step.schedule.step % cfg.orthogonality_every:
            return {}
        scale = cfg.orthogonality_coefficient * cfg.orthogonality_every * self.input_variance
        penalty = _chunked if cfg.orthogonality_pairs == "chunks" else _listed
        return {"orthogonality_loss": scale * penalty(step)}

    @override
    def recordable(self, cfg: MultiScaleTrainingSAEConfig) -> bool:
        return cfg.orthogonality_pairs == "chunks"

    @override
    def recording_key(self, cfg: MultiScaleTrainingSAEConfig, step: int) -> Hashable:
        return step % cfg.orthogonality_every == 0


def _chunked(step: Step) -> torch.Tensor:
    """The penalty within random chunks, drawn anew each time."""
    cfg, W_dec = step.cfg, step.sae.W_dec
    chunks = random_chunks(cfg.d_sae, cfg.orthogonality_chunk_size, W_dec.device)
    sketch = step.mechanism(CoactivationSketch)
    if cfg.orthogonality_weighting == "none" or sketch is None:
        return nearest_in_chunks_penalty(W_dec, chunks, step.sae.decode_kernel())
    factors = sketch.factors()

    def weights(chunk: torch.Tensor) -> torch.Tensor:
        return coactivation_weights(sketch.normalised(factors, chunk), cfg.orthogonality_tau)

    return chunk_penalty(W_dec, chunks, weights)


def _listed(step: Step) -> torch.Tensor:
    """The penalty over the nearest neighbours of each latent."""
    cfg, W_dec = step.cfg, step.sae.W_dec
    neighbours = step.mechanism(NeighbourCoactivation)
    if neighbours is None or cfg.orthogonality_weighting == "none":
        _, listed = nearest_neighbours(W_dec, cfg.neighbour_count, cfg.orthogonality_chunk_size)
        weights = torch.ones_like(listed, dtype=torch.float32)
    else:
        listed = neighbours.neighbours
        weights = coactivation_weights(neighbours.normalised(), cfg.orthogonality_tau)
    first, slot = (weights > 0).nonzero(as_tuple=True)
    return pair_penalty(W_dec, first, listed[first, slot], weights[first, slot])
