"""Losses and divergences against SAEBench's formula and against float64, written out."""

from typing import Any

import pytest
import torch
from transformer_lens import utils

from msae_plugin.evaluation.saebench.core_predictions import CleanPredictions, Predictions

PROMPTS, CONTEXT, VOCABULARY = 3, 9, 50


class _Model:
    """Of a HookedTransformer its loss alone is asked for."""

    @staticmethod
    def loss_fn(logits: torch.Tensor, tokens: torch.Tensor, per_token: bool) -> torch.Tensor:
        return utils.lm_cross_entropy_loss(logits, tokens, per_token=per_token)


def saebenchs_kl(original: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`sae_bench.evals.core.main.get_recons_loss`'s inner function, read and written anew."""
    p, q = original.softmax(-1), new.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def exact_kl(original: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    p, q = original.double().log_softmax(-1), new.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def batch(dtype: torch.dtype, spread: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (PROMPTS, CONTEXT, VOCABULARY)
    clean, new = (torch.randn(shape, generator=generator) * spread for _ in range(2))
    tokens = torch.randint(VOCABULARY, shape[:2], generator=generator)
    return clean.to(dtype), new.to(dtype), tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formulas(dtype: torch.dtype) -> None:
    clean, new, tokens = batch(dtype, 3.0)
    model: Any = _Model()
    found = CleanPredictions(model, clean, tokens).compare(new)
    tolerance = 1e-6 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(found.kl, saebenchs_kl(clean, new), rtol=tolerance, atol=tolerance)
    exact = exact_kl(clean, new).float()
    torch.testing.assert_close(found.kl_float32, exact, rtol=1e-5, atol=1e-6)
    loss = utils.lm_cross_entropy_loss(new, tokens, per_token=True)
    torch.testing.assert_close(found.ce, loss, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("clean_too", [False, True])
def test_where_a_softmax_underflows_saebenchs_formula_is_followed_to_infinity(
    clean_too: bool,
) -> None:
    clean, new, tokens = batch(torch.float32, 3.0)
    new[1, 4, 7] = -200.0
    if clean_too:
        clean[1, 4, 7] = -200.0
    found = CleanPredictions(_Model(), clean, tokens).compare(new)
    expected = saebenchs_kl(clean, new)
    assert not expected[1, 4].isfinite()
    torch.testing.assert_close(found.kl, expected, equal_nan=True, rtol=1e-6, atol=1e-6)
    exact = exact_kl(clean, new).float()
    assert exact.isfinite().all()
    torch.testing.assert_close(found.kl_float32, exact, rtol=1e-5, atol=1e-6)


def test_parts_of_a_batch_are_the_batch() -> None:
    clean, new, tokens = batch(torch.float32, 3.0)
    predictions = CleanPredictions(_Model(), clean, tokens)
    parts = [slice(0, 2), slice(2, 3)]
    joined = Predictions.joined([predictions.compare(new[part], part) for part in parts])
    whole = predictions.compare(new)
    for name in ("ce", "kl", "kl_float32"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name))
