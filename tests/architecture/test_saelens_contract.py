"""What SAELens demands of an architecture (its training and inference classes), for every preset.

Every preset is trained for a few steps, past several re-sorts of its rings, before it is looked at.
"""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import TrainCoefficientConfig, TrainingSAEConfig, TrainStepOutput
from safetensors.torch import load_file
from steps import activations, step_input, to_export_units, train
from tolerance import rounding_tolerance

from msae_plugin import (
    MultiScaleSAE,
    MultiScaleTrainingSAE,
    MultiScaleTrainingSAEConfig,
    preset,
    preset_names,
)

D_IN, D_SAE, K, N_STEPS = 12, 37, 4, 25
TRAINING_ONLY = (
    "mechanisms.",
    "topk_threshold",
    "candidate_threshold",
    "firing_rate",
    "latent_group",
)


def config(name: str) -> MultiScaleTrainingSAEConfig:
    overrides: dict[str, Any] = {}
    if name == "nested":
        overrides["prefix_sort_every"] = 5
    return preset(name, d_in=D_IN, d_sae=D_SAE, k=K, training_steps=N_STEPS, **overrides)


@pytest.fixture(scope="module", params=preset_names())
def trained(request: pytest.FixtureRequest) -> MultiScaleTrainingSAE:
    """A trained SAE in evaluation mode. Tests that change it work on a copy."""
    torch.manual_seed(0)
    sae = MultiScaleTrainingSAE(config(request.param))
    generator = torch.Generator().manual_seed(0)
    train(
        sae,
        N_STEPS,
        dead=lambda step: torch.rand(D_SAE, generator=generator) < 0.2,
        l1=sae.cfg.l1_coefficient,
    )
    return sae.eval()


@pytest.fixture
def batch() -> torch.Tensor:
    return activations(30, D_IN, 999)


def test_the_registry_knows_both_classes() -> None:
    assert get_sae_training_class("multiscale") == (
        MultiScaleTrainingSAE,
        MultiScaleTrainingSAEConfig,
    )
    assert get_sae_class("multiscale")[0] is MultiScaleSAE


def test_the_config_survives_json(trained: MultiScaleTrainingSAE) -> None:
    through_json = json.loads(json.dumps(trained.cfg.to_dict()))
    again = TrainingSAEConfig.from_dict(through_json)
    assert type(again) is MultiScaleTrainingSAEConfig
    assert again.to_dict() == trained.cfg.to_dict()
    assert not any(isinstance(value, tuple) for value in vars(again).values())


def test_attributes_can_be_set_on_the_config(trained: MultiScaleTrainingSAE) -> None:
    cfg = copy.deepcopy(trained.cfg)
    cfg.something_that_saebench_wants = 3  # type: ignore[attr-defined]
    cfg.dtype = "bfloat16"
    assert cfg.something_that_saebench_wants == 3  # type: ignore[attr-defined]


def test_a_training_step_returns_what_the_trainer_reads(
    trained: MultiScaleTrainingSAE, batch: torch.Tensor
) -> None:
    sae = copy.deepcopy(trained).train()
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[3] = True
    output = sae.training_forward_pass(step_input(batch, N_STEPS, dead, 0.1))
    assert isinstance(output, TrainStepOutput)
    assert output.sae_in.shape == output.sae_out.shape == batch.shape
    assert output.feature_acts.shape == output.hidden_pre.shape == (30, D_SAE)
    assert (output.feature_acts >= 0).all()
    total = torch.stack(list(output.losses.values())).sum()
    torch.testing.assert_close(output.loss, total)
    assert "mse_loss" in output.losses
    output.loss.backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert sae.W_enc.grad is not None
    assert sae.W_enc.grad.abs().sum() > 0
    for value in output.metrics.values():
        evaluated = value() if callable(value) else value
        assert isinstance(float(evaluated), float)
    assert {"k", "topk_threshold", "nearest_cosine"} <= set(output.metrics)
    # The squared error that is reported is that of the reconstruction that is returned.
    error = (output.sae_out - batch).pow(2).sum(-1).mean() / sae.latent_unit() ** 2
    torch.testing.assert_close(output.losses["mse_loss"], error, rtol=1e-4, atol=1e-4)


def test_training_latents_are_those_of_encode(
    trained: MultiScaleTrainingSAE, batch: torch.Tensor
) -> None:
    """What the trainer counts as firing is what `encode` gives in training mode."""
    sae = copy.deepcopy(trained).train()
    floor = sae.mechanisms.firing_floor
    with torch.no_grad():
        before = None if floor is None else floor.allowance.clone()
        # The step first: it folds the batch into the statistics before it selects.
        output = sae.training_forward_pass(step_input(batch, N_STEPS + 1))
        if floor is not None and before is not None:
            # The allowances have moved on to the next step.
            floor.allowance.copy_(before)
        latents = sae.encode(batch)
    assert torch.equal(latents > 0, output.feature_acts > 0)
    torch.testing.assert_close(latents, output.feature_acts, rtol=1e-5, atol=1e-5)


