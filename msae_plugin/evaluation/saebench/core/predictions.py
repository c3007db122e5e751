"""Next-token losses and divergences of one batch, by SAEBench's formulas and in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Tokens whose logits are worked on at a time: rows stay in the processor's cache. 2048 tokens of a
# 49k vocabulary: 1.9 s whole, 1.1 s in parts (one thread).
TOKENS_AT_A_TIME = 16
# exp of it is still a normal float32. Above it the logarithm of a softmax and a log-softmax are the
# same but for rounding; below, SAEBench's formula loses digits and ends in infinity and NaN.
LOWEST_LOG_PROBABILITY = -87.0
ALL_PROMPTS = slice(None)


@dataclass(frozen=True)
class Predictions:
    """What a batch's logits say, per position.

    Args:
        ce: (batch, seq - 1) loss of predicting the next token, in the model's dtype as in
            TransformerLens.
        kl: (batch, seq) KL from the clean predictions, SAEBench's formula: logarithms of a softmax
            in the model's dtype, infinite or NaN where that softmax is 0.
        kl_float32: (batch, seq) the same from float32 log-probabilities.
    """

    ce: torch.Tensor
    kl: torch.Tensor
    kl_float32: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """The predictions of a batch from those of its parts, in their order."""
        return cls(
            torch.cat([part.ce for part in parts]),
            torch.cat([part.kl for part in parts]),
            torch.cat([part.kl_float32 for part in parts]),
        )


class CleanPredictions:
    """The unchanged model's predictions on a batch, computed once for all SAEs.

    Args:
        model: The HookedTransformer.
        logits: (batch, seq, vocabulary) of the unchanged model.
        tokens: (batch, seq) long.
    """

    def __init__(self, model: Any, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        self._model = model
        self._tokens = tokens
        self._vocabulary = logits.shape[-1]
        rows = logits.reshape(-1, self._vocabulary)
        self._probabilities = torch.empty_like(rows)
        self._exact = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        lowest = 0.0
        for part in _parts(len(rows)):
            self._probabilities[part] = rows[part].softmax(-1)
            self._exact[part] = rows[part].float().log_softmax(-1)
            lowest = min(lowest, float(self._exact[part].amin()))
        # SAEBench's own log-probabilities where they are not the exact ones: the logarithms of a
        # rounded softmax.
        self._rounded: torch.Tensor | None = None
        if rows.dtype != torch.float32 or lowest <= LOWEST_LOG_PROBABILITY:
            self._rounded = self._probabilities.log()

    def compare(self, logits: torch.Tensor, prompts: slice = ALL_PROMPTS) -> Predictions:
        """Losses and divergences of other logits on the same batch.

        Args:
            logits: (prompts, seq, vocabulary).
            prompts: Which prompts of the batch they are of.
        """
        tokens = self._tokens[prompts]
        first = (prompts.start or 0) * tokens.shape[1]
        rows = logits.reshape(-1, self._vocabulary)
        kl = torch.empty(len(rows), dtype=rows.dtype, device=rows.device)
        exact = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        following = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        targets = torch.cat([tokens[:, 1:], tokens[:, :1]], 1).reshape(-1, 1)
        for part in _parts(len(rows)):
            of_batch = slice(first + part.start, first + part.stop)
            new = rows[part].float().log_softmax(-1)
            following[part] = -new.gather(-1, targets[part])[:, 0]
            same = self._rounded is None and float(new.amin()) > LOWEST_LOG_PROBABILITY
            if not same:
                kl[part] = self._rounded_kl(rows[part], of_batch)
            clean, weights = self._exact[of_batch], self._probabilities[of_batch]
            if rows.dtype != torch.float32:
                weights = clean.exp()
            exact[part] = torch.sub(clean, new, out=new).mul_(weights).sum(-1)
            if same:
                kl[part] = exact[part]
        if rows.dtype == torch.float32:
            # TransformerLens' own loss is the same log-softmax and gather.
            ce = following.reshape(tokens.shape)[:, :-1]
        else:
            ce = self._model.loss_fn(logits, tokens, per_token=True)
        return Predictions(ce, kl.reshape(tokens.shape), exact.reshape(tokens.shape))

    def _rounded_kl(self, rows: torch.Tensor, of_batch: slice) -> torch.Tensor:
        """(tokens,) by SAEBench's formula to the letter."""
        probabilities = self._probabilities[of_batch]
        clean = probabilities.log() if self._rounded is None else self._rounded[of_batch]
        new = rows.softmax(-1).log_()
        return torch.sub(clean, new, out=new).mul_(probabilities).sum(-1)


def _parts(total: int) -> list[slice]:
    starts = range(0, total, TOKENS_AT_A_TIME)
    return [slice(start, min(start + TOKENS_AT_A_TIME, total)) for start in starts]
