"""Top activating tokens of latents in context.

One pass over the latents keeps, for every latent, its strongest token in each of the few documents
where it is strongest (constant memory, O(d_sae * contexts)). The words around those tokens come
from a second walk over the text, which needs no language model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from msae_plugin.data.text import Window
from msae_plugin.evaluation.heldout import LatentBatch

# A latent that fires on more than 5 % of all tokens is a direction that most text shares, one below
# 0.01 % has too few tokens in a small corpus to read anything into.
MIN_FREQUENCY = 1e-4
MAX_FREQUENCY = 5e-2
# Twice the contexts that are shown, because two documents may hold the same sentence.
OVERSAMPLING = 2
TOKENS_BEFORE, TOKENS_AFTER = 12, 6


@dataclass(frozen=True)
class TokenContext:
    """One activating token with the words around it, cut at the document's ends."""

    before: str
    token: str
    after: str
    activation: float  # the latent's value on the token
    document: int


@dataclass(frozen=True)
class LatentProfile:
    """A latent with its statistics and contexts, strongest first."""

    latent: int  # index in the SAE
    frequency: float  # share of the tokens on which it fires
    mean_activation: float  # mean over the tokens on which it fires
    # `mean_activation` times the norm of its decoder row: how far it moves the reconstruction when
    # it fires, in units of the activations.
    strength: float
    contexts: list[TokenContext]  # one per document


