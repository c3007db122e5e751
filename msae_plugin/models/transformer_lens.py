"""A HookedTransformer from a folder of Hugging Face weights, whatever TransformerLens calls it.

TransformerLens loads by name: it wants a name of its own list, takes the shape of some models
(Gemma, Llama 2) from the name and reads the config of all others from the hub, even when the
loaded model is handed to it. Here it is given the loaded model and tokenizer, a name that it
knows, and a private look-alike of the hub's cache that holds this folder's config.json alone: no
network, and the user's own cache stays untouched.
"""

from __future__ import annotations

import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import get_pretrained_model_config
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from msae_plugin.common.errors import InputError
from msae_plugin.upstream import known_transformer_lens_names, transformer_lens_name_registered

logger = logging.getLogger(__name__)

UNNAMED_MODEL = "local-folder/model"
"""Stands for a model that TransformerLens has no name for.

A neutral text on purpose: TransformerLens takes anything with `llama` or `gemma` in its name, a
path included, for that architecture. The config then decides alone.
"""

_LOGIT_CHECK_TOKENS = 16
# Relative errors measured between the two implementations: 1e-6 in float32, 1e-2 in bfloat16 on a
# random model. A wrong rotary base or head size gives more than 0.2.
_LOGIT_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}


def transformer_lens_name(config: PretrainedConfig, hub_name: str | None) -> str:
    """The name under which TransformerLens converts a model.

    Returns:
        The hub name where TransformerLens lists it; for a Gemma of unknown name, whose shape
        TransformerLens takes from the name alone, a listed name with the same shape; otherwise
        [`UNNAMED_MODEL`][msae_plugin.models.transformer_lens.UNNAMED_MODEL].
    """
    names = known_transformer_lens_names()
    if hub_name in names:
        return hub_name
    architectures: list[str] = config.architectures or []
    if any(architecture.startswith("Gemma") for architecture in architectures):
        for name in names:
            if "gemma" in name and _same_shape(name, config):
                return name
    return UNNAMED_MODEL


def _same_shape(name: str, config: PretrainedConfig) -> bool:
    candidate = get_pretrained_model_config(name)
    text = config.get_text_config()
    return (
        [candidate.original_architecture] == config.architectures
        and candidate.d_model == text.hidden_size
        and candidate.n_layers == text.num_hidden_layers
        and candidate.n_heads == text.num_attention_heads
        and candidate.d_mlp == text.intermediate_size
        and candidate.d_vocab == text.vocab_size
    )


def require_supported(folder: Path, name: str) -> None:
    """Refuse an architecture that TransformerLens cannot convert, before weights are read.

    Raises:
        InputError: If the architecture is not one of TransformerLens'.
    """
    with _config_by_name(folder, name) as lookup:
        try:
            get_pretrained_model_config(name, **lookup)
        # TransformerLens raises NotImplementedError for an architecture that it does not list,
        # and stumbles over a missing attribute or key of configs that it half knows.
        except (NotImplementedError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"TransformerLens cannot convert the model in {folder} ({error})",
                "use module hooks such as model.layers.9, which work with every model",
            ) from error


def hooked_transformer(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    name: str,
    *,
    device: str,
    options: Mapping[str, Any],
) -> HookedTransformer:
    """Convert a loaded Hugging Face model, without weight processing, in its own dtype.

    Raises:
        InputError: If the conversion fails, or the converted model's logits are not those of the
            Hugging Face model (checked where TransformerLens has no name for the model).
    """
    printed = io.StringIO()
    with (
        _config_by_name(folder, name) as lookup,
        # TransformerLens prints a line on standard output, which belongs to the command's result,
        # and warns that HookedTransformer goes away in version 4 (this package requires 3).
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
                **options,
            )
        # What a conversion of unexpected weights fails with: einops and torch raise these.
        except (RuntimeError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"TransformerLens cannot convert the weights in {folder} "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})",
                "use module hooks such as model.layers.9",
            ) from error
    logger.info("%s", printed.getvalue().strip())
    model.eval()
    if name == UNNAMED_MODEL:
        model.cfg.model_name = folder.name
        _require_same_logits(model, hf_model, folder)
    return model


@torch.no_grad()
def _require_same_logits(model: HookedTransformer, hf_model: PreTrainedModel, folder: Path) -> None:
    """Compare a conversion that nobody else has tested with its source on a few tokens."""
    vocabulary = int(hf_model.config.get_text_config().vocab_size)
    tokens = torch.linspace(0, vocabulary - 1, _LOGIT_CHECK_TOKENS).long().unsqueeze(0)
    expected = hf_model(tokens.to(hf_model.device)).logits.float().cpu()
    logits = model(tokens.to(model.cfg.device)).float().cpu()
    # A softmax does not see a constant per token, and some conversions add one.
    expected = expected - expected.mean(-1, keepdim=True)
    logits = logits - logits.mean(-1, keepdim=True)
    error = ((logits - expected).norm() / expected.norm()).item()
    if not error <= _LOGIT_TOLERANCE.get(hf_model.dtype, 1e-1):
        raise InputError(
            f"TransformerLens converts the model in {folder} to one with other logits "
            f"(relative error {error:.2g})",
            "use module hooks such as model.layers.9",
        )


@contextmanager
def _config_by_name(folder: Path, name: str) -> Generator[dict[str, Any], None, None]:
    """Make a folder's config.json loadable under a hub name, for the time of one call."""
    with (
        tempfile.TemporaryDirectory(prefix="msae-config-") as cache,
        transformer_lens_name_registered(name),
    ):
        # The layout is that of the hub's cache, see
        # https://huggingface.co/docs/huggingface_hub/guides/manage-cache
        repository = Path(cache) / f"models--{name.replace('/', '--')}"
        revision = "0" * 40
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(revision)
        (repository / "snapshots" / revision).mkdir(parents=True)
        shutil.copyfile(folder / "config.json", repository / "snapshots" / revision / "config.json")
        yield {"cache_dir": cache, "local_files_only": True}
