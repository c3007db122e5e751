"""TransformerLens' configuration of a model, built from the model's own and compared with it.

TransformerLens takes the sizes of some architectures (Gemma, OLMo) from the model's name: it has
none for a fine-tune, a resized or a tiny one, and those of the listed model for one that differs
in its rotary base, window or soft caps alone. Here these are read from config.json. The layout of
the fields is that of `transformer_lens.loading_from_pretrained.convert_hf_model_config`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
from transformers import PretrainedConfig

# TransformerLens' own limit for Gemma 3: its tables of rotations have a row per position.
_MAX_POSITIONS = 8192
_SLIDING, _FULL = "sliding_attention", "full_attention"
_EPS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")


def own_config(config: PretrainedConfig) -> dict[str, Any] | None:
    """The configuration of a model whose sizes TransformerLens would take from its name.

    Returns:
        Fields of HookedTransformerConfig; None where TransformerLens reads the model's own config.
    """
    architecture = architecture_of(config)
    text: Any = config.get_text_config()
    if architecture in ("OlmoForCausalLM", "Olmo2ForCausalLM"):
        return {
            **_common(text, architecture),
            "act_fn": text.hidden_act,
            "eps": 1e-5 if architecture == "OlmoForCausalLM" else text.rms_norm_eps,
            "normalization_type": "LN" if architecture == "OlmoForCausalLM" else "RMS",
            "attn_types": ["global"] * text.num_hidden_layers,
            "clip_qkv": getattr(text, "clip_qkv", None),
        }
    if not architecture.startswith(("GemmaFor", "Gemma2For", "Gemma3For")):
        return None
    fields = {
        **_common(text, architecture),
        # Read first where it is set: `hidden_act` is a legacy value of the first Gemma.
        "act_fn": getattr(text, "hidden_activation", None) or text.hidden_act,
        "eps": text.rms_norm_eps,
        "normalization_type": "RMS",
        "use_attn_scale": True,
        "final_rms": True,
    }
    if architecture.startswith("GemmaFor"):
        return {**fields, "rotary_dim": text.head_dim}
    fields |= {
        "attn_scale": math.sqrt(text.query_pre_attn_scalar),
        "attn_scores_soft_cap": text.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": text.final_logit_softcapping or -1.0,
        "use_normalization_before_and_after": True,
        "use_qk_norm": architecture.startswith("Gemma3For"),
        "window_size": text.sliding_window,
        "use_local_attn": bool(text.sliding_window),
        "attn_types": [
            "local" if kind == _SLIDING and text.sliding_window else "global"
            for kind in text.layer_types
        ],
    }
    local = _rope(text, _SLIDING)
    if architecture.startswith("Gemma3For") and local:
        fields["rotary_base_local"] = local["rope_theta"]
    if _rope(text, _FULL).get("rope_type") == "linear":
        fields["rotary_scaling_factor"] = _rope(text, _FULL)["factor"]
    return fields


def architecture_of(config: PretrainedConfig) -> str:
    """The class that a config names, empty where it names none."""
    return next(iter(config.architectures or []), "")


def _common(text: Any, architecture: str) -> dict[str, Any]:
    heads = text.num_attention_heads
    return {
        "original_architecture": architecture,
        "quantization_method": None,
        "d_model": text.hidden_size,
        "d_head": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "n_heads": heads,
        "n_key_value_heads": text.num_key_value_heads
        if architecture.startswith("Gemma") or text.num_key_value_heads != heads
        else None,
        "d_mlp": text.intermediate_size,
        "n_layers": text.num_hidden_layers,
        "n_ctx": min(text.max_position_embeddings, _MAX_POSITIONS),
        "d_vocab": text.vocab_size,
        "initializer_range": text.initializer_range,
        "positional_embedding_type": "rotary",
        "rotary_base": _rope(text, _FULL).get("rope_theta", 10_000.0),
        "gated_mlp": True,
    }


def _rope(text: Any, kind: str) -> Mapping[str, Any]:
    """The rotary parameters of one kind of layer; they may be the same for all."""
    parameters = cast("Mapping[str, Any]", getattr(text, "rope_parameters", None) or {})
    return parameters.get(kind, {}) if _FULL in parameters else parameters


def window_of(config: PretrainedConfig) -> int | None:
    """How far back the layers with a sliding window see; None where there is none."""
    text: Any = config.get_text_config()
    kinds: list[str] = getattr(text, "layer_types", None) or [_SLIDING]
    if getattr(text, "use_sliding_window", True) is False or _SLIDING not in kinds:
        return None
    return getattr(text, "sliding_window", None)


def difference(config: PretrainedConfig, converted: HookedTransformerConfig) -> str | None:
    """The first field in which a converted model's configuration is not the model's own.

    What works at all positions shows in the logits of a short text, too; a window or a scaling of
    the rotations that begins at a later position shows here alone.

    Returns:
        The field and both values; None where all agree.
    """
    text: Any = config.get_text_config()
    own: dict[str, tuple[Any, Any]] = {}
    for name in _EPS:
        if hasattr(text, name):
            own[name] = (getattr(text, name), converted.eps)
    if converted.positional_embedding_type == "rotary":
        rope = _rope(text, _FULL)
        own["rope_theta"] = (rope.get("rope_theta"), converted.rotary_base)
        own["rope_type"] = (rope.get("rope_type"), _rope_type(converted))
    window = window_of(config)
    own["sliding_window"] = (
        window if window is not None and window < converted.n_ctx else 0,
        converted.window_size
        if converted.use_local_attn and (converted.window_size or 0) < converted.n_ctx
        else 0,
    )
    if not hasattr(text, "sliding_window"):
        del own["sliding_window"]
    scalar = getattr(text, "query_pre_attn_scalar", None)
    if scalar is not None:
        own["query_pre_attn_scalar"] = (scalar, converted.attn_scale**2)
    for name, value in (
        ("attn_logit_softcapping", converted.attn_scores_soft_cap),
        ("final_logit_softcapping", converted.output_logits_soft_cap),
    ):
        if hasattr(text, name):
            own[name] = (getattr(text, name) or 0, max(value or 0, 0))
    for name, (wanted, got) in own.items():
        if wanted is not None and not _equal(wanted, got):
            return f"{name} is {got} in place of {wanted}"
    return None


def _equal(wanted: Any, got: Any) -> bool:
    if isinstance(wanted, str) or got is None:
        return wanted == got
    return math.isclose(wanted, got, rel_tol=1e-5)


def _rope_type(converted: HookedTransformerConfig) -> str:
    if getattr(converted, "use_yarn_rope", False):
        return "yarn"
    if converted.use_NTK_by_parts_rope:
        return "llama3"
    return "linear" if (converted.rotary_scaling_factor or 1.0) != 1.0 else "default"
