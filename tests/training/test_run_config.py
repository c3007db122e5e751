import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from msae_plugin.architecture.presets import PRESETS
from msae_plugin.common.errors import InputError
from msae_plugin.models.loading import ModelShape
from msae_plugin.training import inputs
from msae_plugin.training.plans import default_device
from msae_plugin.training.recipe import RunConfig
from msae_plugin.training.runner import MultiScaleRunner

SHAPE = ModelShape(d_model=64, n_layers=3, vocabulary=512)


def config_of(recipe: dict[str, Any], *overrides: str) -> RunConfig:
    return RunConfig.from_dict(copy.deepcopy(recipe), overrides)


def refused(recipe: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        config_of(recipe, *overrides).validate(SHAPE)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_file_is_read_with_overrides(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    config = RunConfig.load(
        path,
        [
            "training.lr=5e-4",
            "sae.d_sae=32",
            "training.gradient_lr.enabled=true",
            "logging.wandb.project=x",
        ],
    )
    assert config.training.lr == 5e-4
    assert config.sae is not None
    assert config.sae["d_sae"] == 32
    assert config.training.gradient_lr.enabled is True
    assert config.logging.wandb is not None
    assert config.logging.wandb.project == "x"
    assert config.data.context_size == 32


def test_a_context_longer_than_the_models_positions_is_refused(recipe: dict[str, Any]) -> None:
    shape = ModelShape(d_model=64, n_layers=3, vocabulary=512, positions=31)
    with pytest.raises(InputError, match=r"'data.context_size' is 32 but the model has 31"):
        config_of(recipe).validate(shape)
    config_of(recipe, "data.context_size=31").validate(shape)


def test_to_dict_reads_back_as_the_same_recipe(recipe: dict[str, Any]) -> None:
    config = config_of(recipe, "logging.wandb.project=x")
    assert RunConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        # PyYAML reads all of these as text or float: a person means numbers.
        ("training.lr=3e-4", "training.lr", 3e-4),
        ("training.tokens=2e6", "training.tokens", 2_000_000),
        ("training.tokens=1_000_000", "training.tokens", 1_000_000),
        ("training.weight_decay=0", "training.weight_decay", 0.0),
        ("training.clip_grad_norm=null", "training.clip_grad_norm", None),
        ("data.exclude_special_tokens=[1, 2]", "data.exclude_special_tokens", [1, 2]),
        ("data.exclude_special_tokens=false", "data.exclude_special_tokens", False),
        ("model.autocast=auto", "model.autocast", "auto"),
        ("model.autocast=true", "model.autocast", True),
        ("logging.tensorboard=on", "logging.tensorboard", "on"),
        ("logging.tensorboard=off", "logging.tensorboard", "off"),
    ],
)
def test_values_as_people_write_them(
    recipe: dict[str, Any], override: str, path: str, value: Any
) -> None:
    found: Any = config_of(recipe, override)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.learning_rate=1", r"unknown key 'learning_rate' in 'training'"),
        ("training.batch_size_token=1", r"did you mean 'batch_size_tokens'\?"),
        ("trainin.lr=1", r"unknown key 'trainin'.*did you mean 'training'\?"),
        ("sae.d_saes=8", r"unknown key 'd_saes' in 'sae': did you mean 'd_sae'\?"),
        ("training.lr=fast", r"'training\.lr' must be a number, not 'fast'"),
        ("training.tokens=1.5", r"'training\.tokens' must be a whole number, not 1\.5"),
        ("model.autocast=bf16", r"'model\.autocast' must be true or false or "),
        ("training.autocast=1", r"'training\.autocast' must be true or false, not 1"),
        ("training.lr_scheduler=linear", r"must be one of constant, cosineannealing"),
        ("hooks=blocks.1.hook_resid_post", r"'hooks' must be a list"),
        ("training=5", r"'training' must be a mapping"),
        ("training.lr", r"not of the form key\.path=value"),
        ("training.lr.x=5", r"'training\.lr' has no keys"),
        ("model.device=gpu", r"'model\.device' must be one of auto, cpu, cuda, mps, not 'gpu'"),
        ("training.tokens=100", r"training\.tokens = 100 is less than one step of 128"),
        ("training.n_batches_in_buffer=2", r"holds .* = 64 tokens.*n_batches_in_buffer to 4 or"),
        ("training.lr=-1", r"'training\.lr' must be a positive number"),
        ("training.lr=1e300", r"'training\.lr' must be at most 3\.4e\+38"),
        ("training.lr=.nan", r"'training\.lr' must be a positive number"),
        ("training.seed=-1", r"'training\.seed' must be 0 or more"),
        ("training.seed=99999999999999999999", r"'training\.seed' must be at most 92233"),
        (f"training.seed={10**99}", r"at most 9223372036854775807, not 1\.000e\+99$"),
        ("sae.d_sae=-1.0e+99", r"'sae\.d_sae' must be at least 1, not -1\.000e\+99$"),
        ("training.store_batch_size_prompts=1e13", r"TiB .* lower training\.store_batch_size"),
        ("training.n_batches_in_buffer=1e13", r"sequences of 32 .* lower training\.n_batches_in"),
        ("training.dead_feature_window=1e30", r"_window' must be at most .*, not '1e30'"),
        ("training.activations_mixing_fraction=1.5", r"must be in \[0, 1\]"),
        ("training.clip_grad_norm=0", r"null is off"),
        ("training.gradient_lr.factor=2", r"gradient_lr\.factor' must be in \(0, 1\]"),
        ("training.lr_floor=1", r"lr_floor = 1\.0 is above training\.lr"),
        ("training.lr_decay_steps=30", r"leave nothing of the run's 30 steps"),
        ("data.context_size=1", r"'data\.context_size' must be at least 2"),
        ("hooks=[blocks.3.hook_resid_post]", r"layer 3.*numbered 0 to 2"),
        ("hooks=[]", r"no hook"),
        ("hooks=[model.layers.1, blocks.1.hook_resid_post]", r"two styles"),
        ("sae.architecture=batchtopkk", r"'batchtopkk' is unknown: did you mean 'batchtopk'\?"),
        ("sae.d_in=32", r"'sae\.d_in' is 32 but hook .* has width 64"),
        ("sae.d_sae=0", r"'sae\.d_sae' must be at least 1"),
        ("sae.d_sae=null", r"'sae\.d_sae' must be a whole number"),
        ("sae.device=cuda", r"model\.device decides it"),
        ("sae.dtype=float16", r"'sae\.dtype' must be .*bfloat16.* not 'float16'"),
        ("sae.dtype=banana", r"'sae\.dtype' must be .* not 'banana'"),
        ("sae.reshape_activations=hook_z", r"always joined.*turn_on_forward_pass"),
        ("sae.preset=default", r"'standard' has no presets"),
        ("sae.lr=0", r"'sae\.lr' must be a positive number"),
        ("sae.l1_coefficient=much", r"'sae\.l1_coefficient' must be a number"),
        ("sae.normalize_activations=strange", r"must be one of none"),
        ("saes.a.d_sae=8", r"exactly one of 'sae'"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    recipe: dict[str, Any], override: str, expected: str
) -> None:
    assert re.search(expected, refused(recipe, override))


