"""TransformerLens' hook points on a loaded Hugging Face model, whatever TransformerLens calls it.

Two classes have them. A TransformerBridge runs the Hugging Face model itself. A HookedTransformer,
which transformer-lens 4 no longer has, is a conversion of it; all that needs version 3 is imported
here, where it is used.

For a conversion TransformerLens loads by name: it wants a name of its own list, takes the shape of
some models (Gemma, Llama 2) from the name and reads the config of all others from the hub, even
when the loaded model is handed to it. Here it is given the loaded model and tokenizer, a name that
it accepts, and a private look-alike of the hub's cache that holds this folder's config.json alone:
no network, and the user's own cache stays untouched. What comes out, of either class, is compared
with the model that went in: by its logits, a conversion by its configuration, too.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from msae_plugin.common.errors import InputError, first_line
from msae_plugin.upstream import (
    known_transformer_lens_names,
    transformer_lens_config_given,
    transformer_lens_name_registered,
)

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

logger = logging.getLogger(__name__)

HOOKED_TRANSFORMER = "HookedTransformer"
BRIDGE = "TransformerBridge"
"""The loaders for TransformerLens' hooks, by the names of its classes."""

TransformerLensLoader = Literal["auto", "HookedTransformer", "TransformerBridge"]
"""`model.loader` of a recipe."""


def transformer_lens_loader(asked: str) -> str:
    """The class that `auto` stands for: HookedTransformer where the installed version has it."""
    there = importlib.util.find_spec("transformer_lens.HookedTransformer") is not None
    if asked == "auto":
        return HOOKED_TRANSFORMER if there else BRIDGE
    if asked == HOOKED_TRANSFORMER and not there:
        raise InputError(
            f"transformer-lens {version('transformer-lens')} has no {HOOKED_TRANSFORMER}",
            f'set model.loader: {BRIDGE}, or pip install "transformer-lens<4"',
        )
    return asked


# TransformerLens' own limit for Gemma 3: its tables of rotations have a row per position.
_MAX_POSITIONS = 8192
_SLIDING, _FULL = "sliding_attention", "full_attention"
_EPS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")


def own_config(config: PretrainedConfig) -> dict[str, Any] | None:
    """The configuration of a model whose sizes TransformerLens would take from its name.

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
    """
    text: Any = config.get_text_config()
    own: dict[str, tuple[Any, Any]] = {
        name: (getattr(text, name), converted.eps) for name in _EPS if hasattr(text, name)
    }
    if converted.positional_embedding_type == "rotary":
        rope = _rope(text, _FULL)
        linear = (converted.rotary_scaling_factor or 1.0) != 1.0
        rope_type = (
            "yarn" if getattr(converted, "use_yarn_rope", False)
            else "llama3" if converted.use_NTK_by_parts_rope
            else "linear" if linear else "default"
        )  # fmt: skip
        own["rope_theta"] = (rope.get("rope_theta"), converted.rotary_base)
        own["rope_type"] = (rope.get("rope_type"), rope_type)
    if hasattr(text, "sliding_window"):
        windows = (
            window_of(config), converted.window_size if converted.use_local_attn else None
        )  # fmt: skip
        # One as long as the longest text is none.
        limits = [w if w is not None and w < converted.n_ctx else 0 for w in windows]
        own["sliding_window"] = (limits[0], limits[1])
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
        same = wanted == got
        if not isinstance(wanted, str) and wanted is not None and got is not None:
            same = math.isclose(wanted, got, rel_tol=1e-5)
        if wanted is not None and not same:
            return f"{name} is {got} in place of {wanted}"
    return None


UNNAMED_MODEL = "local-folder/model"
"""Stands for a model that TransformerLens has no name for.

A neutral text on purpose: TransformerLens takes anything with `llama` or `gemma` in its name, a
path included, for that architecture. The config then decides alone.
"""

# Compared are at least so many positions, more where a window is longer, as far as the model's size
# allows: 2 * parameters * tokens operations, some ten seconds on a CPU.
_LOGIT_CHECK_TOKENS = 64
_LOGIT_CHECK_OPERATIONS = 1e12
# Relative errors measured between the two implementations: 1e-6 in float32, 1e-2 in bfloat16 on a
# random model. A wrong rotary base or head size gives more than 0.2.
_LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-1}


_NOT_CONVERTED = (
    "msae train takes module hooks such as model.layers.9 of any model, but msae eval cannot "
    "measure their SAEs: SAEBench needs TransformerLens"
)


def transformer_lens_name(hub_name: str | None) -> str:
    """The name under which TransformerLens converts a model.

    `UNNAMED_MODEL` where it lists none.
    """
    return hub_name if hub_name in known_transformer_lens_names() else UNNAMED_MODEL


def require_supported(
    folder: Path, config: PretrainedConfig, name: str, loader: str = HOOKED_TRANSFORMER
) -> None:
    """Refuse what the loader cannot take, or converts to another configuration.

    Before weights are read.
    """
    if loader == BRIDGE:
        try:
            determine_architecture_from_hf_config(config)
        except ValueError as error:
            raise InputError(
                f"TransformerLens has no bridge to the model in {folder} "
                f"({architecture_of(config) or config.model_type})",
                "use module hooks such as model.layers.1",
            ) from error
        return
    # transformer-lens 4 has no such module.
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config

    with _config_by_name(folder, config, name) as lookup:
        try:
            converted = get_pretrained_model_config(name, **lookup)
            field = difference(config, converted)
        # TransformerLens raises NotImplementedError for an architecture that it does not list,
        # and stumbles in any way over configs that it half knows.
        except Exception as error:
            raise InputError(
                f"TransformerLens cannot convert the model in {folder} ({error})", _NOT_CONVERTED
            ) from error
    if field is not None:
        raise InputError(
            f"TransformerLens converts the model in {folder} to another one ({field})",
            _NOT_CONVERTED,
        )