def test_coefficients_are_schedules_of_the_trainer(trained: MultiScaleTrainingSAE) -> None:
    coefficients = trained.get_coefficients()
    if trained.cfg.l1_coefficient == 0:
        assert coefficients == {}
    else:
        assert coefficients == {"l1": TrainCoefficientConfig(0.04, 1000)}


def test_decode_is_linear_and_stateless(
    trained: MultiScaleTrainingSAE, batch: torch.Tensor
) -> None:
    sae = trained
    with torch.no_grad():
        f = sae.encode(batch)
        once, twice = sae.decode(f), sae.decode(f)
        assert torch.equal(once, twice)
        generator = torch.Generator().manual_seed(0)
        g = torch.randn(f.shape, generator=generator)  # edited and negative latents
        zero = sae.decode(torch.zeros_like(f))
        torch.testing.assert_close(zero, sae.decoder_bias().expand_as(zero))
        mixed = sae.decode(2 * f - 3 * g) - zero
        separate = 2 * (sae.decode(f) - zero) - 3 * (sae.decode(g) - zero)
        torch.testing.assert_close(mixed, separate, rtol=1e-4, atol=1e-3)
        norm = sae.W_dec.norm(dim=1) if sae.cfg.rescale_acts_by_decoder_norm else 1.0
        torch.testing.assert_close(
            sae.decode(g), (g / norm) @ sae.W_dec + sae.decoder_bias(), rtol=1e-4, atol=1e-4
        )
        assert torch.equal(sae.decode(f), once)


def test_eval_encode_is_a_function_of_one_token(
    trained: MultiScaleTrainingSAE, batch: torch.Tensor
) -> None:
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    with torch.no_grad():
        together = trained.encode(batch)
        assert 0 < (together > 0).float().mean() < 0.9
        shaped = trained.encode(batch.reshape(5, 6, D_IN)).reshape(30, D_SAE)
        shuffled = trained.encode(batch.flip(0)).flip(0)
        alone = torch.cat([trained.encode(token[None]) for token in batch])
        bare = torch.stack([trained.encode(token) for token in batch])
        trained(batch)
    for other in (shaped, shuffled, alone, bare):
        torch.testing.assert_close(other, together, rtol=1e-5, atol=1e-5)
    assert not trained.training
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_export_is_the_trained_sae(
    trained: MultiScaleTrainingSAE, batch: torch.Tensor, tmp_path: Path
) -> None:
    trained.save_inference_model(tmp_path)
    exported = SAE.load_from_disk(tmp_path)
    assert isinstance(exported, MultiScaleSAE)
    names = set(load_file(tmp_path / "sae_weights.safetensors"))
    assert not [n for n in names if n.startswith(TRAINING_ONLY)]
    # A norm is a sum of D_IN squares and its root, taken once to divide and once here.
    atol = rounding_tolerance(2 * (D_IN + 2), 1.0)
    torch.testing.assert_close(exported.W_dec.norm(dim=-1), torch.ones(D_SAE), rtol=0, atol=atol)
    with torch.no_grad():
        theirs, mine = exported.encode(batch), to_export_units(trained, trained.encode(batch))
        assert torch.equal(theirs > 0, mine > 0)
        torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(exported(batch), trained(batch), rtol=1e-5, atol=1e-5)
        decoded = theirs @ exported.W_dec + exported.b_dec
        torch.testing.assert_close(exported.decode(theirs), decoded, rtol=1e-5, atol=1e-5)
    # The order of the export is a permutation under which every ring is contiguous.
    order = trained.export_order()
    assert sorted(order.tolist()) == list(range(D_SAE))
    if len(trained.cfg.prefix_widths) > 1:
        rings = trained.latent_group[order]
        assert torch.equal(rings, rings.sort().values)
        assert not torch.equal(order, torch.arange(D_SAE))  # it was re-sorted at least once


def test_exported_prefixes_are_the_trained_ones(batch: torch.Tensor, tmp_path: Path) -> None:
    """The first `width` exported latents reconstruct as the trained prefix did."""
    torch.manual_seed(0)
    sae = MultiScaleTrainingSAE(config("nested"))
    outputs = train(sae, N_STEPS)
    sae.save_inference_model(tmp_path)
    exported = SAE.load_from_disk(tmp_path)
    sae.train()
    order = sae.export_order()
    with torch.no_grad():
        output = sae.training_forward_pass(step_input(batch, N_STEPS + 1))
        acts = output.feature_acts[:, order]
        for width in sae.cfg.prefix_widths[:-1]:
            prefix = acts[:, :width] @ exported.W_dec[:width] + exported.b_dec
            error = sae.cfg.prefix_weight * (prefix - batch).pow(2).sum(-1).mean()
            error = error / sae.latent_unit() ** 2  # losses are in the training unit
            torch.testing.assert_close(
                output.losses[f"inner_mse_loss_{width}"], error, rtol=1e-4, atol=1e-4
            )
    assert len(outputs) == N_STEPS


