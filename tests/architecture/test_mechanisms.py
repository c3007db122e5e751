"""The moments of a step at which a mechanism acts, and the old names of its buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import activations, make, plain, step_input
from typing_extensions import Self, override

from msae_plugin import MultiScaleTrainingSAE, MultiScaleTrainingSAEConfig
from msae_plugin.architecture.mechanisms import MECHANISMS
from msae_plugin.architecture.mechanisms.base import Latents, Mechanism, Step

N_TOKENS, D_IN, D_SAE = 32, 6, 13


class Probe(Mechanism):
    """Notes when it is called, ranks one latent first and adds a term to the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.latents: Latents | None = None

    @override
    @classmethod
    def of(cls, cfg: MultiScaleTrainingSAEConfig, device: torch.device) -> Self | None:
        return cls()

    @override
    def before_step(self, step: Step) -> None:
        self.calls.append("before_step")

    @override
    def on_pre_activations(self, hidden_pre: torch.Tensor, step: Step) -> None:
        assert hidden_pre.shape == (N_TOKENS, D_SAE)
        self.calls.append("on_pre_activations")

    @override
    def scores(self, hidden_pre: torch.Tensor, cfg: MultiScaleTrainingSAEConfig) -> torch.Tensor:
        self.calls.append("scores")
        return hidden_pre + 100 * (torch.arange(D_SAE) == 5)

    @override
    def loss(self, step: Step) -> dict[str, torch.Tensor]:
        self.calls.append("loss")
        return {"probe_loss": 2 * step.sae.W_dec.sum()}

    @override
    def on_latents(self, latents: Latents, step: Step) -> None:
        self.calls.append("on_latents")
        self.latents = latents

    @override
    def metrics(self, cfg: MultiScaleTrainingSAEConfig, step: int) -> dict[str, Any]:
        return {"probe": step}


def step_of(sae: MultiScaleTrainingSAE, step: int) -> Any:
    output = sae.training_forward_pass(step_input(activations(N_TOKENS, D_IN, step), step))
    output.loss.backward()
    return output


def test_a_new_mechanism_needs_one_line_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    without = make(**plain(k=2)).train()
    monkeypatch.setitem(MECHANISMS, "probe", Probe)
    sae = make(**plain(k=2)).train()
    (probe,) = sae.mechanisms
    assert isinstance(probe, Probe)
    expected, output = step_of(without, 5), step_of(sae, 5)
    assert probe.calls == ["before_step", "on_pre_activations", "scores", "loss", "on_latents"]
    assert output.metrics["probe"] == 5
    assert probe.latents is not None
    # Latent 5 has the first claim on the budget wherever it is positive.
    positive = (expected.hidden_pre[:, 5] > 0).sum()
    assert (
        int(probe.latents.fired[5]) == int(positive) > int((expected.feature_acts[:, 5] > 0).sum())
    )
    torch.testing.assert_close(output.losses["probe_loss"], 2 * sae.W_dec.sum(), atol=0, rtol=0)
    total = sum(float(term) for term in output.losses.values())
    assert float(output.loss) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_buffers_of_version_0_1_load_under_their_new_names(coefficient: float) -> None:
    fields = plain(orthogonality_coefficient=coefficient, prefix_fractions=[0.3])
    sae, fresh = make(**fields).train(), make(**fields)
    for step in range(3):
        step_of(sae, step)
    state = dict(sae.state_dict())
    sae.process_state_dict_for_saving(state)
    expected = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    old = {"latent_group": "latent_ring", "candidate_threshold": "candidate_cut"}
    penalty = "mechanisms.orthogonality.input_variance"
    if coefficient:
        old[penalty] = "mechanisms.input_variance"
    else:  # it was there without the penalty too
        state["mechanisms.input_variance"] = torch.tensor(3.0)
    for new, name in old.items():
        for suffix in ("", "_bf16_remainder"):
            state[name + suffix] = state.pop(new + suffix)
    fresh.process_state_dict_for_loading(state)
    fresh.load_state_dict(state)
    for name, tensor in fresh.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0)


def test_a_checkpoint_with_the_means_of_the_removed_correlation_loads() -> None:
    fields = plain(orthogonality_coefficient=0.5, neighbour_count=3)
    sae, fresh = make(**fields).train(), make(**fields)
    step_of(sae, 0)
    state = dict(sae.state_dict())
    sae.process_state_dict_for_saving(state)
    for suffix, shape in (("", (13,)), ("_bf16_remainder", (2, 13))):
        state["mechanisms.neighbours.mean" + suffix] = torch.ones(shape)
    fresh.process_state_dict_for_loading(state)
    fresh.load_state_dict(state)
    for name, tensor in fresh.state_dict().items():
        torch.testing.assert_close(tensor, sae.state_dict()[name], atol=0, rtol=0)
