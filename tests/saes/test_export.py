from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file, save_file

import msae_plugin
from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.saes import export
from msae_plugin.saes.export import export_sae

D_IN, D_SAE, K = 12, 48, 4
SIZES = {"d_in": D_IN, "d_sae": D_SAE}


def activations(n: int = 256, seed: int = 3) -> torch.Tensor:
    """Sparse sums of fixed directions, token norms varying, away from zero mean."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(30, D_IN, generator=generator), dim=1)
    mean = torch.randn(D_IN, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    share = torch.linspace(0.3, 0.02, 30)
    on = torch.rand(n, 30, generator=generator) < share
    sizes = 1 + torch.rand(n, 30, generator=generator)
    return 5 * mean + (on * sizes) @ directions


def trained(cfg: Any, steps: int = 30) -> TrainingSAE[Any]:
    torch.manual_seed(0)
    cfg = copy.deepcopy(cfg)  # `sae.to(dtype)` changes it, and the metadata are its own
    sae = TrainingSAE.get_sae_class_for_architecture(cfg.architecture())(cfg)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for step in range(steps):
        output = sae.training_forward_pass(
            TrainStepInput(
                sae_in=activations(128, seed=10 + step),
                coefficients={name: 0.1 for name in sae.get_coefficients()},
                dead_neuron_mask=None,
                n_training_steps=step,
                is_logging_step=False,
            )
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    sae.cfg.metadata.training_steps = steps
    return sae


SAELENS_CONFIGS = [
    StandardTrainingSAEConfig(**SIZES),
    GatedTrainingSAEConfig(**SIZES),
    JumpReLUTrainingSAEConfig(**SIZES, jumprelu_init_threshold=0.1),
    TopKTrainingSAEConfig(**SIZES, k=K),
    BatchTopKTrainingSAEConfig(**SIZES, k=K, topk_threshold_lr=0.2),
    MatryoshkaBatchTopKTrainingSAEConfig(
        **SIZES, k=K, topk_threshold_lr=0.2, matryoshka_widths=[8, 16, D_SAE]
    ),
]


def multiscale(name: str = "nested", **overrides: Any) -> Any:
    return msae_plugin.preset(name, **SIZES, k=K, training_steps=30, **overrides)


MULTISCALE_CONFIGS = {
    "nested": {"prefix_sort_every": 5},
    "default": {},
    "without decoder norms": {"rescale_acts_by_decoder_norm": False},
    "folded scales": {"norm_scales": [0.5, 1.0]},
    "attention": {"norm_scales": [0.5, 2.0], "norm_eps": 0.1, "norm_eps_mode": "relative",
                  "norm_attention": True},
    "z-scores": {"selection": "zscore", "zscore_z_lr": 0.1, "sparsity_scales": [],
                 "firing_floor": 0.0, "dense_share_limit": 1.0},
}  # fmt: skip


@pytest.mark.promise("An export computes what was trained, or it is not written.")
@pytest.mark.parametrize("cfg", SAELENS_CONFIGS, ids=lambda cfg: cfg.architecture())
def test_saelens_architectures_export_what_was_trained(cfg, tmp_path):
    sae = trained(cfg)
    report = export_sae(sae, tmp_path, activations(), None, {})
    assert report.agreement.failure() is None
    assert report.agreement.max_latent_difference < 1e-5
    assert report.agreement.active > 0
    assert not report.has_jumprelu
    assert cfg.architecture() in str(report.jumprelu_obstacle)
    assert not (tmp_path / "jumprelu").exists()


@pytest.mark.promise("An export computes what was trained, or it is not written.")
@pytest.mark.parametrize("name", MULTISCALE_CONFIGS)
def test_multiscale_exports_what_was_trained(name, tmp_path):
    preset = name if name in ("nested", "default") else "nested"
    sae = trained(multiscale(preset, **MULTISCALE_CONFIGS[name]))
    sparsity = torch.arange(D_SAE).float()
    report = export_sae(sae, tmp_path, activations(), sparsity, {})
    loaded = SAE.load_from_disk(tmp_path / "sae")
    assert type(loaded) is msae_plugin.MultiScaleSAE
    # By hand, without the module under test: latents and reconstruction in the exported order.
    sae.eval()
    x, order = activations(), sae.export_order()
    with torch.no_grad():
        latents = sae.encode(x)
        if not sae.cfg.rescale_acts_by_decoder_norm:
            latents = latents * sae.W_dec.norm(dim=1)
        torch.testing.assert_close(loaded.encode(x), latents[:, order])
        torch.testing.assert_close(loaded.decode(loaded.encode(x)), sae.decode(sae.encode(x)))
    stored = load_file(tmp_path / "sae" / "sparsity.safetensors")["sparsity"]
    assert torch.equal(stored, sparsity[order])
    assert report.has_jumprelu == (tmp_path / "jumprelu").exists()
    assert report.has_jumprelu == ("norm_scales" not in MULTISCALE_CONFIGS[name])
    if report.has_jumprelu:
        jumprelu = SAE.load_from_disk(tmp_path / "jumprelu")
        assert jumprelu.cfg.architecture() == "jumprelu"
        with torch.no_grad():
            torch.testing.assert_close(jumprelu.encode(x), loaded.encode(x))


def test_sorting_really_moves_latents(tmp_path):
    sae = trained(multiscale(prefix_sort_every=5))
    assert not torch.equal(sae.export_order(), torch.arange(D_SAE))


def test_the_report_is_stored_with_measured_numbers(tmp_path):
    sae = trained(SAELENS_CONFIGS[4])
    report = export_sae(sae, tmp_path, activations(), None, {})
    stored = json.loads((tmp_path / "export.json").read_text())
    assert stored == json.loads(json.dumps(report.to_dict()))
    loaded = SAE.load_from_disk(tmp_path / "sae")
    with torch.no_grad():
        l0 = (loaded.encode(activations()) > 0).sum(1).double().mean().item()
    assert stored["l0_exported"] == pytest.approx(l0)
    assert stored["l0_target"] == K
    assert stored["n_tokens"] == 256


def test_training_mode_is_given_back(tmp_path):
    sae = trained(SAELENS_CONFIGS[0])
    sae.train()
    export_sae(sae, tmp_path, activations(), None, {})
    assert sae.training


def test_a_threshold_that_lags_is_reported(tmp_path):
    cfg = BatchTopKTrainingSAEConfig(**SIZES, k=K, topk_threshold_lr=0.001)
    report = export_sae(trained(cfg), tmp_path, activations(), None, {})
    assert report.l0_exported > 2 * K
    assert "threshold" in report.warnings[0]


def break_saved_weights(monkeypatch, change) -> None:
    original = TrainingSAE.save_inference_model

    def broken(self: TrainingSAE[Any], path: Path):
        paths = original(self, path)
        weights = load_file(paths[0])
        change(weights)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, paths[0])
        return paths

    monkeypatch.setattr(TrainingSAE, "save_inference_model", broken)


CHANGES = {
    "threshold": (lambda w: w["threshold"].mul_(1.2), "on in only one"),
    "encoder": (lambda w: w["W_enc"].mul_(1.001), "latents differ"),
    "decoder": (lambda w: w["W_dec"].mul_(1.001), "reconstructions differ"),
    "order": (lambda w: w["W_dec"].copy_(w["W_dec"].flip(0)), "reconstructions differ"),
}


@pytest.mark.promise("An export computes what was trained, or it is not written.")
@pytest.mark.parametrize("change", CHANGES)
def test_an_export_that_computes_something_else_is_refused_and_not_written(
    change, tmp_path, monkeypatch
):
    sae = trained(SAELENS_CONFIGS[4])
    break_saved_weights(monkeypatch, CHANGES[change][0])
    with pytest.raises(RunFailure, match=CHANGES[change][1]) as error:
        export_sae(sae, tmp_path / "run", activations(2048), None, {})
    assert "\n" not in str(error.value)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_latent_on_its_threshold_may_flip(tmp_path, monkeypatch):
    sae = trained(SAELENS_CONFIGS[4])
    x = activations()
    sae.eval()
    with torch.no_grad():
        pre = sae.encode_with_hidden_pre(x)[1]
        exactly = pre[pre > sae.topk_threshold].min()
        sae.topk_threshold = exactly.double() * (1 - 1e-7)
    break_saved_weights(monkeypatch, lambda w: w["threshold"].mul_(1 + 3e-7))
    report = export_sae(sae, tmp_path, x, None, {})
    assert report.agreement.flips == 1
    assert report.agreement.max_latent_difference < 1e-5


def test_untrained_diverged_and_silent_saes_are_refused(tmp_path):
    sae = trained(SAELENS_CONFIGS[0])
    sae.cfg.metadata.training_steps = 0
    with pytest.raises(RunFailure, match="0 training steps"):
        export_sae(sae, tmp_path, activations(), None, {})
    sae = trained(SAELENS_CONFIGS[0])
    with torch.no_grad():
        sae.b_enc[3] = torch.nan
    with pytest.raises(RunFailure, match="b_enc holds NaN"):
        export_sae(sae, tmp_path, activations(), None, {})
    sae = trained(SAELENS_CONFIGS[0])
    with torch.no_grad():
        sae.b_enc.fill_(-1e4)
    with pytest.raises(RunFailure, match="silent"):
        export_sae(sae, tmp_path, activations(), None, {})
    assert list(tmp_path.iterdir()) == []


def test_a_finished_export_is_never_overwritten_and_a_broken_one_is_replaced(tmp_path):
    sae = trained(SAELENS_CONFIGS[0])
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "half.safetensors").write_text("killed here")
    export_sae(sae, tmp_path, activations(), None, {})
    assert not (tmp_path / "sae" / "half.safetensors").exists()
    with pytest.raises(InputError, match="choose another folder"):
        export_sae(sae, tmp_path, activations(), None, {})


def test_activations_of_another_width_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"\(256, 13\)"):
        export_sae(trained(SAELENS_CONFIGS[0]), tmp_path, torch.zeros(256, 13), None, {})


def test_bf16_saes_are_compared_at_their_own_precision(tmp_path):
    sae = trained(SAELENS_CONFIGS[4]).to(torch.bfloat16)
    report = export_sae(sae, tmp_path, activations(), None, {})
    assert report.agreement.tolerance > 1e-3


def test_the_run_configuration_is_stored_without_private_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/jane-doe")
    monkeypatch.setattr("getpass.getuser", lambda: "jane-doe")
    config = {
        "model": {"name": "/home/jane-doe/models/tiny-llama"},
        "data": {"source": "https://example.org/a.jsonl", "files": [Path("/mnt/x/reviews.txt")]},
        "training": {"lr": 3e-4, "seed": 1},
        "output_path": "/home/jane-doe/runs/1",
        "logging": {"wandb": {"entity": "janes-team", "project": "msae"}},
        "note": "copied from /home/jane-doe/old and /srv/jane-doe/new",
        "windows": "C:\\Users\\jane-doe\\text.csv",
        "hook": "blocks.9.hook_resid_post",
    }
    export_sae(trained(SAELENS_CONFIGS[0]), tmp_path, activations(), None, config)
    text = (tmp_path / "sae" / "runner_cfg.json").read_text()
    stored = json.loads(text)
    assert stored["model"] == {"name": "tiny-llama"}
    assert stored["data"] == {"source": "https://example.org/a.jsonl", "files": ["reviews.txt"]}
    assert stored["training"] == config["training"]
    assert stored["hook"] == config["hook"]
    assert stored["windows"] == "text.csv"
    assert stored["output_path"] is None
    for private in ("jane-doe", "janes-team", "/mnt"):
        assert private not in text


def test_the_files_are_those_of_saelens(tmp_path):
    export_sae(trained(SAELENS_CONFIGS[0]), tmp_path, activations(), torch.zeros(D_SAE), {"a": 1})
    assert sorted(path.name for path in (tmp_path / export.SAE_FOLDER).iterdir()) == [
        "cfg.json",
        "runner_cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
    ]
