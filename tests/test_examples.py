"""The shipped recipes: every key is there, typed, with its true default beside it."""

import dataclasses
import re
from typing import Any

import pytest
import yaml

from msae_plugin.common.recipes import SHIPPED, shipped_recipes
from msae_plugin.models.loading import ModelShape
from msae_plugin.training import recipe
from msae_plugin.training.recipe import RunConfig

SHAPES = {
    "packaged:smollm2-135m": ModelShape(d_model=576, n_layers=30, vocabulary=49152),
    "packaged:gemma-3-270m": ModelShape(d_model=640, n_layers=18, vocabulary=262144),
    "google/gemma-2-2b": ModelShape(d_model=2304, n_layers=26, vocabulary=256000),
    "EleutherAI/pythia-160m-deduped": ModelShape(d_model=768, n_layers=12, vocabulary=50304),
}
TRAINING_RECIPES = ["gemma-2-2b", "gemma-2-2b-source", "gemma-3-270m", "pythia-160m", "smollm2"]
# Sections whose keys depend on the architecture.
FREE_SECTIONS = ("sae", "saes", "hooks", "logging.trackio", "logging.wandb")


def keys_with_comments(text: str) -> dict[str, tuple[str, str]]:
    """Dotted path of every leaf -> (value as written, comment on its line)."""
    found: dict[str, tuple[str, str]] = {}
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = re.match(r"( *)(\w+):(.*)$", line)
        if match is None:
            continue
        indent, key, rest = len(match[1]), match[2], match[3]
        stack = [item for item in stack if item[0] < indent] + [(indent, key)]
        value, _, comment = rest.partition("#")
        found[".".join(name for _, name in stack)] = (value.strip(), comment.strip())
    return found


def defaults(config: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{prefix}{field.name}"
        if path in FREE_SECTIONS:
            continue
        flat.update(
            defaults(value, f"{path}.") if dataclasses.is_dataclass(value) else {path: value}
        )
    return flat


def test_there_is_no_unknown_recipe() -> None:
    assert list(shipped_recipes("train")) == TRAINING_RECIPES


@pytest.mark.parametrize("name", TRAINING_RECIPES)
def test_the_recipe_is_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.load(name)
    monkeypatch.setattr(recipe, "describe_model", SHAPES.__getitem__)
    assert RunConfig.from_dict(config.to_dict()) == config
    plans = config.validate()
    assert len(plans) == 2 * len(config.hooks)
    assert plans[0].config.d_in == SHAPES[config.model.name].d_model


@pytest.mark.parametrize("name", TRAINING_RECIPES)
def test_every_key_is_shown_with_its_type_and_its_true_default(name: str) -> None:
    written = keys_with_comments((SHIPPED / f"{name}.yaml").read_text())
    for path, default in defaults(RunConfig()).items():
        assert path in written, f"{path} is not shown"
        comment = written[path][1]
        stated = re.search(r"default (\S+)", comment)
        assert stated is not None, f"{path}: no default in {comment!r}"
        value = yaml.safe_load(stated[1].rstrip(".,:;"))
        value = float(value) if isinstance(default, float) else value
        assert value == default, f"{path}: {comment!r}"
        assert re.match(r"(text|whole number|number|true|float32|constant|auto|\"auto\")", comment)


@pytest.mark.parametrize("name", TRAINING_RECIPES)
def test_every_key_of_an_sae_is_explained(name: str) -> None:
    written = keys_with_comments((SHIPPED / f"{name}.yaml").read_text())
    leaves = {path: item for path, item in written.items() if path.startswith("saes.") and item[0]}
    assert len(leaves) >= 6
    for path, (_, comment) in leaves.items():
        assert "default" in comment, path


def test_the_source_recipe_has_the_numbers_of_the_source() -> None:
    config = RunConfig.load("gemma-2-2b-source")
    assert config.hooks == [f"blocks.{layer}.hook_resid_post" for layer in (5, 12, 19)]
    training = config.training
    assert (training.tokens, training.batch_size_tokens) == (1_000_000, 2048)
    assert (training.lr, training.lr_warm_up_steps) == (3e-4, 1000)
    assert (training.store_batch_size_prompts, config.data.context_size) == (24, 128)
    assert config.saes is not None
    assert {sae["d_sae"] for sae in config.saes.values()} == {2304}
    assert config.saes["standard"]["l1_coefficient"] == 0.04


def test_the_gemma_2_recipe_has_the_numbers_of_saebench() -> None:
    """arXiv 2503.09532: width 2^14, 500M tokens, decay over the last fifth."""
    config = RunConfig.load("gemma-2-2b")
    assert config.hooks == ["blocks.12.hook_resid_post"]
    assert config.model.dtype == "bfloat16"
    training = config.training
    assert (training.tokens, training.batch_size_tokens) == (500_000_000, 2048)
    assert (training.lr, training.lr_warm_up_steps) == (3e-4, 1000)
    assert training.lr_decay_steps == training.tokens // training.batch_size_tokens // 5
    assert config.saes is not None
    assert {sae["d_sae"] for sae in config.saes.values()} == {2**14}
    assert {sae["k"] for sae in config.saes.values()} == {80}


def test_the_gemma_3_recipe_has_the_layers_of_the_source() -> None:
    config = RunConfig.load("gemma-3-270m")
    assert config.hooks == [f"blocks.{layer}.hook_resid_post" for layer in (5, 9, 12)]
    training = config.training
    steps = training.tokens // training.batch_size_tokens
    assert (training.lr_warm_up_steps, training.lr_decay_steps) == (steps // 20, steps // 5)
