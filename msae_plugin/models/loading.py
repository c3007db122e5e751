"""Resolve any language model a run can be trained on into one object with what the run needs.

Sources: weights that a package carries (`packaged:smollm2-135m`), a local folder in the format of
`save_pretrained`, or a name on the Hugging Face Hub. Loaders: HookedTransformer or
TransformerBridge for TransformerLens hooks (`blocks.9.hook_resid_post`), SAELens' HookedProxyLM for
module hooks (`model.layers.9`).

SAELens stores `model_from_pretrained_kwargs` in the metadata of every SAE, and a dtype in them
later breaks SAEBench's core evaluation (two values for the keyword `dtype`): here the dtype is an
argument of its own, and the loaded model is what the runner receives.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens.load_model import HookedProxyLM
from sae_lens.util import str_to_dtype
from transformer_lens import HookedRootModule
from transformer_lens.utilities.tokenize_utils import get_tokenizer_with_bos
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from msae_plugin.common.errors import InputError, first_line
from msae_plugin.models.hook_names import common_style, validate_hook
from msae_plugin.models.hub_access import has_all_weights, model_config_folder, model_folder
from msae_plugin.models.packaged import PACKAGED_PREFIX, packaged_model, prepare_packaged_model
from msae_plugin.models.transformer_lens import (
    BRIDGE,
    HOOKED_TRANSFORMER,
    hooked_transformer,
    require_supported,
    transformer_bridge,
    transformer_lens_loader,
    transformer_lens_name,
)
from msae_plugin.upstream import official_transformer_lens_name, register_transformer_lens_name

logger = logging.getLogger(__name__)

# Parameters of glibc's mallopt with their values; it refuses a larger second one.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = (-1, 256 << 20), (-3, 32 << 20)
_ALLOCATOR_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@dataclass(frozen=True)
class ModelSource:
    """A model's name, resolved."""

    folder: Path  # folder with config, tokenizer and weights
    hub_name: str | None  # its name on the hub, where it is known
    recorded_name: str  # what the metadata of an SAE records: the hub name, else the folder


def resolve_model(name: str, report: Callable[[str], object] = logger.info) -> ModelSource:
    """Find, fetch or convert the files of a model."""
    if name.startswith(PACKAGED_PREFIX):
        hub_name = packaged_model(name).hub_name
        folder = prepare_packaged_model(name, report=report)
        return ModelSource(folder, hub_name, recorded_name=hub_name)
    folder = local_folder(name)
    if folder is not None:
        if not has_all_weights(folder):
            raise InputError(
                f"folder {folder} has a config.json but not all weights "
                "(model.safetensors, or its shards)",
                "save the whole model with save_pretrained",
            )
        # Inside a hub cache a folder is `models--ORG--NAME/snapshots/REVISION`.
        repository = folder.parent.parent.name
        cached = folder.parent.name == "snapshots" and repository.startswith("models--")
        hub_name = repository.removeprefix("models--").replace("--", "/") if cached else None
        return ModelSource(folder, hub_name, recorded_name=hub_name or str(folder))
    hub_name = hub_name_of(name)
    return ModelSource(model_folder(hub_name), hub_name, recorded_name=hub_name)


def local_folder(name: str) -> Path | None:
    """The folder that a name stands for, or None if it can only be a hub name."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
    if folder.is_dir():
        raise InputError(f"folder {folder.resolve()} has no config.json: it is not a model folder")
    if folder.is_absolute() or name.startswith("."):
        raise InputError(f"model folder {folder} does not exist")
    return None


def config_folder(name: str) -> tuple[Path, str | None]:
    """A folder with the config of a model that is not packaged, and the model's hub name."""
    folder = local_folder(name)
    if folder is not None:
        return folder, None
    hub_name = hub_name_of(name)
    return model_config_folder(hub_name), hub_name


def hub_name_of(name: str) -> str:
    """The hub name behind a name or alias (`gpt2-small` is `gpt2`)."""
    official = official_transformer_lens_name(name) or name
    if official.startswith(("NeelNanda/", "ArthurConmy/", "Baidicoot/")):
        raise InputError(
            f"model {name!r} is kept in a format that only TransformerLens reads",
            "load it yourself and hand it to the runner as language_model",
        )
    return official


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a model folder, without running code from it."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    # Broken JSON, an unknown model type, code that would have to run, and whatever the class of a
    # model stumbles over in values that are not what they should be.
    except Exception as error:
        raise InputError(
            f"{folder / 'config.json'} cannot be used ({first_line(error)})",
            "give a causal language model that transformers knows",
        ) from error


