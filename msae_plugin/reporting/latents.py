"""What is known of every latent of an SAE, from its firings on some text and from its weights.

The firings of one pass are kept as pairs (token, value) sorted by latent, 8 bytes each: 100,000
tokens at an L0 of 64 are 51 MB. Everything that the browser shows of a latent is read off them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from msae_plugin.common.errors import InputError
from msae_plugin.evaluation.heldout import BLOCK_ELEMENTS, LatentBatch, cosines_to_others

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

TOP_EXAMPLES, EXAMPLES_PER_QUANTILE = 6, 2
QUANTILES = (0.9, 0.5, 0.1)
HISTOGRAM_BINS = 20
MOST_PAIRS = 2**28
"""2 GiB. An SAE of 16,384 latents that was never trained fires on half of them."""
RECURS_FROM = 0.7
"""Largest decoder cosine from which on another seed has the latent too."""
SHADES = 999
"""Values inside an example are shares of the latent's largest in so many steps."""


class Firings:
    """The pairs of one SAE; a token's address is window * context_size + position."""

    def __init__(self, d_sae: int, context_size: int) -> None:
        self.d_sae = d_sae
        self.context_size = context_size
        self.n_tokens = 0
        self._parts: list[tuple[NDArray[np.int32], NDArray[np.int32], Floats]] = []
        self._pairs = 0

    def update(self, batch: LatentBatch) -> None:
        """Take in the latents of consecutive tokens, as many as fit into memory."""
        token, latent = batch.latents.nonzero(as_tuple=True)
        address = (batch.windows * self.context_size + batch.positions).to(token.device)[token]
        value = batch.latents[token, latent].float()
        columns = (address.int(), latent.int(), value)
        self._parts.append(tuple(column.cpu().numpy() for column in columns))  # type: ignore[arg-type]
        self.n_tokens += batch.latents.shape[0]
        self._pairs += len(token)
        if self._pairs > MOST_PAIRS:
            raise InputError(
                f"{batch.name!r} fires on {self._pairs / self.n_tokens:,.0f} latents per token",
                "give fewer --tokens",
            )

    def sorted(self) -> SortedFirings:
        """By latent, and by address in each."""
        address, latent, value = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        self._parts.clear()
        order = np.argsort(latent, kind="stable")
        ends = np.cumsum(np.bincount(latent, minlength=self.d_sae))
        return SortedFirings(self.n_tokens, address[order], value[order], ends)


@dataclass(frozen=True)
class SortedFirings:
    """Firings of every latent; `of` gives those of one."""

    n_tokens: int
    addresses: NDArray[np.int32]
    values: Floats
    ends: Ints  # (d_sae,)

    def of(self, latent: int) -> tuple[NDArray[np.int32], Floats]:
        """Addresses, ascending, and values."""
        part = slice(int(self.ends[latent - 1]) if latent else 0, int(self.ends[latent]))
        return self.addresses[part], self.values[part]

    def together(self, latent: int, other: int) -> tuple[float, float]:
        """Sum f_i f_j / sqrt(sum f_i^2 sum f_j^2), and the share of `latent`'s tokens with both."""
        (tokens, values), (others, other_values) = self.of(latent), self.of(other)
        norm = float(np.linalg.norm(values) * np.linalg.norm(other_values))
        if not norm:
            return 0.0, 0.0
        place = np.searchsorted(others, tokens).clip(max=len(others) - 1)
        both = others[place] == tokens
        return float(values[both] @ other_values[place[both]]) / norm, float(both.mean())


def examples(
    addresses: NDArray[np.int32], values: Floats, documents: Ints, context_size: int
) -> list[list[list[int]]]:
    """Where a latent fires most, then around each quantile of its activation.

    No two of a group are from one document, and no token is shown twice. `addresses` ascend, and
    `documents` has the document of every address. An example is [address of the token, position in
    the window, shade, position, ...]: the tokens of its document in its window where it fires.
    """
    size = np.abs(values)
    order = np.argsort(-size, kind="stable")
    used: set[int] = set()

    def chosen(candidates: Ints, count: int) -> list[list[int]]:
        found: dict[int, int] = {}
        for at in candidates.tolist():
            if at not in used and len(found) < count:
                found.setdefault(int(documents[addresses[at]]), at)
        used.update(found.values())
        largest = float(size[order[0]])
        return [
            _example(addresses, size, documents, at, context_size, largest) for at in found.values()
        ]

    # A latent of 100,000 firings in two documents is not looked through to its end.
    groups = [chosen(order[: 100 * TOP_EXAMPLES], TOP_EXAMPLES)]
    for quantile in QUANTILES:
        start = int((1 - quantile) * len(order))
        near = order[start : start + 50]
        groups.append(chosen(near, EXAMPLES_PER_QUANTILE))
    return groups


