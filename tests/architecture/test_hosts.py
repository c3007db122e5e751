"""SAELens' own hosts run the architecture: synthetic data, a language model, the shell."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    SAETrainingRunner,
    TrainingSAE,
)
from sae_lens.config import LoggingConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.synthetic import (
    SyntheticModelConfig,
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
    train_toy_sae,
)
from sae_lens.synthetic.synthetic_model import SyntheticModel
from steps import activations, make

from msae_plugin import (
    MultiScaleSAE,
    MultiScaleTrainingSAE,
    MultiScaleTrainingSAEConfig,
    preset,
)
from msae_plugin.models.loading import LanguageModel

HOOK = "blocks.1.hook_resid_post"


def loads_and_works(folder: Path, d_in: int, d_sae: int) -> SAE[Any]:
    sae = SAE.load_from_disk(folder)
    assert isinstance(sae, MultiScaleSAE)
    with torch.no_grad():
        latents = sae.encode(activations(20, d_in, 0))
    assert latents.shape == (20, d_sae)
    assert torch.isfinite(latents).all()
    tolerance = 1e-5 if sae.dtype == torch.float32 else 1e-2
    norms = sae.W_dec.float().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(d_sae), rtol=0, atol=tolerance)
    return sae


# ---- synthetic data ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nested", "default", "source-plan"])
def test_synthetic_runner(name: str, tmp_path: Path) -> None:
    cfg = SyntheticSAERunnerConfig(
        synthetic_model=SyntheticModelConfig(num_features=40, hidden_dim=16, seed=0),
        sae=preset(name, d_in=16, d_sae=32, k=4, training_steps=30),
        training_samples=30 * 128,
        batch_size=128,
        lr=1e-3,
        n_checkpoints=1,
        checkpoint_path=str(tmp_path / "checkpoints"),
        output_path=str(tmp_path / "out"),
        eval_samples=500,
        logger=LoggingConfig(log_to_wandb=False),
    )
    result = SyntheticSAERunner(cfg).run()
    assert isinstance(result.sae, MultiScaleTrainingSAE)
    assert int(result.sae.training_step) == 29
    assert result.final_eval is not None
    assert 0 <= result.final_eval.mcc <= 1
    loads_and_works(tmp_path / "out", 16, 32)
    assert list((tmp_path / "checkpoints").rglob("sae_weights.safetensors"))
    saved = json.loads((tmp_path / "out" / "runner_config.json").read_text())
    again = SyntheticSAERunnerConfig.from_dict(saved)
    assert isinstance(again.sae, MultiScaleTrainingSAEConfig)
    assert again.sae.sparsity_scales == cfg.sae.sparsity_scales


def test_toy_training_learns() -> None:
    torch.manual_seed(0)
    model = SyntheticModel(SyntheticModelConfig(num_features=30, hidden_dim=20, seed=0))
    sae = make(d_in=20, d_sae=30, k=4, prefix_sort_every=20)
    with torch.no_grad():
        hidden = model.feature_dict(model.activation_generator.sample(500))
        before = (sae.eval()(hidden) - hidden).pow(2).sum(-1).mean()
    train_toy_sae(
        sae,
        model.feature_dict,
        model.activation_generator,
        training_samples=150 * 256,
        batch_size=256,
        lr=5e-3,
    )
    with torch.no_grad():
        after = (sae.eval()(hidden) - hidden).pow(2).sum(-1).mean()
        variance = (hidden - hidden.mean(0)).pow(2).sum(-1).mean()
    assert after < 0.5 * variance
    assert after < 0.5 * before


# ---- a language model --------------------------------------------------------------------------


def language_model_config(
    sae: MultiScaleTrainingSAEConfig, model: LanguageModel, tmp_path: Path, **more: Any
) -> LanguageModelSAERunnerConfig[MultiScaleTrainingSAEConfig]:
    return LanguageModelSAERunnerConfig(
        sae=sae,
        model_name=model.model_name,
        hook_name=HOOK,
        dataset_path="unused",
        streaming=False,
        context_size=16,
        training_tokens=16 * 128,
        train_batch_size_tokens=128,
        store_batch_size_prompts=4,
        n_batches_in_buffer=8,
        lr=1e-3,
        n_checkpoints=0,
        checkpoint_path=str(tmp_path / "checkpoints"),
        output_path=str(tmp_path / "out"),
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=3,
        **more,
    )


@pytest.fixture
def dataset(tiny_texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": tiny_texts})


@pytest.mark.parametrize(
    ("runner", "fields_of_sae", "autocast"),
    [
        (LanguageModelSAETrainingRunner, {}, False),
        (SAETrainingRunner, {"normalize_activations": "expected_average_only_in"}, False),
        (LanguageModelSAETrainingRunner, {"normalize_activations": "covariance_whitening"}, False),
        (
            LanguageModelSAETrainingRunner,
            {"norm_scales": [0.5, 2.0], "l1_coefficient": 0.01, "l1_warm_up_steps": 5},
            True,
        ),
        (LanguageModelSAETrainingRunner, {"dtype": "bfloat16"}, False),
    ],
    ids=["plain", "SAETrainingRunner, scaled", "whitened", "normalised, autocast", "bf16"],
)
def test_language_model_runner(
    runner: Callable[..., Any],
    fields_of_sae: dict[str, Any],
    autocast: bool,
    tiny_language_model: LanguageModel,
    dataset: Dataset,
    tmp_path: Path,
) -> None:
    d_in = tiny_language_model.d_model
    sae_cfg = preset("nested", d_in=d_in, d_sae=100, k=5, training_steps=16, **fields_of_sae)
    cfg = language_model_config(sae_cfg, tiny_language_model, tmp_path, autocast=autocast)
    trained = runner(cfg, override_dataset=dataset, override_model=tiny_language_model.model).run()
    assert isinstance(trained, MultiScaleTrainingSAE)
    assert int(trained.training_step) == 15
    sae = loads_and_works(tmp_path / "out", d_in, 100)
    assert sae.cfg.metadata.hook_name == HOOK
    assert sae.cfg.normalize_activations == "none"
    assert sae.cfg.metadata.training_architecture == "multiscale"
    assert (tmp_path / "out" / "sparsity.safetensors").exists()


def test_a_run_resumes_from_saelens_checkpoint(
    tiny_language_model: LanguageModel, dataset: Dataset, tmp_path: Path
) -> None:
    d_in = tiny_language_model.d_model
    sae_cfg = preset("nested", d_in=d_in, d_sae=100, k=5, training_steps=16)
    cfg = language_model_config(sae_cfg, tiny_language_model, tmp_path, save_final_checkpoint=True)
    model = tiny_language_model.model
    LanguageModelSAETrainingRunner(cfg, dataset, model).run()
    (folder,) = (tmp_path / "checkpoints").rglob("final_*")
    checkpoint = TrainingSAE.load_from_disk(folder)
    assert isinstance(checkpoint, MultiScaleTrainingSAE)
    longer = language_model_config(
        preset("nested", d_in=d_in, d_sae=100, k=5, training_steps=16),
        tiny_language_model,
        tmp_path,
        resume_from_checkpoint=str(folder),
    )
    longer.training_tokens = 20 * 128
    resumed = LanguageModelSAETrainingRunner(longer, dataset, model).run()
    assert int(resumed.training_step) == 19
    drift = (resumed.W_dec - checkpoint.W_dec).norm() / checkpoint.W_dec.norm()
    assert 0 < drift < 0.2


def test_many_saes_in_one_pass(
    tiny_language_model: LanguageModel, dataset: Dataset, tmp_path: Path
) -> None:
    d_in = tiny_language_model.d_model
    size = {"d_in": d_in, "d_sae": 64, "k": 5}
    runner = MultiSAETrainingRunner(
        MultiSAETrainingRunnerConfig(
            saes={
                "ours": preset("nested", **size, training_steps=8),
                "theirs": BatchTopKTrainingSAEConfig(**size),
                "other_layer": preset("source-plan", **size, training_steps=8),
            },
            hook_names={"ours": HOOK, "theirs": HOOK, "other_layer": "blocks.0.hook_resid_post"},
            model_name=tiny_language_model.model_name,
            dataset_path="unused",
            streaming=False,
            context_size=16,
            training_tokens=8 * 128,
            train_batch_size_tokens=128,
            store_batch_size_prompts=4,
            n_batches_in_buffer=8,
            checkpoint_path=str(tmp_path / "checkpoints"),
            output_path=str(tmp_path / "out"),
            logger=LoggingConfig(log_to_wandb=False),
        ),
        override_dataset=dataset,
        override_model=tiny_language_model.model,
    )
    saes = runner.run()
    assert {name: type(sae).__name__ for name, sae in saes.items()} == {
        "ours": "MultiScaleTrainingSAE",
        "theirs": "BatchTopKTrainingSAE",
        "other_layer": "MultiScaleTrainingSAE",
    }
    for name in ("ours", "other_layer"):
        loads_and_works(tmp_path / "out" / name, d_in, 64)


# ---- the shell and the import ------------------------------------------------------------------

SHELL = """
import contextlib, io, json, sys
import msae_plugin
assert not [m for m in sys.modules if m.split(".")[0] in ("sae_bench", "sae_probes")]
from sae_lens.llm_sae_training_runner import _parse_cfg_args