def test_a_training_checkpoint_is_complete(
    trained: MultiScaleTrainingSAE, batch: torch.Tensor, tmp_path: Path
) -> None:
    trained.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    assert isinstance(again, MultiScaleTrainingSAE)
    fresh = MultiScaleTrainingSAE(copy.deepcopy(trained.cfg))
    fresh.load_weights_from_checkpoint(tmp_path)
    for loaded in (again, fresh):
        state = loaded.state_dict()
        assert set(state) == set(trained.state_dict())
        for name, tensor in trained.state_dict().items():
            assert state[name].dtype == tensor.dtype, name
            assert torch.equal(state[name], tensor), name
    # And the next step is the same step.
    results = []
    for sae in (copy.deepcopy(trained), again, fresh):
        sae.train()
        torch.manual_seed(1)
        results.append(sae.training_forward_pass(step_input(batch, N_STEPS, None, 0.1)))
    for other in results[1:]:
        torch.testing.assert_close(other.loss, results[0].loss, rtol=0, atol=0)
        assert torch.equal(other.feature_acts, results[0].feature_acts)


def test_from_pretrained_reads_the_export(
    trained: MultiScaleTrainingSAE, batch: torch.Tensor, tmp_path: Path
) -> None:
    trained.save_inference_model(tmp_path)

    def from_folder(
        repo_id: str,
        folder_name: str,
        device: str = "cpu",
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor], None]:
        return *sae_lens_disk_loader(tmp_path, device, cfg_overrides), None

    sae = SAE.from_pretrained("someone/something", "sae", converter=from_folder)
    with torch.no_grad():
        expected = to_export_units(trained, trained.encode(batch))
        torch.testing.assert_close(sae.encode(batch), expected, rtol=1e-5, atol=1e-5)


def test_folding_the_exported_decoder_changes_nothing(
    trained: MultiScaleTrainingSAE, batch: torch.Tensor, tmp_path: Path
) -> None:
    trained.save_inference_model(tmp_path)
    plain, folded = SAE.load_from_disk(tmp_path), SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        folded.W_dec.mul_(3.0)
        folded.W_enc.div_(3.0)
        folded.b_enc.div_(3.0)
        folded.threshold.div_(3.0)
        folded.fold_W_dec_norm()
        torch.testing.assert_close(folded.encode(batch), plain.encode(batch), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(folded(batch), plain(batch), rtol=1e-4, atol=1e-4)


def test_folding_the_training_decoder_changes_nothing(
    trained: MultiScaleTrainingSAE, batch: torch.Tensor
) -> None:
    folded = copy.deepcopy(trained)
    folded.fold_W_dec_norm()
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(D_SAE))
    with torch.no_grad():
        torch.testing.assert_close(
            folded.encode(batch), trained.encode(batch), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(folded(batch), trained(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_hooks_see_dense_tensors(
    trained: MultiScaleTrainingSAE, batch: torch.Tensor, mode: str
) -> None:
    sae = copy.deepcopy(trained).train(mode == "train")
    with torch.no_grad():
        _, cache = sae.run_with_cache(batch)
    assert cache["hook_sae_acts_post"].shape == (30, D_SAE)
    assert cache["hook_sae_acts_pre"].shape == (30, D_SAE)
    assert {"hook_sae_input", "hook_sae_recons", "hook_sae_output"} <= set(cache)


def test_the_error_term_makes_forward_the_identity(
    trained: MultiScaleTrainingSAE, batch: torch.Tensor, tmp_path: Path
) -> None:
    trained.save_inference_model(tmp_path)
    for sae in (copy.deepcopy(trained), SAE.load_from_disk(tmp_path)):
        sae.use_error_term = True
        with torch.no_grad():
            torch.testing.assert_close(sae(batch), batch, rtol=1e-4, atol=1e-4)


def test_copies_and_pickles(trained: MultiScaleTrainingSAE, batch: torch.Tensor) -> None:
    with torch.no_grad():
        expected = trained.encode(batch)
        assert torch.equal(copy.deepcopy(trained).encode(batch), expected)
    cfg = pickle.loads(pickle.dumps(trained.cfg))
    assert cfg.to_dict() == trained.cfg.to_dict()


def test_histograms_are_arrays(trained: MultiScaleTrainingSAE) -> None:
    for values in trained.log_histograms().values():
        assert values.ndim >= 1


def test_gradients_flow_through_the_export(
    trained: MultiScaleTrainingSAE, batch: torch.Tensor, tmp_path: Path
) -> None:
    """Attribution methods of SAEBench differentiate through encode and decode."""
    trained.save_inference_model(tmp_path)
    sae = SAE.load_from_disk(tmp_path)
    x = batch.clone().requires_grad_()
    sae(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().sum() > 0
