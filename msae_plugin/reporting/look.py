"""Text in, latents out; and the text that follows when a latent is turned up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens.util import get_special_token_ids

from msae_plugin.common.errors import InputError
from msae_plugin.common.progress import Report, warnings_alone
from msae_plugin.common.stored import read_json_object
from msae_plugin.comparison.language_model import CONTEXTS_FILE
from msae_plugin.data.text_files import encodable
from msae_plugin.evaluation.evaluate import model_for
from msae_plugin.models.forward_pass import activations_at, input_device
from msae_plugin.models.loading import LanguageModel, load_language_model
from msae_plugin.reporting.latent_browser import tokens_it_fires_on
from msae_plugin.reporting.latents import logits, unembedding
from msae_plugin.saes.export import dense
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


@dataclass(frozen=True)
class SAEInModel:
    """An SAE beside the language model that it is for, both loaded."""

    evaluated: EvaluatedSAE
    language_model: LanguageModel
    fires_on: Callable[[int], list[str]]  # tokens of a latent's strongest examples

    @torch.no_grad()
    def look(self, text: str, top: int = 5) -> Look:
        """Find the most active latents on each token; BOS, EOS and PAD are passed over."""
        host: Any = self.language_model.model
        tokenizer: Any = self.language_model.tokenizer
        tokens = self._tokens(text)
        ids: list[int] = tokens[0].tolist()
        special = set(get_special_token_ids(tokenizer))
        kept = [position for position, token in enumerate(ids) if token not in special]
        if not kept:
            raise InputError("the text is empty", "give a few words")
        sae, hook = self.evaluated.sae, self.evaluated.hook_name
        activations = activations_at(host, tokens, [hook])[hook][0, kept]
        latents = dense(sae.encode(activations.to(sae.device, sae.dtype)))
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
                position=position,
                token=tokenizer.decode([ids[position]]),
                latent=latent,
                activation=value,
                promotes=_joined(raised.get(latent, [])),
                fires_on=_joined(self.fires_on(latent)),
            )
            for position, indices, values in zip(
                kept, strongest.indices.tolist(), shown.tolist(), strict=True
            )
            for latent, value in zip(indices, values, strict=True)
            if value != 0
        ]
        return Look(rows, float((latents != 0).sum(1).float().mean()))

    @torch.no_grad()
    def continue_text(self, text: str, new_tokens: int, latent: int = 0, added: float = 0.0) -> str:
        """Continue a text greedily, with a latent's decoder row added at the hook on every token.

        Its activation is raised by `added`; 0 leaves the model alone.
        """
        host: Any = self.language_model.model
        tokenizer: Any = self.language_model.tokenizer
        sae = self.evaluated.sae
        if not 0 <= latent < int(sae.cfg.d_sae):
            raise InputError(f"latent {latent} does not exist: the SAE has {sae.cfg.d_sae}")

        def steer(activations: torch.Tensor, hook: object) -> torch.Tensor:  # noqa: ARG001
            row = sae.W_dec[latent].reshape(activations.shape[2:])  # hook_z keeps heads apart
            return activations + added * row.to(activations.device, activations.dtype)

        hooks = [(self.evaluated.hook_name, steer)] if added else []
        tokens = self._tokens(text, new_tokens)
        begin = tokens.shape[1]
        for _ in range(new_tokens):
            output = host.run_with_hooks(tokens.to(input_device(host)), fwd_hooks=hooks)
            following = output[0, -1].argmax().reshape(1, 1).cpu()
            if int(following) == tokenizer.eos_token_id:
                break
            tokens = torch.cat([tokens, following], dim=1)
        return tokenizer.decode(tokens[0, begin:])

    def _tokens(self, text: str, room: int = 0) -> torch.Tensor:
        """(1, seq) token ids, BOS first where the SAE was trained with it."""
        host: Any = self.language_model.model
        tokenizer: Any = self.language_model.tokenizer
        metadata = self.evaluated.sae.cfg.metadata
        bos = metadata.prepend_bos is not False and tokenizer.bos_token_id is not None
        text = encodable(text)  # a shell passes on bytes that are no UTF-8
        tokens = host.to_tokens(text, prepend_bos=bos, truncate=False, move_to_device=False)
        longest = self.language_model.shape.positions
        if longest is not None and tokens.shape[1] + room > longest:
            raise InputError(
                f"the text has {tokens.shape[1] + room} tokens, and the model reads {longest}"
            )
        return tokens


def open_sae(
    reference: str,
    *,
    browser: Path | None = None,
    model: str | None = None,
    loader: str = "auto",
    language_model: LanguageModel | None = None,
    report: Report = warnings_alone,
) -> SAEInModel:
    """Load one SAE and its language model."""
    found = load_saes([reference], device=default_device("auto"), model_name=model)
    if len(found) > 1:
        names = ", ".join(str(each.folder or each.name) for each in found)
        raise InputError(f"{reference!r} holds {len(found)} SAEs", f"give one of {names}")
    evaluated = found[0]
    fires_on = _fires_on(evaluated, browser)
    if language_model is None:
        report("loading the language model")
        language_model = load_language_model(
            model_for(model, found), [evaluated.hook_name], default_device("auto"), loader=loader
        )
    if evaluated.sae.hook_z_reshaping_mode:  # the head dimension is flattened already
        evaluated.sae.turn_off_forward_pass_hook_z_reshaping()
    return SAEInModel(evaluated, language_model, fires_on)


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