def test_an_sae_of_a_recipe_can_be_left_out(recipe: dict[str, Any]) -> None:
    del recipe["sae"]
    recipe["saes"] = {"ours": {"d_sae": 96, "k": 6}, "theirs": {"d_sae": 96, "k": 6}}
    (plan,) = config_of(recipe, "saes.theirs=null").validate(SHAPE)
    assert plan.base_name == "ours"
    assert "no such SAE" in refused(recipe, "saes.their=null")
    assert "'saes' is empty" in refused(recipe, "saes.theirs=null", "saes.ours=null")


def test_k_above_d_sae_is_refused(recipe: dict[str, Any]) -> None:
    recipe["sae"] = {"architecture": "topk", "d_sae": 8, "k": 9}
    assert "only 8 latents" in refused(recipe)


def test_multiscale_needs_k_and_a_known_preset(recipe: dict[str, Any]) -> None:
    recipe["sae"] = {"d_sae": 96}
    assert "'sae.k' is missing" in refused(recipe)
    recipe["sae"] = {"d_sae": 96, "k": 8, "preset": "defualt"}
    assert "did you mean 'default'" in refused(recipe)


def test_multiscale_is_the_default_and_its_preset_gets_the_steps(recipe: dict[str, Any]) -> None:
    recipe["sae"] = {"d_sae": 96, "k": 8, "aux_loss_coefficient": "5e-1"}
    [default] = config_of(recipe).validate(SHAPE)
    assert default.config.architecture() == "multiscale"
    recipe["sae"]["preset"] = "nested"
    [plan] = config_of(recipe).validate(SHAPE)
    config: Any = plan.config
    # This preset anneals k over 40 % of the run's 30 steps.
    assert config.k_anneal_steps == 12
    assert config.aux_loss_coefficient == 0.5
    assert config.d_in == 64


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_makes_a_run_with_its_own_training(recipe: dict[str, Any], name: str) -> None:
    recipe["sae"] = {"preset": name, "d_sae": 96, "k": 8}
    config = config_of(recipe)
    [plan] = config.validate(SHAPE)
    wanted = PRESETS[name].training
    assert config.training.accumulation_steps == wanted.get("accumulation_steps", 1)
    assert plan.lr_floor == wanted.get("lr_floor")
    enabled = plan.gradient_lr is not None and plan.gradient_lr.enabled
    assert enabled == wanted.get("gradient_lr", {}).get("enabled", False)


