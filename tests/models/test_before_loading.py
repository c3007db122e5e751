"""What the config of a model says before its weights are read."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from transformers import CTRLConfig, GPT2Config

from msae_plugin.common.errors import InputError
from msae_plugin.models.loading import require_convertible
from msae_plugin.models.transformer_lens import require_supported
from msae_plugin.saes.load import check_evaluable

WARNING = "can be trained, msae eval cannot measure them"


@pytest.fixture
def unknown(tiny_model_dir: Path, tmp_path: Path) -> str:
    """A model whose structure TransformerLens does not know."""
    folder = tmp_path / "unknown"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["SomethingElseForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_gpt2_without_n_ctx_is_converted(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=16, vocab_size=11)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    assert "n_ctx" not in json.loads((tmp_path / "config.json").read_text())
    require_convertible(str(tmp_path))
    require_supported(tmp_path, config, "msae-plugin/unnamed")


def test_an_architecture_without_a_bridge_is_refused(tmp_path: Path) -> None:
    config = CTRLConfig(n_layer=2, n_embd=8, n_head=2, dff=8, n_positions=16, vocab_size=11)
    config.architectures = ["CTRLLMHeadModel"]
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no bridge .*CTRLLMHeadModel\): use module hooks"):
        require_convertible(str(tmp_path), "TransformerBridge")


def test_hooks_that_need_the_conversion_are_refused(unknown: str) -> None:
    with pytest.raises(InputError, match=r"SomethingElseForCausalLM.*msae eval cannot measure"):
        check_evaluable(unknown, ["blocks.1.hook_resid_post"])


@pytest.mark.parametrize(
    ("known", "hook", "says"),
    [
        (False, "model.layers.1", "SomethingElseForCausalLM"),
        (True, "hook_embed", "'hook_embed' names none"),
        (True, "model.norm", "'model.norm' is none"),
        (True, "model.layers.1", None),
        (True, "blocks.1.hook_resid_post", None),
    ],
)
def test_what_can_be_trained_and_not_evaluated_is_said(
    known: bool,
    hook: str,
    says: str | None,
    tiny_model_dir: Path,
    unknown: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        check_evaluable(str(tiny_model_dir) if known else unknown, [hook])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (says is not None)
    assert all(WARNING in line and str(says) in line for line in said)