def hooked_transformer(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    name: str,
    device: str,
) -> HookedTransformer:
    """Convert a loaded Hugging Face model, without weight processing, in its own dtype."""
    from transformer_lens import HookedTransformer  # absent from transformer-lens 4

    printed = io.StringIO()
    with (
        _config_by_name(folder, hf_model.config, name) as lookup,
        # TransformerLens prints a line on standard output, which belongs to the command's result,
        # and warns that HookedTransformer goes away in version 4.
        redirect_stdout(printed),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            model = HookedTransformer.from_pretrained_no_processing(
                name,
                hf_model=hf_model,
                tokenizer=tokenizer,
                device=device,
                dtype=hf_model.dtype,
                **lookup,
            )
        # Unexpected weights make any line of a conversion fail.
        except Exception as error:
            raise InputError(
                f"TransformerLens cannot convert the weights in {folder} ({first_line(error)})",
                _NOT_CONVERTED,
            ) from error
    logger.info("%s", printed.getvalue().strip())
    model.eval()
    if name == UNNAMED_MODEL:
        model.cfg.model_name = folder.name
    _require_same_model(model, hf_model, _sample(hf_model, tokenizer, model.cfg.n_ctx), folder)
    return model


def transformer_bridge(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, name: str
) -> TransformerBridge:
    """Put TransformerLens' hook points into a loaded Hugging Face model, on its device."""
    longest: int = getattr(hf_model.config.get_text_config(), "max_position_embeddings", 0)
    # Before: the bridge takes the place of the model's own modules.
    sample = _sample(hf_model, tokenizer, longest or _LOGIT_CHECK_TOKENS)
    try:
        model = TransformerBridge.boot_transformers(
            name,
            hf_model=hf_model,
            tokenizer=tokenizer,
            device=hf_model.device,
            dtype=hf_model.dtype,
        )
    # What an adapter stumbles over in a model that it half knows.
    except (RuntimeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"TransformerLens cannot bridge the model in {folder} ({first_line(error)})",
            "use module hooks such as model.layers.9",
        ) from error
    model.eval()
    # SAEBench makes folders of it.
    model.cfg.model_name = folder.name if name == UNNAMED_MODEL else name.rpartition("/")[2]
    _require_same_model(model, hf_model, sample, folder)
    return model


@torch.no_grad()
def _sample(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens (1, seq), if possible more than the model's window, and its own logits."""
    parameters = sum(parameter.numel() for parameter in hf_model.parameters())
    affordable = int(_LOGIT_CHECK_OPERATIONS / (2 * parameters))
    wanted = max(_LOGIT_CHECK_TOKENS, min(affordable, 2 * (window_of(hf_model.config) or 0)))
    vocabulary = int(hf_model.config.get_text_config().vocab_size)
    # TransformerLens masks padding.
    special = set(tokenizer.all_special_ids)
    usual = [token for token in range(vocabulary) if token not in special] or [0]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(usual), (1, min(wanted, longest)), generator=generator)
    tokens = torch.tensor(usual)[chosen]
    return tokens, hf_model(tokens.to(hf_model.device)).logits.float().cpu()


@torch.no_grad()
def _require_same_model(
    model: HookedTransformer | TransformerBridge,
    hf_model: PreTrainedModel,
    sample: tuple[torch.Tensor, torch.Tensor],
    folder: Path,
) -> None:
    """Compare the logits of a model and its source on a text."""
    tokens, expected = sample
    if not expected.isfinite().all():
        raise InputError(
            f"the model in {folder} gives NaN or infinite logits: its weights are damaged, or "
            f"{hf_model.dtype} is too narrow for it (model.dtype)"
        )
    logits = model(tokens.to(hf_model.device)).float().cpu()
    # A softmax does not see a constant per token, and some conversions add one.
    expected, logits = (each - each.mean(-1, keepdim=True) for each in (expected, logits))
    error = ((logits - expected).norm() / expected.norm()).item()
    if not error <= _LOGIT_TOLERANCE.get(hf_model.dtype, 1e-1):
        raise InputError(
            f"TransformerLens converts the model in {folder} to one with other logits (relative "
            f"error {error:.2g})",
            _NOT_CONVERTED,
        )


@contextmanager
def _config_by_name(
    folder: Path, config: PretrainedConfig, name: str
) -> Generator[dict[str, Any], None, None]:
    """Make a folder's config.json loadable under a hub name, for the time of one call."""
    with (
        tempfile.TemporaryDirectory(prefix="msae-config-") as cache,
        transformer_lens_name_registered(name),
        transformer_lens_config_given(own_config(config)),
    ):
        # The layout is that of the hub's cache, see
        # https://huggingface.co/docs/huggingface_hub/guides/manage-cache
        repository = Path(cache) / f"models--{name.replace('/', '--')}"
        revision = "0" * 40
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(revision)
        (repository / "snapshots" / revision).mkdir(parents=True)
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if hasattr(config, "n_positions"):
            # TransformerLens reads what transformers 5 writes no longer.
            values.setdefault("n_ctx", config.n_positions)
        (repository / "snapshots" / revision / "config.json").write_text(json.dumps(values))
        yield {"cache_dir": cache, "local_files_only": True}
