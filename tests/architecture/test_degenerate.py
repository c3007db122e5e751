"""With every mechanism off the architecture is SAELens' own, in training and in inference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainingSAE
from steps import activations, make, plain, train

from msae_plugin import MultiScaleSAE, MultiScaleSAEConfig, MultiScaleTrainingSAE

N_STEPS = 50


def some_dead(step: int) -> torch.Tensor:
    return torch.rand(13, generator=torch.Generator().manual_seed(step)) < 0.2


def same_start(ours: MultiScaleTrainingSAE, theirs: TrainingSAE[Any]) -> None:
    weights = {n: p.detach().clone() for n, p in theirs.named_parameters()}
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert not set(missing) & set(weights)


@pytest.mark.parametrize("aux", [0.0, 1.0], ids=["no AuxK", "AuxK"])
@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "not rescaled"])
def test_training_is_batchtopk(aux: float, rescale: bool) -> None:
    shared = {
        "dtype": "float64",
        "aux_loss_coefficient": aux,
        "rescale_acts_by_decoder_norm": rescale,
    }
    ours = make(**plain(**shared))
    theirs = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=6, d_sae=13, k=3, **shared))
    same_start(ours, theirs)
    a = train(ours, N_STEPS, dead=some_dead)
    b = train(theirs, N_STEPS, dead=some_dead)
    for step, (mine, reference) in enumerate(zip(a, b, strict=True)):
        assert mine.loss.item() == pytest.approx(reference.loss.item(), rel=1e-9), step
        torch.testing.assert_close(mine.feature_acts, reference.feature_acts, rtol=0, atol=1e-9)
        torch.testing.assert_close(mine.sae_out, reference.sae_out, rtol=0, atol=1e-9)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=0, atol=1e-9)
    # Weights moved at all, and the auxiliary loss was there when asked for.
    assert (a[0].loss - a[-1].loss).item() > 0
    auxiliary = [float(o.losses.get("auxiliary_reconstruction_loss", 0.0)) for o in a]
    assert (max(auxiliary) > 0) == (aux > 0)


def test_thresholds_differ_by_the_start_of_the_running_mean_alone() -> None:
    """SAELens' estimate starts at zero; ours is the plain mean until 1 / rate values were seen."""
    rate = 0.01
    ours = make(**plain(dtype="float64", topk_threshold_lr=rate))
    theirs = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=6, d_sae=13, k=3, dtype="float64", topk_threshold_lr=rate, aux_loss_coefficient=1
        )
    )
    same_start(ours, theirs)
    outputs = train(ours, N_STEPS)
    train(theirs, N_STEPS)
    cuts = [float(o.feature_acts[o.feature_acts > 0].min()) for o in outputs]
    assert float(ours.topk_threshold) == pytest.approx(sum(cuts) / N_STEPS, rel=1e-5)
    from_zero = sum(rate * (1 - rate) ** (N_STEPS - 1 - n) * cut for n, cut in enumerate(cuts))
    assert float(theirs.topk_threshold) == pytest.approx(from_zero, rel=1e-9)
    assert float(theirs.topk_threshold) < 0.5 * float(ours.topk_threshold)


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "not rescaled"])
def test_nested_training_is_matryoshka(rescale: bool) -> None:
    shared = {"dtype": "float64", "rescale_acts_by_decoder_norm": rescale}
    widths = [3, 7, 13]
    ours = make(
        **plain(
            prefix_fractions=[3 / 13, 7 / 13],
            prefix_weight=1.0,
            prefix_sort_every=0,
            detach_inner_prefixes=False,
            **shared,
        )
    )
    assert ours.cfg.prefix_widths == widths
    theirs = MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(
            d_in=6, d_sae=13, k=3, matryoshka_widths=list(widths), **shared
        )
    )
    same_start(ours, theirs)
    a = train(ours, N_STEPS, dead=some_dead)
    b = train(theirs, N_STEPS, dead=some_dead)
    for step, (mine, reference) in enumerate(zip(a, b, strict=True)):
        assert set(reference.losses) == set(mine.losses)
        for name, loss in reference.losses.items():
            assert mine.losses[name].item() == pytest.approx(loss.item(), rel=1e-9), (step, name)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(5,), (2, 4)], ids=["2-D", "3-D"])
def test_inference_is_jumprelu_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    ours = MultiScaleSAE(MultiScaleSAEConfig(d_in=6, d_sae=13, dtype=dtype))
    theirs = JumpReLUSAE(JumpReLUSAEConfig(d_in=6, d_sae=13, dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(p.shape, generator=generator).to(p.dtype)
        for name, p in theirs.named_parameters()
    }
    weights["threshold"] = weights["threshold"].abs()
    ours.load_state_dict({n: w.to(ours.get_parameter(n).dtype) for n, w in weights.items()})
    theirs.load_state_dict(weights)
    x = activations(torch.Size(shape).numel(), 6, 3).reshape(*shape, 6)
    with torch.no_grad():
        latents = theirs.encode(x)
        assert torch.equal(ours.encode(x), latents)
        assert torch.equal(ours.decode(latents), theirs.decode(latents))
        assert torch.equal(ours(x), theirs(x))
    assert 0 < (latents > 0).float().mean() < 1
