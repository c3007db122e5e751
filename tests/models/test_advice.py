"""What cannot work is said before a model is loaded, and no advice leads in a circle."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, GPT2Config

from msae_plugin.common.errors import InputError
from msae_plugin.data.text import load_text
from msae_plugin.models.hook_names import parse_hook_name
from msae_plugin.models.loading import load_language_model, require_convertible
from msae_plugin.models.transformer_lens import UNNAMED_MODEL, require_supported

HOOK = "blocks.1.hook_resid_post"


@pytest.mark.parametrize("hook", ["attn.hook_pattern", "attn.hook_attn_scores", "attn.hook_result"])
def test_a_hook_without_a_width_is_refused_by_its_name(hook: str) -> None:
    with pytest.raises(InputError, match="gives no activations of the shape"):
        parse_hook_name(f"blocks.1.{hook}")


def test_another_configuration_is_named_from_the_config_alone(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((tiny_model_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.25}))
    require_supported(tmp_path, AutoConfig.from_pretrained(tmp_path), UNNAMED_MODEL)

    # A conversion that takes its configuration from elsewhere.
    def other(*_: object) -> str:
        return "eps is 1 in place of 2"

    monkeypatch.setattr("msae_plugin.models.transformer_lens.difference", other)
    with pytest.raises(InputError, match=r"eps is 1 in place of 2.*msae eval cannot measure"):
        require_convertible(str(tmp_path))


@pytest.mark.parametrize("damage", ["activation_function", "attn_pdrop", "architectures"])
def test_a_damaged_config_is_named(tmp_path: Path, damage: str) -> None:
    values = GPT2Config(architectures=["GPT2LMHeadModel"]).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**values, damage: []}))
    with pytest.raises(InputError, match=r"config.json cannot be used|cannot convert"):
        require_convertible(str(tmp_path))


def test_a_tokenizer_that_is_larger_than_the_model_is_refused_before_the_weights(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    highest = max(tokenizer.get_vocab().values())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    load_language_model(str(folder), [HOOK])
    tokenizer.add_tokens(["antidisestablishmentarianism"])
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=rf"ids up to {highest + 2} and the model knows 0 to"):
        load_language_model(str(folder), [HOOK])


def test_chats_are_not_to_be_read_from_the_column_of_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    row = {"conversation_id": "c-17", "messages": [{"role": "user", "content": "hello"}]}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError) as refused:
        load_text(str(path), heldout_documents=0)
    assert "'messages' holds a list of messages (role, content): write their text" in str(
        refused.value
    )
    assert "conversation_id" not in str(refused.value)
    path.write_text(json.dumps({**row, "summary": "a short text"}) + "\n")
    with pytest.raises(InputError, match="set text_column to one of summary, or write their text"):
        load_text(str(path), heldout_documents=0)