class ContextCollector:
    """Streaming statistics and strongest tokens of every latent of one SAE."""

    def __init__(self, d_sae: int, context_size: int, contexts: int = 5) -> None:
        self.context_size, self.contexts = context_size, contexts
        slots = contexts * OVERSAMPLING
        self.n_tokens = 0
        self.fired = torch.zeros(d_sae, dtype=torch.int64)
        self.total = torch.zeros(d_sae, dtype=torch.float64)
        self._values = torch.zeros(slots, d_sae)
        self._tokens = torch.zeros(slots, d_sae, dtype=torch.int64)
        self._documents = torch.full((slots, d_sae), -1, dtype=torch.int64)

    @torch.no_grad()
    def update(self, batch: LatentBatch) -> None:
        """Take in the latents of consecutive tokens; documents must come in order."""
        latents = batch.latents.detach().float().cpu()
        self.n_tokens += latents.shape[0]
        self.fired += (latents != 0).sum(0)
        self.total += latents.abs().sum(0, dtype=torch.float64)
        addresses = (batch.windows * self.context_size + batch.positions).cpu()
        documents, counts = torch.unique_consecutive(batch.documents.cpu(), return_counts=True)
        strongest = [part.max(dim=0) for part in latents.split(counts.tolist())]
        values = torch.stack([part.values for part in strongest])
        starts = (counts.cumsum(0) - counts).tolist()
        at = [start + part.indices for start, part in zip(starts, strongest, strict=True)]
        tokens = addresses[torch.stack(at)]
        owners = documents[:, None].expand_as(tokens)
        # A document that the last batch began: of its two best tokens only the better one stays.
        held = self._documents == documents[0]
        values[0] = torch.where((held & (self._values >= values[0])).any(0), 0.0, values[0])
        self._values[held & (self._values < values[0])] = 0.0
        merged = torch.cat([self._values, values])
        self._values, order = merged.topk(self._values.shape[0], dim=0)
        self._tokens = torch.cat([self._tokens, tokens]).gather(0, order)
        self._documents = torch.cat([self._documents, owners]).gather(0, order)

    def strongest(self, W_dec: torch.Tensor, count: int = 10) -> list[int]:
        """The latents whose firing moves the reconstruction most.

        Ordered by mean activation when active times decoder norm, among latents that fire on
        0.01 % to 5 % of the tokens and in at least as many documents as contexts are shown; where
        fewer than `count` qualify, the others that fire follow in the same order. A latent most of
        whose strongest tokens are those of one already chosen is passed over: a person would read
        the same lines twice.
        """
        strength = self._strength(W_dec)
        frequency = self.fired / max(1, self.n_tokens)
        readable = (
            (frequency >= MIN_FREQUENCY)
            & (frequency <= MAX_FREQUENCY)
            & ((self._values > 0).sum(0) >= self.contexts)
        )
        by_strength = strength.argsort(descending=True, stable=True)
        readable_first = (~readable[by_strength]).long().argsort(stable=True)
        ranked = by_strength[readable_first]
        chosen: list[int] = []
        shown: list[set[int]] = []
        for latent in ranked[self.fired[ranked] > 0].tolist():
            held = self._values[:, latent] > 0
            tokens = set(self._tokens[held, latent][: self.contexts].tolist())
            if any(2 * len(tokens & others) > len(tokens) for others in shown):
                continue
            chosen.append(latent)
            shown.append(tokens)
            if len(chosen) == count:
                break
        return chosen

    def profiles(
        self,
        latents: Iterable[int],
        W_dec: torch.Tensor,
        windows: Iterable[Window],
        tokenizer: Any,
    ) -> list[LatentProfile]:
        """Statistics and contexts of the given latents, in the given order."""
        chosen = list(latents)
        strength = self._strength(W_dec)
        used = self._tokens[:, chosen][self._values[:, chosen] > 0]
        wanted = set((used // self.context_size).tolist())
        kept: dict[int, Window] = {}
        for index, window in enumerate(windows):
            if index in wanted:
                kept[index] = window
            if len(kept) == len(wanted):
                break
        special = set(tokenizer.all_special_ids)
        profiles: list[LatentProfile] = []
        for latent in chosen:
            contexts: list[TokenContext] = []
            seen: set[tuple[str, str]] = set()
            for value, address, document in zip(
                self._values[:, latent].tolist(),
                self._tokens[:, latent].tolist(),
                self._documents[:, latent].tolist(),
                strict=True,
            ):
                if value <= 0 or len(contexts) == self.contexts:
                    break
                index, position = divmod(address, self.context_size)
                texts = _words(kept[index], position, special, tokenizer)
                if texts[:2] in seen:
                    continue
                seen.add(texts[:2])
                contexts.append(TokenContext(*texts, activation=value, document=document))
            fired = int(self.fired[latent])
            profiles.append(
                LatentProfile(
                    latent=latent,
                    frequency=fired / max(1, self.n_tokens),
                    mean_activation=self.total[latent].item() / max(1, fired),
                    strength=strength[latent].item(),
                    contexts=contexts,
                )
            )
        return profiles

    def _strength(self, W_dec: torch.Tensor) -> torch.Tensor:
        norms = W_dec.detach().double().norm(dim=1).cpu()
        return self.total / self.fired.clamp(min=1) * norms


def _words(
    window: Window, position: int, special: set[int], tokenizer: Any
) -> tuple[str, str, str]:
    """Text in front of, of and behind a token, within its document and its window."""
    ids = window.tokens.tolist()
    documents = window.documents.tolist()
    inside = [
        i
        for i in range(max(0, position - TOKENS_BEFORE), min(len(ids), position + TOKENS_AFTER + 1))
        if documents[i] == documents[position] and ids[i] not in special
    ]
    head = [ids[i] for i in inside if i < position]
    tail = [ids[i] for i in inside if i > position]
    # Decoded as prefixes of one string: a sentencepiece tokenizer drops the space in front of a
    # token that is decoded alone.
    first = _text(tokenizer, head)
    second = _text(tokenizer, [*head, ids[position]])
    third = _text(tokenizer, [*head, ids[position], *tail])
    if not second.startswith(first) or not third.startswith(second):
        # A character of several tokens begins or ends inside the cut: each part by itself.
        return first, _text(tokenizer, [ids[position]]), _text(tokenizer, tail)
    return first, second[len(first) :], third[len(second) :]


def _text(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text


def one_line(text: str) -> str:
    """Line breaks and tabs made visible, so that a context stays on its line."""
    return text.replace("\r", "").replace("\n", "⏎").replace("\t", " ")


# Characters in front of and behind the token: with the value they fill 80 columns.
BEFORE_WIDTH, AFTER_WIDTH = 38, 22


class ContextsForTerminal:
    """One block per latent; the tokens under one another, values in front.

    The token is in reverse video, or between «» where the output has no styles (a file, a pipe).
    """

    def __init__(self, profiles: Sequence[LatentProfile]) -> None:
        self._profiles = profiles

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line per heading and context; what does not fit the terminal is cut at its end."""
        styled = console.is_terminal and console.color_system is not None
        for rank, profile in enumerate(self._profiles, 1):
            headline = (
                f"{rank}. latent {profile.latent}: fires on {profile.frequency:.2%} of the tokens, "
                f"mean {profile.mean_activation:.3g} when it does"
            )
            yield Text(headline, style="bold")
            for context in profile.contexts:
                before, after = one_line(context.before), one_line(context.after)
                token = one_line(context.token)
                line = Text(no_wrap=True, overflow="ellipsis")
                line.append(f"{context.activation:8.3g}  ", style="dim")
                line.append(before[-BEFORE_WIDTH:].rjust(BEFORE_WIDTH))
                line.append(token if styled else f"«{token}»", style="reverse bold")
                line.append(after[:AFTER_WIDTH])
                yield line


def contexts_as_json(profiles: Sequence[LatentProfile]) -> list[dict[str, Any]]:
    """The same as plain data."""
    return [asdict(profile) for profile in profiles]
