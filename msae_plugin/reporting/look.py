"""Text in, latents out: which latents of an SAE are active on each token of a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens.util import get_special_token_ids

from msae_plugin.common.errors import InputError
from msae_plugin.common.stored import read_json_object
from msae_plugin.comparison.language_model import CONTEXTS_FILE
from msae_plugin.evaluation.evaluate import model_for
from msae_plugin.evaluation.outcomes import Reporter, no_report
from msae_plugin.models.forward_pass import activations_at
from msae_plugin.models.loading import LanguageModel, load_language_model
from msae_plugin.reporting.latent_browser import tokens_it_fires_on
from msae_plugin.reporting.latents import logits, unembedding
from msae_plugin.saes.load import EvaluatedSAE, load_saes
from msae_plugin.training.plans import default_device

PROMOTED = 4
"""Tokens named per latent."""


@dataclass(frozen=True)
class ActiveLatent:
    """A latent that is active on a token."""

    position: int  # of the token in the text, special tokens included
    token: str
    latent: int
    activation: float
    promotes: str  # the tokens whose logits its decoder direction raises most
    fires_on: str  # tokens of its strongest examples; empty where none are known


@dataclass(frozen=True)
class Look:
    """What was found."""

    rows: list[ActiveLatent]  # token by token, the strongest latent first
    l0: float  # active latents per token of the text, special tokens left out


def look(
    reference: str,
    text: str,
    *,
    top: int = 5,
    browser: Path | None = None,
    model: str | None = None,
    language_model: LanguageModel | None = None,
    report: Reporter = no_report,
) -> Look:
    """Find the most active latents on each token; BOS, EOS and PAD are passed over."""
    found = load_saes([reference], device=default_device("auto"), model_name=model)
    if len(found) > 1:
        names = ", ".join(str(each.folder or each.name) for each in found)
        raise InputError(f"{reference!r} holds {len(found)} SAEs", f"give one of {names}")
    evaluated = found[0]
    fires_on = _fires_on(evaluated, browser)
    if language_model is None:
        report("loading the language model")
        language_model = load_language_model(
            model_for(model, found), [evaluated.hook_name], default_device("auto")
        )
    host: Any = language_model.model
    tokenizer: Any = language_model.tokenizer
    bos = evaluated.sae.cfg.metadata.prepend_bos is not False and tokenizer.bos_token_id is not None
    tokens = host.to_tokens(text, prepend_bos=bos, truncate=False, move_to_device=False)
    ids: list[int] = tokens[0].tolist()
    longest = language_model.shape.positions
    if longest is not None and len(ids) > longest:
        raise InputError(f"the text has {len(ids)} tokens, and the model reads {longest}")
    special = set(get_special_token_ids(tokenizer))
    kept = [place for place, token in enumerate(ids) if token not in special]
    if not kept:
        raise InputError("the text is empty", "give a few words")
    sae = evaluated.sae
    activations = activations_at(host, tokens, [evaluated.hook_name])[evaluated.hook_name][0, kept]
    if sae.hook_z_reshaping_mode:  # the head dimension is flattened already
        sae.turn_off_forward_pass_hook_z_reshaping()
    with torch.no_grad():
        latents: Any = sae.encode(activations.to(sae.device, sae.dtype))
        latents = latents.to_dense() if latents.is_sparse else latents
        strongest = latents.topk(min(top, latents.shape[1]), dim=1)
        shown = latents.gather(1, strongest.indices)
        distinct: list[int] = strongest.indices[shown != 0].unique().tolist()
        matrix = unembedding(host, int(sae.cfg.d_in))
        raised = {} if matrix is None else {
            latent: [tokenizer.decode([token]) for token in most]
            for latent, (most, *_) in zip(
                distinct, logits(sae.W_dec[distinct], matrix, PROMOTED), strict=True
            )
        }  # fmt: skip
    rows = [
        ActiveLatent(
            position=place,
            token=tokenizer.decode([ids[place]]),
            latent=latent,
            activation=value,
            promotes=_joined(raised.get(latent, [])),
            fires_on=_joined(fires_on(latent)),
        )
        for place, indices, values in zip(
            kept, strongest.indices.tolist(), shown.tolist(), strict=True
        )
        for latent, value in zip(indices, values, strict=True)
        if value != 0
    ]
    return Look(rows, float((latents != 0).sum(1).float().mean()))


def _fires_on(evaluated: EvaluatedSAE, browser: Path | None) -> Callable[[int], list[str]]:
    """From the browser, else from the contexts that a comparison stored beside the SAE."""
    if browser is not None:
        return tokens_it_fires_on(browser, evaluated)
    stored = None if evaluated.folder is None else evaluated.folder.parent / CONTEXTS_FILE
    entries = read_json_object(stored)["latents"] if stored is not None and stored.is_file() else []
    known: dict[int, list[str]] = {
        entry["latent"]: [context["token"] for context in entry["contexts"]] for entry in entries
    }
    return lambda latent: known.get(latent, [])


def _joined(tokens: list[str]) -> str:
    """Distinct ones, in order."""
    return " · ".join(dict.fromkeys(word for token in tokens if (word := token.strip())))
