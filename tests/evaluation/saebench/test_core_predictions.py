"""Losses and divergences against SAEBench's formula and against float64, written out."""

from typing import Any

import pytest
import torch
from tolerance import rounding_tolerance
from transformer_lens import utils

from msae_plugin.evaluation.saebench.model_side import CleanPredictions, Predictions

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


def kl_rounding(original: torch.Tensor, new: torch.Tensor) -> float:
    """How far two computations may differ: a softmax is a sum, and so is the divergence."""
    p, q = original.double().log_softmax(-1), new.double().log_softmax(-1)
    return rounding_tolerance(2 * VOCABULARY + 4, (p.exp() * (p.abs() + q.abs())).sum(-1))


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
    of_kl = kl_rounding(clean, new)
    of_ce = rounding_tolerance(VOCABULARY + 2, new.double().log_softmax(-1))
    # In bfloat16 the operations are SAEBench's, one by one.
    same = dtype == torch.bfloat16
    torch.testing.assert_close(
        found.kl, saebenchs_kl(clean, new), rtol=0, atol=0 if same else of_kl
    )
    exact = exact_kl(clean, new).float()
    torch.testing.assert_close(found.kl_float32, exact, rtol=0, atol=of_kl)
    loss = utils.lm_cross_entropy_loss(new, tokens, per_token=True)
    torch.testing.assert_close(found.ce, loss, rtol=0, atol=0 if same else of_ce)


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
    atol = kl_rounding(clean, new)
    torch.testing.assert_close(found.kl, expected, equal_nan=True, rtol=0, atol=atol)
    exact = exact_kl(clean, new).float()
    assert exact.isfinite().all()
    torch.testing.assert_close(found.kl_float32, exact, rtol=0, atol=atol)


def test_parts_of_a_batch_are_the_batch() -> None:
    clean, new, tokens = batch(torch.float32, 3.0)
    predictions = CleanPredictions(_Model(), clean, tokens)
    parts = [slice(0, 2), slice(2, 3)]
    joined = Predictions.joined([predictions.compare(new[part], part) for part in parts])
    whole = predictions.compare(new)
    for name in ("ce", "kl", "kl_float32"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name))