HOOKED_MODULES = "AutoModelForCausalLM"
"""The loader for module hooks, by SAELens' name of it."""

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a language model that validation and cost estimates need."""

    d_model: int
    n_layers: int
    vocabulary: int  # rows of the embedding
    # Longest text in tokens, where it is known. Not compared: a cache does not know it.
    positions: int | None = field(default=None, compare=False)

    def require_positions(self, tokens: int, setting: str) -> None:
        """Refuse texts that are longer than the model can read."""
        if self.positions is not None and tokens > self.positions:
            raise InputError(
                f"'{setting}' is {tokens} but the model has {self.positions} positions",
                f"set it to {self.positions} or less",
            )


@dataclass(frozen=True)
class LanguageModel:
    """A loaded language model, in eval mode."""

    # What SAELens' runners take as `override_model`. A TransformerBridge has its methods.
    model: HookedRootModule
    # Puts the BOS token before a text unless called with `add_special_tokens=False`.
    tokenizer: PreTrainedTokenizerBase
    # What an SAE's metadata record: a name that loads on other machines wherever there is one (the
    # hub name of packaged weights), else the folder.
    model_name: str
    loader: str  # HookedTransformer, TransformerBridge or AutoModelForCausalLM
    d_model: int
    n_layers: int
    vocabulary: int

    @property
    def model_class_name(self) -> str:
        """What an SAE's metadata record: SAELens' name of a loader that gives these activations."""
        return saelens_class_name(self.loader)

    @property
    def shape(self) -> ModelShape:
        """Its sizes."""
        config: Any = getattr(self.model, "cfg", None)
        # Rotations go on beyond the table; learned positions end.
        learned = getattr(config, "positional_embedding_type", None) == "standard"
        positions = config.n_ctx if learned else None
        return ModelShape(self.d_model, self.n_layers, self.vocabulary, positions)


def load_language_model(
    name: str,
    hook_names: Sequence[str],
    device: str = "cpu",
    dtype: str = "float32",
    *,
    loader: str = "auto",
    report: Callable[[str], object] = logger.info,
) -> LanguageModel:
    """Load a language model for the hooks of a run.

    The hooks are all of one style, with which the loader has to agree: `auto` does, for
    TransformerLens' hooks as HookedTransformer. Every weight gets the dtype.
    """
    loader = _loader_for(hook_names, loader)
    if dtype not in DTYPES:
        raise InputError(f"model dtype {dtype!r} is not known", f"use one of {', '.join(DTYPES)}")
    torch_dtype = str_to_dtype(dtype)
    _require_device(device)
    shape = describe_model(name)
    for hook in hook_names:
        validate_hook(hook, shape.n_layers)
    if torch.device(device).type == "cpu":
        keep_freed_memory()

    source = resolve_model(name, report)
    config = read_config(source.folder)
    if loader == HOOKED_TRANSFORMER and name.startswith(PACKAGED_PREFIX):
        register_transformer_lens_name(packaged_model(name).hub_name)
    lens_name = transformer_lens_name(source.hub_name)
    if loader != HOOKED_MODULES:
        require_supported(source.folder, config, lens_name, loader)
    # Eager as TransformerLens loads it for a bridge: its hooks on attention scores need it.
    attention = "eager" if loader == BRIDGE else None
    hf_model, tokenizer = _load_hf_model(source.folder, torch_dtype, shape, attention)
    model: HookedRootModule
    if loader == HOOKED_TRANSFORMER:
        model = hooked_transformer(hf_model, tokenizer, source.folder, lens_name, device)
    else:
        hf_model.to(torch.device(device))  # pyright: ignore[reportArgumentType]
        if loader == BRIDGE:
            bridge = transformer_bridge(hf_model, tokenizer, source.folder, lens_name)
            model = cast("HookedRootModule", bridge)
        else:
            model = _hooked_modules(hf_model, tokenizer, list(hook_names))
    for hook in hook_names:
        if hook not in model.hook_dict:
            raise InputError(f"model {name!r}: {_missing_hook(hook, list(model.hook_dict))}")
    return LanguageModel(
        model=model,
        # TransformerLens reloads the tokenizer with add_bos_token on: the model's own counts.
        tokenizer=model.tokenizer,  # pyright: ignore[reportArgumentType]
        model_name=source.recorded_name,
        loader=loader,
        d_model=shape.d_model,
        n_layers=shape.n_layers,
        vocabulary=shape.vocabulary,
    )


def keep_freed_memory() -> None:
    """Let glibc keep up to 256 MiB of what a pass frees for the next one.

    A pass on a CPU makes and frees tensors of ten megabytes. At its own settings glibc gives most
    of them back to the system, which zeroes every page again: a fifth of the time of a pass of
    SmolLM2 to layer 9 over 2,048 tokens. Nothing where there is another allocator, or where the
    user's environment sets it.
    """
    if any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    for parameter, value in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        mallopt(parameter, value)


def describe_model(name: str) -> ModelShape:
    """The sizes of a model, from its config alone: no weights are read or fetched."""
    if name.startswith(PACKAGED_PREFIX):
        package = packaged_model(name)
        return ModelShape(package.d_model, package.n_layers, package.vocabulary, package.positions)
    config = read_config(config_folder(name)[0]).get_text_config()
    try:
        return ModelShape(
            config.hidden_size,
            config.num_hidden_layers,
            config.vocab_size,
            getattr(config, "max_position_embeddings", None),
        )
    except AttributeError as error:
        raise InputError(
            f"the config of {name!r} does not describe a language model ({error})",
            "give a causal language model",
        ) from error


def require_convertible(name: str, loader: str = "auto") -> None:
    """Refuse a model that TransformerLens' class does not know, from its config alone."""
    loader = transformer_lens_loader(loader)
    if not name.startswith(PACKAGED_PREFIX):
        folder, hub_name = config_folder(name)
        require_supported(folder, read_config(folder), transformer_lens_name(hub_name), loader)


