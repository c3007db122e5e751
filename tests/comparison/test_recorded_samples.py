"""Recorded samples against SAELens' evaluation with the generator itself."""

from __future__ import annotations

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig, eval_sae_on_synthetic_data

from msae_plugin.comparison.ground_truth import RecordedSamples


@pytest.fixture(scope="module")
def model() -> SyntheticModel:
    return SyntheticModel(SyntheticModelConfig(num_features=40, hidden_dim=16, seed=3))


def test_an_evaluation_on_recorded_samples_is_the_evaluation(model: SyntheticModel) -> None:
    torch.manual_seed(0)
    sae: SAE = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=16, d_sae=24, k=3))
    torch.manual_seed(1)
    direct = eval_sae_on_synthetic_data(
        sae, model.feature_dict, model.activation_generator, num_samples=700, batch_size=300
    )
    torch.manual_seed(1)
    recorded = RecordedSamples.record(model.activation_generator, 700, 300)
    for _ in range(2):
        again = eval_sae_on_synthetic_data(
            sae, model.feature_dict, recorded.rewind(), num_samples=700, batch_size=300
        )
        assert again.to_dict() == direct.to_dict()


def test_what_was_not_recorded_is_refused(model: SyntheticModel) -> None:
    recorded = RecordedSamples.record(model.activation_generator, 10, 6)
    with pytest.raises(ValueError, match="batch of 6 samples recorded, 5 asked"):
        recorded.sample(5)
    assert recorded.sample(6).shape == (6, 40)
    assert recorded.sample(4).shape == (4, 40)
    with pytest.raises(ValueError, match="only 2 batches"):
        recorded.sample(6)
