"""bf16, autocast and thresholds: what must keep its precision keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from steps import EVERYTHING, activations, make, plain, step_input, train

from msae_plugin import MultiScaleSAE, MultiScaleTrainingSAE

# Not representable in bf16, nor as one bf16 number and one remainder.
AWKWARD = torch.tensor([0.1, 3.0156251, 1e-3, 1234.5678, 1 / 3, 7.0, 0.0])


def exported(tmp_path: Path, **fields: Any) -> MultiScaleSAE:
    sae = make(**plain(d_sae=7, **fields))
    train(sae, 3)
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, MultiScaleSAE)
    with torch.no_grad():
        loaded.threshold.copy_(AWKWARD)
    return loaded


def assert_exact(sae: SAE[Any]) -> None:
    assert isinstance(sae, MultiScaleSAE)
    assert sae.threshold.dtype == torch.float32
    assert torch.equal(sae.threshold.detach(), AWKWARD)
    assert sae.W_enc.dtype == torch.bfloat16
    assert sae.dtype == torch.bfloat16


@pytest.mark.parametrize("n_saved", range(4))
def test_threshold_survives_saving_and_loading_as_bf16(n_saved: int, tmp_path: Path) -> None:
    sae: SAE[Any] = exported(tmp_path / "exported")
    for n in range(n_saved):
        sae.save_model(tmp_path / str(n))
        sae = SAE.load_from_disk(tmp_path / str(n), dtype="bfloat16")
    assert_exact(sae if n_saved else sae.to(torch.bfloat16))
    assert_exact(sae.to(device="cpu", dtype=torch.bfloat16))
    sae.save_model(tmp_path / "as it is")
    assert_exact(SAE.load_from_disk(tmp_path / "as it is"))
    assert "threshold" in [name for name, _ in sae.named_parameters()]


@pytest.mark.parametrize("load_as", [None, "float32", "bfloat16", "float64"])
@pytest.mark.parametrize("trained_as", ["float32", "bfloat16"])
def test_exported_threshold_is_that_of_the_trained_sae(
    tmp_path: Path, trained_as: str, load_as: str | None
) -> None:
    sae = make(**plain(d_sae=7, dtype=trained_as))
    train(sae, 5)
    sae.topk_threshold.fill_(0.1)
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path, dtype=load_as)
    assert loaded.threshold.dtype == (torch.float64 if load_as == "float64" else torch.float32)
    assert (loaded.threshold.float() == torch.tensor(0.1)).all()


def test_bf16_latents_use_the_exact_threshold(tmp_path: Path) -> None:
    sae = exported(tmp_path).to(torch.bfloat16)
    x = activations(50, 6, 1).bfloat16()
    with torch.no_grad():
        pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        expected = torch.where(pre.float() > AWKWARD, pre.relu(), 0.0)
        assert torch.equal(sae.encode(x), expected.to(sae.encode(x).dtype))


def train_state(**fields: Any) -> MultiScaleTrainingSAE:
    sae = make(d_in=8, d_sae=24, k=3, **{**EVERYTHING, **fields})
    train(sae, 9, l1=0.1)
    sae.training_step.fill_(12_345)
    assert sae.mechanisms.revivals is not None
    sae.mechanisms.revivals.tokens_fired[0] = 16_777_217  # beyond float32's integers
    sae.mechanisms.revivals.tokens_fired[1] = 1025  # beyond bf16's
    return sae


def exact_state(sae: MultiScaleTrainingSAE) -> dict[str, torch.Tensor]:
    buffers = {name for name, _ in sae.named_buffers()}
    return {n: t for n, t in sae.state_dict().items() if n in buffers}


@pytest.mark.parametrize("weighting", ["coactivation", "none"])
def test_cast_keeps_every_buffer(weighting: str) -> None:
    sae = train_state(orthogonality_weighting=weighting)
    before = {n: t.clone() for n, t in exact_state(sae).items()}
    sae.to(torch.bfloat16)
    assert {n: t.dtype for n, t in exact_state(sae).items()} == {
        n: t.dtype for n, t in before.items()
    }
    for name, tensor in exact_state(sae).items():
        assert torch.equal(tensor, before[name]), name
    assert sae.W_dec.dtype == torch.bfloat16
    assert not any(t.dtype == torch.float64 for t in before.values())


@pytest.mark.parametrize("how", ["load_from_disk", "load_weights_from_checkpoint"])
@pytest.mark.parametrize("saved_as", ["float32", "bfloat16"])
def test_training_checkpoints_keep_every_buffer(tmp_path: Path, how: str, saved_as: str) -> None:
    sae = train_state(dtype=saved_as)
    sae.save_model(tmp_path)
    if how == "load_from_disk":
        loaded = TrainingSAE.load_from_disk(tmp_path, dtype="bfloat16")
    else:
        loaded = make(d_in=8, d_sae=24, k=3, **{**EVERYTHING, "dtype": "bfloat16"})
        loaded.load_weights_from_checkpoint(tmp_path)
    assert isinstance(loaded, MultiScaleTrainingSAE)
    for name, tensor in exact_state(sae).items():
        got = exact_state(loaded)[name]
        assert got.dtype == tensor.dtype, name
        if name.endswith("tokens_fired"):
            # 25 bits fit into float32 plus nothing: the count is right to one part in 2^24.
            torch.testing.assert_close(got.double(), tensor.double(), rtol=2**-24, atol=0)
        else:
            assert torch.equal(got, tensor), name


def test_a_bf16_step_is_close_to_a_float32_step() -> None:
    fields = {**EVERYTHING, "standardise": 0.0, "revival_every": 0}
    reference = make(d_in=8, d_sae=24, k=3, **fields)
    low = make(d_in=8, d_sae=24, k=3, **{**fields, "dtype": "bfloat16"})
    low.load_state_dict(reference.state_dict())
    dead = torch.zeros(24, dtype=torch.bool)
    dead[:5] = True
    outputs = [
        sae.training_forward_pass(step_input(activations(64, 8, 0), 0, dead, 0.1))
        for sae in (reference.train(), low.train())
    ]
    assert set(outputs[0].losses) == set(outputs[1].losses)
    for name, loss in outputs[0].losses.items():
        assert float(outputs[1].losses[name]) == pytest.approx(float(loss), rel=0.05), name
    outputs[1].loss.backward()
    for name, parameter in low.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.bfloat16
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_autocast_step_is_close_to_a_float32_step(dtype: str) -> None:
    fields = {**EVERYTHING, "standardise": 0.0, "revival_every": 0}
    reference = make(d_in=8, d_sae=24, k=3, **fields)
    auto = make(d_in=8, d_sae=24, k=3, **{**fields, "dtype": dtype})
    auto.load_state_dict(reference.state_dict())
    dead = torch.zeros(24, dtype=torch.bool)
    dead[:5] = True
    given = step_input(activations(64, 8, 0), 0, dead, 0.1)
    expected = reference.train().training_forward_pass(given)
    auto.train()
    with torch.autocast("cpu", torch.bfloat16):
        got = auto.training_forward_pass(given)
    for name, loss in expected.losses.items():
        assert float(got.losses[name]) == pytest.approx(float(loss), rel=0.05), name
    got.loss.backward()
    expected.loss.backward()
    for name, parameter in auto.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    for name in ("W_enc", "W_dec"):
        ours, theirs = auto.get_parameter(name).grad, reference.get_parameter(name).grad
        assert ours is not None
        assert theirs is not None
        cosine = torch.nn.functional.cosine_similarity(
            ours.float().flatten(), theirs.flatten(), dim=0
        )
        assert cosine > 0.95, name
    for name, tensor in exact_state(auto).items():
        assert tensor.dtype == exact_state(reference)[name].dtype, name


@pytest.mark.parametrize("mode", ["bf16", "autocast"])
def test_training_in_low_precision_reaches_the_same_error(mode: str) -> None:
    def final_error(dtype: str, autocast: bool) -> float:
        sae = make(**plain(sparsity_scales=[2.0], prefix_fractions=[0.3], dtype=dtype))
        outputs = train(sae, 120, lr=5e-3, autocast=autocast)
        return sum(float(o.losses["mse_loss"]) for o in outputs[-20:]) / 20

    exact = final_error("float32", autocast=False)
    dtype = "bfloat16" if mode == "bf16" else "float32"
    assert final_error(dtype, autocast=mode == "autocast") == pytest.approx(exact, rel=0.1)


def test_eval_under_autocast_is_per_token() -> None:
    sae = make(d_in=8, d_sae=24, k=3, **EVERYTHING)
    train(sae, 5, l1=0.1)
    sae.eval()
    x = activations(12, 8, 7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        together = sae.encode(x)
        alone = torch.cat([sae.encode(token[None]) for token in x])
    torch.testing.assert_close(together.float(), alone.float(), rtol=2e-2, atol=2e-2)