def _example(
    addresses: NDArray[np.int32], size: Floats, documents: Ints, at: int, context_size: int,
    largest: float,
) -> list[int]:  # fmt: skip
    address = int(addresses[at])
    window = address // context_size * context_size
    first, end = np.searchsorted(addresses, [window, window + context_size])
    inside = np.arange(first, end)
    inside = inside[documents[addresses[inside]] == documents[address]]
    shades = np.ceil(size[inside] / largest * SHADES).astype(int)
    return [address, *np.stack([addresses[inside] - window, shades], 1).ravel().tolist()]


def histogram(values: Floats) -> list[int]:
    """Firings by activation, in equal bins from zero to the largest."""
    size = np.abs(values)
    return np.histogram(size, HISTOGRAM_BINS, (0, float(size.max()) or 1.0))[0].tolist()


def _split(rows: torch.Tensor, width: int) -> Sequence[torch.Tensor]:
    """Blocks of rows whose products of this width fit into memory."""
    return rows.split(max(1, BLOCK_ELEMENTS // max(1, width)))


def _joined(parts: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices of `topk` or `max` of every block."""
    values, indices = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return values, indices


def unit(directions: torch.Tensor) -> torch.Tensor:
    """Rows of length one, float32."""
    return torch.nn.functional.normalize(directions.detach().float(), dim=1)


def nearest(W_dec: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and indices, (d_sae, count) each, of the nearest other decoder directions."""
    directions = unit(W_dec)
    count = min(count, len(directions) - 1)
    blocks = cosines_to_others(directions, BLOCK_ELEMENTS)
    return _joined([cosines.topk(count, dim=1) for _, cosines in blocks])


def best_match(W_dec: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest cosine (d_sae,) of each decoder direction in another SAE, and which latent it is."""
    theirs = unit(other)
    return _joined([(b @ theirs.T).max(dim=1) for b in _split(unit(W_dec), len(theirs))])


def unembedding(model: Any, d_in: int) -> torch.Tensor | None:
    """(d_in, vocabulary): what a direction at the end of the residual stream adds to the logits.

    The gain of the last norm is part of it where the model has TransformerLens' hooks. None for
    activations of another width than the residual stream.
    """
    if hasattr(model, "W_U"):
        matrix = model.W_U.detach().float()
        gain = getattr(getattr(model, "ln_final", None), "w", None)
        if gain is not None:
            # A bridge has Gemma's own weights, which are the gain less 1.
            offset = float(getattr(model.cfg, "rmsnorm_uses_offset", False))
            matrix = (offset + gain.detach().float())[:, None] * matrix
    else:
        matrix = model.model.get_output_embeddings().weight.detach().float().T
    return matrix if matrix.shape[0] == d_in else None


def logits(
    directions: torch.Tensor, matrix: torch.Tensor, count: int
) -> Iterator[tuple[list[int], list[float], list[int], list[float]]]:
    """Of each direction the tokens it promotes most and suppresses most, with their logits.

    Logits are taken relative to their mean over the vocabulary, which the softmax ignores.
    """
    matrix = matrix.to(directions.device)
    for block in _split(unit(directions), matrix.shape[1]):
        effect = block @ matrix
        effect -= effect.mean(dim=1, keepdim=True)
        most: Any = effect.topk(count, dim=1)
        least: Any = effect.topk(count, dim=1, largest=False)
        parts = [most.indices, most.values, least.indices, least.values]
        yield from zip(*(part.tolist() for part in parts), strict=True)


def alignment(sae: Any) -> list[float] | None:
    """Cosine of each latent's encoder and decoder direction; None for an SAE without W_enc."""
    W_enc = getattr(sae, "W_enc", None)
    if W_enc is None:
        return None
    return torch.cosine_similarity(W_enc.detach(), sae.W_dec.detach().T, dim=0).tolist()


def prefix_ends(sae: Any) -> list[int]:
    """Where the nested prefixes end, the whole dictionary last: [d_sae] where there are none.

    In an export of this package the latents of a prefix are its first ones.
    """
    details = sae.cfg.metadata.training_architecture_details or {}
    d_sae = int(sae.cfg.d_sae)
    widths = details.get("matryoshka_widths") or [
        max(1, round(share * d_sae)) for share in details.get("prefix_fractions") or []
    ]
    return [*sorted({int(width) for width in widths if width < d_sae}), d_sae]
