"""SAEs of other libraries: recognised by their files, and turned into ordinary SAELens folders.

SAELens' own converters are used where they compute what the format computes. They expect the Hub,
so `upstream.files_from` hands them local files instead. sparsify is read here: SAELens 6.54 rounds
its weights to bfloat16, transposes its W_dec, and leaves b_dec out of the encoder's input when the
decoder is normalised; sparsify 1.3 never does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.loading.pretrained_sae_loaders import (
    dictionary_learning_sae_huggingface_loader_1,
    gemma_2_sae_huggingface_loader,
)
from safetensors.torch import load_file

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import folder_written_atomically, require_empty
from msae_plugin.common.stored import read_json_object
from msae_plugin.upstream import files_from

Loaded = tuple[dict[str, Any], dict[str, torch.Tensor]]
"""A configuration as SAELens reads it, of this version or an old one; and the weights."""
# Those that SAELens' converter of dictionary_learning knows; it takes others for `standard`.
_DICTIONARIES = (
    "AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "GatedAutoEncoder", "JumpReluAutoEncoder",
    "MatryoshkaBatchTopKSAE",
)  # fmt: skip
_POINTS = {"mlp": "hook_mlp_out", "attention": "hook_attn_out", "self_attn": "hook_attn_out"}
_ON_THE_HUB = {"hyperparams.json": "Llama Scope", "params.safetensors": "Gemma Scope 2"}


@dataclass(frozen=True)
class OtherFormat:
    """A format of SAEs that is not SAELens'."""

    name: str  # what it is called
    path: Path  # its file, or the folder of its files
    convert: Callable[[Path], Loaded] | None  # None where only the way to convert it is known
    how: str = ""  # that way

    @property
    def error(self) -> InputError:
        """What to tell a user who gives it to another command."""
        ours = f"msae import {self.path} --output DIR makes a folder for SAELens of it"
        return InputError(f"{self.path} holds an SAE of {self.name}", self.how or ours)


def recognise(path: Path) -> OtherFormat | None:
    """The format of a file or folder that SAELens cannot load; None for anything unknown."""
    files = {file.name: file for file in (sorted(path.iterdir()) if path.is_dir() else [path])}
    folder = path if path.is_dir() else path.parent
    if "sae.safetensors" in files:
        return OtherFormat("sparsify", folder, _sparsify)
    if "ae.pt" in files and "trainer" in _json(folder / "config.json"):
        return OtherFormat("dictionary_learning", folder, _dictionary_learning)
    for file, name in _ON_THE_HUB.items():
        if file in files:
            how = "SAELens reads it from the Hub: give release:sae_id of a release that it knows"
            return OtherFormat(name, folder, None, how)
    arrays = [file for file in files.values() if file.suffix == ".npz"]
    if len(arrays) == 1:
        return OtherFormat("Gemma Scope", arrays[0], _gemma_scope)
    pickled = [file for file in files.values() if file.suffix in (".pt", ".pth")]
    return _of_pickle(pickled[0]) if len(pickled) == 1 and pickled[0].is_file() else None


def other_format_error(path: Path) -> InputError | None:
    """What to tell a user who gives such a file or folder, or one of such folders."""
    inside = sorted(path.iterdir()) if path.is_dir() else []
    places = [path, *(child for child in inside if child.is_dir())]
    found = next(filter(None, map(recognise, places)), None)
    return found and found.error


def import_sae(
    source: Path, output: Path, *, model: str | None = None, hook: str | None = None
) -> OtherFormat:
    """Write an SAE of another library as an ordinary folder of SAELens, in float32.

    Model and hook are for files that do not say.
    """
    if not source.exists():
        raise InputError(f"{source} is not there", "give the file or folder of an SAE")
    found = recognise(source)
    if found is None:
        raise other_format_error(source) or InputError(
            f"{source} holds no SAE in a format known here",
            "msae import takes sparsify (cfg.json, sae.safetensors), dictionary_learning "
            "(config.json, ae.pt), Gemma Scope (params.npz) and .pt files of weights",
        )
    convert = found.convert
    if convert is None:
        raise found.error
    require_empty(output)

    def loader(path: str | Path, device: str, cfg_overrides: Any = None) -> Loaded:  # noqa: ARG001
        config, weights = convert(found.path)
        for key, given in (("model_name", model), ("hook_name", hook)):
            config[key] = given or config.get(key)
            if not config[key]:
                raise InputError(f"{source} does not say its {key}", f"give --{key[:-5]}")
        float32 = {name: tensor.float().contiguous() for name, tensor in weights.items()}
        return config | (cfg_overrides or {}), float32

    try:
        sae = SAE.load_from_disk(found.path, dtype="float32", converter=loader)
    except InputError:
        raise
    # Whatever SAELens' converters, numpy and torch raise about files that do not fit together.
    except Exception as error:
        lacks = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{source} cannot be read as {found.name} ({' '.join(lacks.split())[:200]})",
            "its files must be complete and belong together",
        ) from error
    sae.cfg.metadata.imported_from = found.name
    with folder_written_atomically(output) as folder:
        sae.save_model(folder)
    return found