arguments = ["--architecture", "multiscale", "--d_in", "8", "--d_sae", "48", "-k", "4",
             "--sparsity_scales", "2.0", "4.0", "--norm_scales", "1.0", "--selection", "batchtopk",
             "--detach_inner_prefixes", "True", "--training_tokens", "99"]
cfg = _parse_cfg_args(arguments)
printed = io.StringIO()
with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
    _parse_cfg_args(["--architecture", "multiscale", "--help"])
msae_plugin.register()
print(json.dumps({
    "type": type(cfg.sae).__name__,
    "sae": {k: v for k, v in vars(cfg.sae).items() if k != "metadata"},
    "tokens": cfg.training_tokens,
    "help": printed.getvalue(),
}))
"""


@pytest.fixture(scope="module")
def shell() -> dict[str, Any]:
    """A fresh interpreter: the command line as SAELens builds it, and what importing loads."""
    found = subprocess.run(
        [sys.executable, "-c", SHELL],
        capture_output=True,
        text=True,
        check=False,
        env={**__import__("os").environ, "COLUMNS": "400"},
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_saelens_command_line_builds_the_config(shell: dict[str, Any]) -> None:
    assert shell["type"] == "MultiScaleTrainingSAEConfig"
    assert shell["tokens"] == 99
    sae = shell["sae"]
    assert (sae["d_in"], sae["d_sae"], sae["k"]) == (8, 48, 4.0)
    assert (sae["sparsity_scales"], sae["norm_scales"]) == ([2.0, 4.0], [1.0])
    assert sae["detach_inner_prefixes"] is True


def described_fields() -> dict[str, str]:
    """First words of each field's entry in the `Args:` block of the training config."""
    # CPython 3.13 strips the indentation of docstrings, earlier ones keep it.
    text = inspect.cleandoc(MultiScaleTrainingSAEConfig.__doc__ or "")
    block = text.split("Args:\n", 1)[1]
    found: dict[str, str] = {}
    for line in block.splitlines():
        if line.startswith(" " * 4) and not line.startswith(" " * 5) and "): " in line:
            name, description = line.strip().split(" (", 1)[0], line.split("): ", 1)[1]
            found[name] = description
        elif line.startswith(" " * 4) and not line.startswith(" " * 5) and line.endswith("):"):
            found[line.strip().split(" (", 1)[0]] = ""
    return found


def test_every_field_is_documented() -> None:
    described = described_fields()
    names = {f.name for f in fields(MultiScaleTrainingSAEConfig)}
    assert names <= set(described)
    assert set(described) <= names


def test_help_shows_our_descriptions(shell: dict[str, Any]) -> None:
    text = " ".join(shell["help"].split())
    described = described_fields()
    # Inherited fields are described where SAELens declares them.
    own = list(MultiScaleTrainingSAEConfig.__annotations__)
    assert len(own) > 40
    for name in own:
        assert name in text, name
        assert described[name].strip() in text, name
