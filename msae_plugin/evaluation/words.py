"""Which words a latent fires on: a latent that detects one word, or something more general."""

from __future__ import annotations

from typing import Any

import torch

# Firings from which on the word of a latent is judged, and the share of its activation on one word
# that makes it a detector of that word.
FIRINGS_TO_JUDGE = 20
ON_ONE_WORD = 0.5
# Pairs of latent and word that are kept before equal ones are added up: 12 MiB.
_BUFFERED_PAIRS = 2**20


class Words:
    """Numbers of words: tokens that differ in case or in a leading space alone are one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._of_token: dict[int, int] = {}
        self._of_text: dict[str, int] = {}

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n,) token ids to (n,) numbers of words, long, on the CPU."""
        distinct, inverse = tokens.cpu().unique(return_inverse=True)
        return torch.tensor([self._word(int(token)) for token in distinct])[inverse]

    def _word(self, token: int) -> int:
        if token not in self._of_token:
            text = self._tokenizer.decode([token]).strip().lower()
            self._of_token[token] = self._of_text.setdefault(text, len(self._of_text))
        return self._of_token[token]


class ActivationByWord:
    """Sums of each latent's activation by word."""

    def __init__(self) -> None:
        self._pairs: list[torch.Tensor] = []
        self._sums: list[torch.Tensor] = []
        self._room = _BUFFERED_PAIRS

    def add(self, latents: torch.Tensor, words: torch.Tensor) -> None:
        """Add (n_tokens, d_sae) latents at words (n_tokens,)."""
        at, latent = latents.nonzero(as_tuple=True)
        self._pairs.append((latent.cpu() << 32) + words[at.cpu()])
        self._sums.append(latents[at, latent].abs().float().cpu())
        if sum(map(len, self._pairs)) > self._room:
            self._add_up()
            self._room = max(_BUFFERED_PAIRS, 2 * len(self._pairs[0]))

    def _add_up(self) -> None:
        pairs, inverse = torch.cat(self._pairs).unique(return_inverse=True)
        sums = torch.zeros(len(pairs)).index_add_(0, inverse, torch.cat(self._sums))
        self._pairs, self._sums = [pairs], [sums]

    def single_word_share(self, firings: torch.Tensor) -> float | None:
        """Share of the latents with `ON_ONE_WORD` of their activation on one word.

        Of those that fired on `FIRINGS_TO_JUDGE` tokens (`firings` is (d_sae,)); None when there
        are none.
        """
        judged = firings >= FIRINGS_TO_JUDGE
        if not self._pairs or not judged.any():
            return None
        self._add_up()
        latent, sums = self._pairs[0] >> 32, self._sums[0]
        total = torch.zeros(len(firings)).index_add_(0, latent, sums)
        largest = torch.zeros(len(firings)).scatter_reduce_(0, latent, sums, "amax")
        return float((largest >= ON_ONE_WORD * total)[judged].float().mean())