def test_presets_that_accumulate_differently_do_not_share_a_run(recipe: dict[str, Any]) -> None:
    del recipe["sae"]
    recipe["saes"] = {
        "nine": {"preset": "source-run-9", "d_sae": 96, "k": 8},
        "ten": {"preset": "source-run-10", "d_sae": 96, "k": 8},
    }
    assert "accumulates 4 mini-batches per step but the run 1" in refused(recipe)
    plans = config_of(recipe, "saes.ten.preset=source-run-8").validate(SHAPE)
    assert [plan.name for plan in plans] == ["nine", "ten"]


def test_names_and_folders(recipe: dict[str, Any], tmp_path: Path) -> None:
    def folders(*overrides: str) -> dict[str, Path]:
        return {
            plan.name: plan.folder(tmp_path)
            for plan in config_of(recipe, *overrides).validate(SHAPE)
        }

    assert folders() == {"sae": tmp_path}
    assert folders("hooks=[blocks.0.hook_resid_post, blocks.2.hook_resid_post]") == {
        "sae_layer0": tmp_path / "sae_layer0",
        "sae_layer2": tmp_path / "sae_layer2",
    }
    # Two hooks of one layer are told apart by their whole name.
    assert set(folders("hooks=[blocks.1.hook_resid_pre, blocks.1.hook_resid_post]")) == {
        "sae_blocks_1_hook_resid_pre",
        "sae_blocks_1_hook_resid_post",
    }
    section = recipe.pop("sae")
    recipe["saes"] = {"a": section, "b": dict(section)}
    assert folders() == {"a": tmp_path / "a", "b": tmp_path / "b"}


@pytest.mark.parametrize("name", ["checkpoints", "../up", "a/b", ".hidden", "CON", "nul.x", "x."])
def test_names_that_cannot_be_folders_are_refused(recipe: dict[str, Any], name: str) -> None:
    recipe["saes"] = {name: recipe.pop("sae")}
    assert "cannot name a folder" in refused(recipe)


def test_a_warm_up_longer_than_the_run_is_said_not_refused(
    recipe: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config_of(recipe, "training.lr_warm_up_steps=60").validate(SHAPE)
    assert "the learning rate ends at 50 %" in caplog.text


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml' does not exist; "):
        RunConfig.load(tmp_path / "absent.yaml")


def test_refusals_come_before_any_model_or_text_is_loaded(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(inputs, "load_language_model", never)
    monkeypatch.setattr(inputs, "load_text", never)
    for override in ("sae.d_in=32", "hooks=[blocks.9.hook_resid_post]", "training.tokens=1"):
        with pytest.raises(InputError):
            MultiScaleRunner(config_of(recipe, override), tmp_path / "out")
    # An architecture that refuses in its constructor does so before the model is loaded as well.
    recipe["sae"] = {"architecture": "matryoshka_batchtopk", "d_sae": 8, "k": 2}
    with pytest.raises(InputError, match="matryoshka_widths must not be empty"):
        MultiScaleRunner(config_of(recipe), tmp_path / "out").run()
    assert not (tmp_path / "out").exists()


def test_a_wrong_text_is_refused_before_a_model_is_loaded(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(inputs, "load_language_model", never)
    config = config_of(recipe, f"data.source={tmp_path / 'missing.jsonl'}")
    with pytest.raises(InputError, match="does not exist"):
        MultiScaleRunner(config, tmp_path / "out").run()


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps"])
def test_a_device_that_is_not_there_is_refused(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda:3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=rf"'model\.device' is {device} but torch finds"):
        default_device(device)
    assert default_device("cpu") == "cpu"
    assert default_device("auto") == ("cuda" if device == "cuda:3" else "cpu")