def _json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _hook(module: str) -> str | None:
    """TransformerLens' hook of a module of transformers; None where that is not sure."""
    match = re.search(r"(?:^|\.)(?:layers|h)[._](\d+)(?:\.(\w+))?$", module)
    point = match and ("hook_resid_post" if match[2] is None else _POINTS.get(match[2]))
    return f"blocks.{match[1]}.{point}" if match and point else None


def _sparsify(folder: Path) -> Loaded:
    """relu((x - b_dec) @ encoder.weight.T + encoder.bias), of which the k largest stay."""
    config = read_json_object(folder / SAE_CFG_FILENAME)
    if config.get("transcode") or config.get("skip_connection"):
        raise InputError(f"{folder} holds a transcoder", "msae takes SAEs alone")
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        raise InputError(f"{folder}: its activation is not plain topk", "no SAELens class has it")
    stored = load_file(folder / "sae.safetensors")
    # The first versions kept the decoder as nn.Linear has it, (d_in, d_sae).
    decoder = stored["W_dec"] if "W_dec" in stored else stored["decoder.weight"].T
    weights = {"W_enc": stored["encoder.weight"].T, "b_enc": stored["encoder.bias"]}
    weights |= {"W_dec": decoder, "b_dec": stored["b_dec"]}
    own = {"architecture": "topk", "k": config["k"], "hook_name": _hook(folder.name)}
    return _sized(weights, own | {"model_name": _json(folder.parent / "config.json").get("model")})


def _dictionary_learning(folder: Path) -> Loaded:
    trainer = cast("dict[str, Any]", read_json_object(folder / "config.json")["trainer"])
    name = trainer["dict_class"]
    if name not in _DICTIONARIES:
        raise InputError(f"{folder}: its class is {name}", f"known are {', '.join(_DICTIONARIES)}")
    _tensors(folder / "ae.pt")  # refuses pickled code, which SAELens' loader would run
    with files_from(folder):
        config, weights, _ = dictionary_learning_sae_huggingface_loader_1("", "", "cpu")
    if "resid" not in str(trainer.get("submodule_name") or "resid"):
        config["hook_name"] = None  # SAELens takes every one for the residual stream
    return config, weights


def _gemma_scope(file: Path) -> Loaded:
    """relu(z) where z = x @ W_enc + b_enc is above the threshold; model and hook by its path."""
    place = file.resolve().as_posix()
    release = re.search(r"gemma-scope-\d+b-(?:pt|it)-(?:res|mlp|att)", place)
    layer = re.search(r"(?:layer_\d+|embedding)/.*", place)
    with np.load(file) as arrays:
        d_in, d_sae = arrays["W_enc" if "W_enc" in arrays else "w_enc"].shape
    names = (release and release[0], layer and layer[0])
    with files_from(file.parent, {"params.npz": file.name}):
        config, weights, _ = gemma_2_sae_huggingface_loader(
            names[0] or "gemma-scope-2b-pt-res",
            names[1] or "layer_0",
            cfg_overrides={"d_in": d_in, "d_sae": d_sae},
        )
    config["model_name"] = names[0] and config["model_name"]
    config["hook_name"] = names[0] and names[1] and config["hook_name"]
    return config, weights


def _of_pickle(file: Path) -> OtherFormat | None:
    try:
        stored = _tensors(file)
    except InputError as error:
        return OtherFormat("pickled objects, or it is cut short", file, None, error.how or "")
    weights = cast("Mapping[str, Any]", stored.get("state_dict", stored))
    if {"pre_bias", "latent_bias"} <= weights.keys():
        how = "torch.save its W_enc and W_dec (d_in first in W_enc), b_enc = latent_bias and b_dec"
        return OtherFormat("OpenAI's sparse_autoencoder", file, None, how)
    plain = {"W_enc", "W_dec"} <= weights.keys()
    return OtherFormat("a .pt file of weights", file, _plain_weights) if plain else None


def _plain_weights(file: Path) -> Loaded:
    """Of SAELens before 2.0 and its like: relu((x - b_dec) @ W_enc + b_enc), or jumprelu."""
    stored = _tensors(file)
    weights = cast("dict[str, torch.Tensor]", stored.get("state_dict", stored))
    beside = _json(file.with_name(f"{file.stem}_cfg.json")) or _json(file.parent / SAE_CFG_FILENAME)
    recorded = cast("dict[str, Any]", stored.get("cfg") or beside)
    own = {"architecture": "jumprelu" if "threshold" in weights else "standard"}
    hook = {"hook_name": recorded.get("hook_point") or recorded.get("act_name")}
    return _sized(weights, own | hook | {k: v for k, v in recorded.items() if v is not None})


def _sized(weights: dict[str, torch.Tensor], config: Mapping[str, Any]) -> Loaded:
    d_in, d_sae = weights["W_enc"].shape
    return {**config, "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu"}, weights


def _tensors(file: Path) -> dict[str, Any]:
    """What torch.save wrote, without running code that is pickled in it."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    # Damaged bytes make any line of the unpickler fail.
    except Exception as error:
        raise InputError(
            f"{file} holds more than tensors, or is cut short",
            "reading it would run code; where you trust it, torch.load it with "
            "weights_only=False and torch.save its state_dict() alone",
        ) from error
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