@torch.no_grad()
def hook_widths(language_model: LanguageModel, hook_names: Sequence[str]) -> dict[str, int]:
    """The width of the activations at each hook, heads concatenated as SAELens does it.

    One token is run through the model: an MLP's inside or an attention head's output is not as wide
    as the residual stream, and no config tells it for every architecture. d_in by hook.
    """
    model = language_model.model
    tokens = torch.zeros((1, 2), dtype=torch.long, device=next(model.parameters()).device)
    _, cache = model.run_with_cache(tokens, names_filter=list(hook_names))
    widths: dict[str, int] = {}
    for hook in hook_names:
        if hook not in cache or cache[hook].shape[:2] != tokens.shape or cache[hook].ndim < 3:
            raise InputError(
                f"hook {hook!r} gives no activations of the shape (batch, seq, width)",
                "use for example the output of a layer",
            )
        widths[hook] = cache[hook][0, 0].numel()
    return widths


def saelens_class_name(loader: str) -> str:
    """SAELens' name of a loader, `model_class_name` in metadata.

    SAELens knows no bridge; a HookedTransformer without processing has the same activations.
    """
    return HOOKED_TRANSFORMER if loader == BRIDGE else loader


def _loader_for(hook_names: Sequence[str], loader: str) -> str:
    if loader not in ("auto", HOOKED_TRANSFORMER, BRIDGE, HOOKED_MODULES):
        raise InputError(
            f"loader {loader!r} is not known",
            f"use {HOOKED_TRANSFORMER}, {BRIDGE} or {HOOKED_MODULES}, or leave it out",
        )
    of_modules = common_style(hook_names) == "module"
    if loader != "auto" and of_modules != (loader == HOOKED_MODULES):
        needed = HOOKED_MODULES if of_modules else f"{HOOKED_TRANSFORMER} or {BRIDGE}"
        raise InputError(f"hook {hook_names[0]!r} needs the loader {needed}, not {loader}")
    return HOOKED_MODULES if of_modules else transformer_lens_loader(loader)


def _require_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"device {device!r} is not known", "use cpu, cuda or mps") from error
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if missing.get(kind):
        raise InputError(f"device {device!r} is not available on this machine", "use cpu")


def _load_hf_model(
    folder: Path, dtype: torch.dtype, shape: ModelShape, attention: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # The Rust library underneath raises nothing more special.
    except Exception as error:
        raise InputError(
            f"folder {folder} has no usable tokenizer ({first_line(error)})",
            "save the tokenizer beside the model with save_pretrained",
        ) from error
    _require_known_tokens(tokenizer, shape.vocabulary, folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, attn_implementation=attention
        )
    # Files that do not fit together make any line of the model's class fail.
    except Exception as error:
        raise InputError(
            f"the model in {folder} cannot be loaded ({first_line(error)})",
            "check that the files are complete and belong together",
        ) from error
    model.eval()
    return model, tokenizer


def _require_known_tokens(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, folder: Path
) -> None:
    """Refuse a tokenizer that makes token ids of texts for which the model has no embedding.

    Special tokens alone may lie beyond: of padding or images, which no text has.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    special.difference_update(token for token in ends if isinstance(token, int))
    highest = max(set(tokenizer.get_vocab().values()) - special, default=0)
    if highest >= vocabulary:
        raise InputError(
            f"the tokenizer in {folder} gives token ids up to {highest} and the model knows 0 to "
            f"{vocabulary - 1}",
            "save the model's own tokenizer beside it",
        )


def _hooked_modules(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, hook_names: list[str]
) -> HookedProxyLM:
    modules = [name for name, _ in hf_model.named_modules()]
    for hook in hook_names:
        if hook not in modules:
            raise InputError(_missing_hook(hook, modules))
    # The same tokenizer as HookedTransformer's. SAELens strips the BOS token that a tokenizer puts
    # before every text only where `add_bos_token` says so, and Gemma's does it without saying so.
    return HookedProxyLM(hf_model, get_tokenizer_with_bos(tokenizer), hook_names=hook_names)


def _missing_hook(hook: str, known: list[str]) -> str:
    near = get_close_matches(hook, known, n=3)
    return f"hook {hook!r} does not exist" + (f": did you mean {', '.join(near)}" if near else "")
