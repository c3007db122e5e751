import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
from transformer_lens.loading_from_pretrained import get_pretrained_model_config
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)

from msae_plugin.common.errors import InputError
from msae_plugin.models import transformer_lens
from msae_plugin.models.forward_pass import activations_at
from msae_plugin.models.loading import (
    LanguageModel,
    ModelShape,
    describe_model,
    hook_widths,
    load_language_model,
    read_config,
)
from msae_plugin.models.transformer_lens import own_config
from msae_plugin.reporting.latents import unembedding

# The tiny model of tests/conftest.py.
TINY_LAYERS, TINY_D_MODEL, TINY_VOCABULARY = 3, 64, 512

HOOK = "blocks.1.hook_resid_post"
MODULE = "model.layers.1"
BRIDGE = "TransformerBridge"
LOADERS = (BRIDGE, "HookedTransformer")


def logits(language_model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return language_model.model(tokens)


def activations(language_model: LanguageModel, tokens: torch.Tensor, hook: str) -> torch.Tensor:
    with torch.no_grad():
        return language_model.model.run_with_cache(tokens, names_filter=[hook])[1][hook]


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, TINY_VOCABULARY, (4, 50), generator=torch.Generator().manual_seed(1))


def test_hooked_transformer_has_the_logits_of_the_hugging_face_model(
    tiny_language_model: LanguageModel, tiny_model_dir: Path, tokens: torch.Tensor
) -> None:
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_model_dir)(tokens).logits
    torch.testing.assert_close(logits(tiny_language_model, tokens), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.5


def test_both_loaders_give_the_same_activations_and_tokens(
    tiny_language_model: LanguageModel,
    tiny_model_dir: Path,
    tokens: torch.Tensor,
    tiny_texts: list[str],
) -> None:
    modules = load_language_model(str(tiny_model_dir), [MODULE])
    assert modules.model_class_name == "AutoModelForCausalLM"
    torch.testing.assert_close(
        activations(modules, tokens, MODULE),
        activations(tiny_language_model, tokens, HOOK),
        atol=1e-4,
        rtol=0,
    )
    as_the_store_asks = {"prepend_bos": False, "move_to_device": False, "truncate": False}
    ids = modules.model.to_tokens(tiny_texts[0], **as_the_store_asks)
    assert (
        ids.tolist()
        == tiny_language_model.model.to_tokens(tiny_texts[0], **as_the_store_asks).tolist()
    )
    assert modules.tokenizer.bos_token_id not in ids


def test_a_bridge_gives_the_activations_of_a_hooked_transformer(
    tiny_language_model: LanguageModel,
    tiny_model_dir: Path,
    tokens: torch.Tensor,
    tiny_texts: list[str],
) -> None:
    inside = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    hooks = [f"blocks.{layer}.hook_{name}" for layer in range(TINY_LAYERS) for name in inside]
    hooks += ["blocks.1.attn.hook_z", "blocks.1.attn.hook_k", "blocks.0.mlp.hook_post"]
    bridge = load_language_model(str(tiny_model_dir), hooks, loader=BRIDGE)
    expected = activations_at(tiny_language_model.model, tokens, hooks)
    for hook, values in activations_at(bridge.model, tokens, hooks).items():
        torch.testing.assert_close(values, expected[hook], atol=2e-5, rtol=0)
        assert values.std() > 0.05
    assert hook_widths(bridge, hooks) == hook_widths(tiny_language_model, hooks)
    # SAELens has no name for a bridge; what it can load gives the same.
    assert (bridge.loader, bridge.model_class_name) == (BRIDGE, "HookedTransformer")
    assert bridge.model_name == tiny_language_model.model_name
    assert bridge.shape == tiny_language_model.shape
    assert not bridge.model.training
    for prepend_bos in (True, False):
        ids = bridge.model.to_tokens(tiny_texts[0], prepend_bos=prepend_bos)
        assert ids.equal(
            tiny_language_model.model.to_tokens(tiny_texts[0], prepend_bos=prepend_bos)
        )


def test_a_bridge_to_gemma_has_its_gain_and_its_windows(
    tiny_model_dir: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    own = saved_gemma(tmp_path, tiny_model_dir)
    with torch.no_grad():
        own.model.norm.weight.normal_()
        expected = own(tokens).logits
    own.save_pretrained(tmp_path)
    bridge, hooked = (load_language_model(str(tmp_path), [HOOK], loader=name) for name in LOADERS)
    torch.testing.assert_close(logits(bridge, tokens), expected, atol=1e-4, rtol=1e-4)
    directions = [unembedding(each.model, 32) for each in (bridge, hooked)]
    torch.testing.assert_close(directions[0], directions[1])


def test_learned_positions_end_with_a_bridge_too(
    tiny_model_dir: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
    config = GPT2Config(**sizes, vocab_size=TINY_VOCABULARY, architectures=["GPT2LMHeadModel"])
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for file in tiny_model_dir.glob("tokenizer*"):
        shutil.copyfile(file, tmp_path / file.name)
    bridge, hooked = (load_language_model(str(tmp_path), [HOOK], loader=name) for name in LOADERS)
    assert bridge.shape.positions == hooked.shape.positions == 64
    found, expected = (activations(each, tokens, HOOK) for each in (bridge, hooked))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_a_version_without_hooked_transformer(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformer_lens.HookedTransformer", None)
    assert load_language_model(str(tiny_model_dir), [HOOK]).loader == BRIDGE
    with pytest.raises(InputError, match=r"has no HookedTransformer: set model\.loader: Transf"):
        load_language_model(str(tiny_model_dir), [HOOK], loader="HookedTransformer")


def test_facts_about_the_model(tiny_language_model: LanguageModel, tiny_model_dir: Path) -> None:
    assert tiny_language_model.model_class_name == "HookedTransformer"
    assert tiny_language_model.model_name == str(tiny_model_dir)
    assert tiny_language_model.d_model == TINY_D_MODEL
    assert tiny_language_model.n_layers == TINY_LAYERS
    assert not tiny_language_model.model.training
    assert describe_model(str(tiny_model_dir)) == ModelShape(
        TINY_D_MODEL, TINY_LAYERS, TINY_VOCABULARY
    )


@pytest.mark.parametrize("hook", [HOOK, MODULE])
def test_every_weight_has_the_requested_dtype(tiny_model_dir: Path, hook: str) -> None:
    loaded = load_language_model(str(tiny_model_dir), [hook], dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


def test_hook_widths_differ_inside_the_layer(tiny_model_dir: Path) -> None:
    hooks = [HOOK, "blocks.0.mlp.hook_post", "blocks.2.attn.hook_k"]
    loaded = load_language_model(str(tiny_model_dir), hooks)
    assert hook_widths(loaded, hooks) == {hooks[0]: 64, hooks[1]: 128, hooks[2]: 2 * 16}


def test_a_name_in_the_path_does_not_choose_the_architecture(
    tiny_model_dir: Path, tmp_path: Path, tokens: torch.Tensor, tiny_language_model: LanguageModel
) -> None:
    # TransformerLens takes the architecture from a name that contains `gemma` or `llama`.
    folder = tmp_path / "gemma-2-llama-7b"
    shutil.copytree(tiny_model_dir, folder)
    loaded = load_language_model(str(folder), [HOOK])
    torch.testing.assert_close(logits(loaded, tokens), logits(tiny_language_model, tokens))


def test_a_snapshot_of_the_hub_cache_is_recorded_by_its_hub_name(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "models--some-lab--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_model_dir, folder)
    assert load_language_model(str(folder), [HOOK]).model_name == "some-lab/tiny"


def test_a_model_in_the_hub_cache_needs_no_network(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some-lab--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_model_dir, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert load_language_model("some-lab/tiny", [HOOK]).model_name == "some-lab/tiny"
    # A download that was interrupted before the weights arrived.
    (snapshot / "model.safetensors").unlink()
    assert describe_model("some-lab/tiny").d_model == TINY_D_MODEL
    with pytest.raises(InputError, match="offline mode is on"):
        load_language_model("some-lab/tiny", [HOOK])


def saved_gemma(folder: Path, tokenizer: Path, **fields: Any) -> Gemma2ForCausalLM:
    """A tiny Gemma-2 whose attention and soft caps matter; a window is half a text of `tokens`."""
    config = Gemma2Config(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "intermediate_size": 64,
            "vocab_size": TINY_VOCABULARY,
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
            "max_position_embeddings": 128,
            "initializer_range": 0.3,
            "architectures": ["Gemma2ForCausalLM"],
            **fields,
        }
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    model.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return model


GEMMA_VARIANTS: dict[str, dict[str, Any]] = {
    "as is": {},
    "rope_theta": {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}},
    "sliding_window": {"sliding_window": 8},
    "layer_types": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "query_pre_attn_scalar": {"query_pre_attn_scalar": 2},
    "rms_norm_eps": {"rms_norm_eps": 1e-2},
    "soft caps": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.5},
    "no soft caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "head_dim": {"head_dim": 8},
}


@pytest.mark.promise(
    "No model is converted silently wrong: its configuration and its logits are compared "
    "with the original."
)
@pytest.mark.parametrize("fields", GEMMA_VARIANTS.values(), ids=GEMMA_VARIANTS.keys())
def test_gemma_is_converted_with_its_own_configuration(
    tiny_model_dir: Path, tmp_path: Path, tokens: torch.Tensor, fields: dict[str, Any]
) -> None:
    own = saved_gemma(tmp_path, tiny_model_dir, **fields)
    loaded = load_language_model(str(tmp_path), [HOOK])
    with torch.no_grad():
        expected = own(tokens, output_hidden_states=True)
    torch.testing.assert_close(logits(loaded, tokens), expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        activations(loaded, tokens, HOOK), expected.hidden_states[2], atol=1e-4, rtol=1e-4
    )
    if fields:  # the field is one that the text shows
        plain = saved_gemma(tmp_path / "plain", tiny_model_dir)
        if fields.keys() != {"head_dim"}:
            plain.load_state_dict(own.state_dict())
            with torch.no_grad():
                assert (plain(tokens).logits - expected.logits).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("model_class", "config_class", "fields"),
    [
        (GemmaForCausalLM, GemmaConfig, {"head_dim": 16}),
        (
            Gemma3ForCausalLM,
            Gemma3TextConfig,
            {
                "head_dim": 16,
                "sliding_window": 24,
                "query_pre_attn_scalar": 16,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                },
            },
        ),
        (OlmoForCausalLM, OlmoConfig, {"clip_qkv": 0.5}),
        (Olmo2ForCausalLM, Olmo2Config, {}),
    ],
    ids=["gemma", "gemma3", "olmo", "olmo2"],
)
def test_architectures_whose_sizes_transformer_lens_takes_from_names(
    tiny_model_dir: Path,
    tmp_path: Path,
    tokens: torch.Tensor,
    model_class: Any,
    config_class: Any,
    fields: dict[str, Any],
) -> None:
    config = config_class(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=TINY_VOCABULARY,
        max_position_embeddings=128,
        initializer_range=0.3,
        architectures=[model_class.__name__],
        **fields,
    )
    own = model_class(config).eval()
    own.save_pretrained(tmp_path)
    for file in tiny_model_dir.glob("tokenizer*"):
        shutil.copyfile(file, tmp_path / file.name)
    with torch.no_grad():
        expected = own(tokens).logits
    torch.testing.assert_close(
        logits(load_language_model(str(tmp_path), [HOOK]), tokens), expected, atol=1e-4, rtol=1e-4
    )


def test_gemma_works_with_both_kinds_of_hooks(tiny_model_dir: Path, tmp_path: Path) -> None:
    saved_gemma(tmp_path, tiny_model_dir)
    for hook in (HOOK, MODULE):
        assert hook_widths(load_language_model(str(tmp_path), [hook]), [hook]) == {hook: 32}


def test_listed_gemmas_have_the_configuration_that_transformer_lens_gives_them() -> None:
    listed = get_pretrained_model_config("google/gemma-2-2b").to_dict()
    config = Gemma2Config(architectures=["Gemma2ForCausalLM"])
    own = HookedTransformerConfig.from_dict(own_config(config) or {}).to_dict()
    # What from_pretrained sets itself, and where the vocabulary's size is only known later.
    for key in ("model_name", "tokenizer_name", "from_checkpoint", "init_weights", "device"):
        listed.pop(key, None)
        own.pop(key, None)
    assert {key: (own[key], listed[key]) for key in own if own[key] != listed[key]} == {}


@pytest.mark.promise(
    "No model is converted silently wrong: its configuration and its logits are compared "
    "with the original."
)
def test_a_conversion_with_another_configuration_is_named(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_gemma(tmp_path, tiny_model_dir)

    def with_another(**other: Any) -> None:
        fields = {**(own_config(read_config(tmp_path)) or {}), **other}
        monkeypatch.setattr(transformer_lens, "own_config", lambda _: fields)

    with_another(rotary_base=100.0)
    with pytest.raises(InputError, match=r"another one \(rope_theta is 100.0 in place of 10000"):
        load_language_model(str(tmp_path), [HOOK])
    with_another(act_fn="relu")  # no field of the comparison
    with pytest.raises(InputError, match=r"other logits \(relative error [0-9.e-]+\): msae"):
        load_language_model(str(tmp_path), [HOOK])
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="gives NaN or infinite logits"):
        load_language_model(str(tmp_path), [HOOK])
    # No short text shows it.
    with_another(window_size=20)
    with pytest.raises(InputError, match=r"another one \(sliding_window is 20 in place"):
        load_language_model(str(tmp_path), [HOOK])


def test_relative_paths_are_recorded_in_full(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model_dir.parent)
    assert load_language_model(tiny_model_dir.name, [MODULE]).model_name == str(tiny_model_dir)


@pytest.mark.promise(
    "No model is converted silently wrong: its configuration and its logits are compared "
    "with the original."
)
def test_wrong_conversion_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    # TransformerLens derives the head size from the width and ignores `head_dim`; a rotary scaling
    # that it does not know is dropped without a word, which gives a different model.
    folder = tmp_path / "scaled"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"another one \(rope_type is default.*model\.layers"):
        load_language_model(str(folder), [HOOK])
    assert load_language_model(str(folder), [MODULE]).n_layers == TINY_LAYERS


def test_unknown_architecture_suggests_module_hooks(tmp_path: Path) -> None:
    folder = tmp_path / "unknown"
    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11)
    config.architectures = ["SomethingElseForCausalLM"]
    config.save_pretrained(folder)
    (folder / "model.safetensors").touch()
    with pytest.raises(InputError, match=r"SomethingElseForCausalLM.*model\.layers"):
        load_language_model(str(folder), [HOOK])


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (["blocks.3.hook_resid_post"], "layers are numbered 0 to 2"),
        (["blocks.1.hook_resid_pots"], "did you mean blocks.1.hook_resid_post"),
        (["model.layers.1.mpl"], "did you mean model.layers.1.mlp"),
        ([HOOK, MODULE], "two styles"),
        ([], "no hook"),
    ],
)
def test_wrong_hooks_are_named(tiny_model_dir: Path, hooks: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_language_model(str(tiny_model_dir), hooks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float8"}, "float8"),
        ({"device": "gpu"}, "'gpu' is not known"),
        ({"loader": "HookedMamba"}, "HookedMamba"),
        ({"loader": "AutoModelForCausalLM"}, "needs the loader HookedTransformer or TransformerBr"),
    ],
)
def test_wrong_arguments_are_refused(
    tiny_model_dir: Path, arguments: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_language_model(str(tiny_model_dir), [HOOK], **arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("packaged:gpt5", "packaged:smollm2-135m"),
        ("/no/such/folder", "does not exist"),
        ("some-lab/some-model", "not in the local cache and offline mode is on"),
        ("gpt2-small", "'[a-z/-]*gpt2' is not in the local cache"),
        ("not a name!", "nor a valid hub name"),
        ("gelu-2l", "only TransformerLens reads"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_quick_line(name: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as error:
        load_language_model(name, [HOOK])
    assert time.monotonic() - started < 5
    assert "\n" not in str(error.value)


def test_damaged_folders_are_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    with pytest.raises(InputError, match=r"has no config\.json"):
        describe_model(str(folder))
    (folder / "config.json").write_text("{broken")
    with pytest.raises(InputError, match="cannot be used"):
        describe_model(str(folder))
    shutil.copyfile(tiny_model_dir / "config.json", folder / "config.json")
    with pytest.raises(InputError, match="not all weights"):
        load_language_model(str(folder), [HOOK])
    weights = (tiny_model_dir / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="tokenizer"):
        load_language_model(str(folder), [HOOK])
    for file in tiny_model_dir.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_language_model(str(folder), [HOOK])


COUNT_PAGES = """
import resource, torch
from msae_plugin.models.loading import keep_freed_memory

keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    before = faults()
    tensors = [torch.ones(2 << 20) for _ in range(10)]  # 8 MiB each
    del tensors
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.parametrize(
    ("variables", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)]
)
def test_freed_memory_is_kept_for_the_next_pass(variables: dict[str, str], kept: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC", "GLIBC"))}
    done = subprocess.run(
        [sys.executable, "-c", COUNT_PAGES],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    pages = 10 * (8 << 20) // os.sysconf("SC_PAGESIZE")
    # The first rounds find room for all ten; the last one's lie there, or on pages of their own.
    assert (int(done.stdout) < pages / 4) is kept
