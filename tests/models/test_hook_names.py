import pytest
from sae_lens.util import extract_layer_from_tlens_hook_name

from msae_plugin.common.errors import InputError
from msae_plugin.models.hook_names import HookName, common_style, parse_hook_name, validate_hook


@pytest.mark.parametrize(
    ("hook", "layer", "style"),
    [
        ("blocks.9.hook_resid_post", 9, "transformer_lens"),
        ("blocks.0.attn.hook_z", 0, "transformer_lens"),
        ("blocks.12.ln1.hook_normalized", 12, "transformer_lens"),
        ("hook_embed", None, "transformer_lens"),
        ("ln_final.hook_normalized", None, "transformer_lens"),
        ("model.layers.9", 9, "module"),
        ("transformer.h.11.mlp", 11, "module"),
        ("model.language_model.layers.30", 30, "module"),
        ("model.embed_tokens", None, "module"),
    ],
)
def test_layer_and_style(hook: str, layer: int | None, style: str) -> None:
    assert parse_hook_name(hook) == HookName(layer, style)
    # SAELens stops the model after the layer that its own reading finds.
    assert extract_layer_from_tlens_hook_name(hook) == layer


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("", "not a dotted name"),
        ("layer 9", "not a dotted name"),
        ("blocks..hook_resid_post", "not a dotted name"),
        ("blocks.9", r"write blocks\.9\.hook_resid_post"),
    ],
)
def test_what_cannot_be_a_hook(hook: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_hook_name(hook)


def test_the_layer_must_exist() -> None:
    assert validate_hook("blocks.29.hook_resid_post", 30).layer == 29
    assert validate_hook("hook_embed", 30).layer is None
    for hook in ("blocks.30.hook_resid_post", "model.layers.30"):
        with pytest.raises(InputError, match=r"layer 30, but .* numbered 0 to 29"):
            validate_hook(hook, 30)


def test_one_style_per_run() -> None:
    assert common_style(["blocks.1.hook_resid_post", "hook_embed"]) == "transformer_lens"
    assert common_style(["model.layers.1", "model.layers.2"]) == "module"
    with pytest.raises(InputError, match=r"'blocks\.1\.hook_z' and 'model\.layers\.1'"):
        common_style(["model.layers.1", "blocks.1.hook_z"])
    with pytest.raises(InputError, match="listed twice"):
        common_style(["model.layers.1", "model.layers.1"])
    with pytest.raises(InputError, match="no hook"):
        common_style([])
