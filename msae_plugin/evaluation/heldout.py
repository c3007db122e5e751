"""Held-out metrics: what an SAE keeps of the language model on text it was not trained on.

Definitions (docs/method.md repeats them beside the tables):

- Positions: BOS, EOS and PAD tokens (`sae_lens.util.get_special_token_ids`) are left out of
  everything when `exclude_special` is on, which is how the SAEs are trained: their activations are
  up to 200 times larger than the rest. Their activations also stay the model's own in the passes
  with an SAE and with zeros, so both differ from the clean pass at the same positions only.
  SAELens' and SAEBench's scores zero BOS as well; scores of the two kinds are not comparable.
- Explained variance: 1 - E|x - x_rec|^2 / (E|x|^2 - |E x|^2) over all tokens
  (`sae_lens.evals.ExplainedVarianceCalculator`, streaming), not the mean of per-batch values.
- Loss recovered: (CE_zero - CE_sae) / (CE_zero - CE_clean), CE in nats per predicted token,
  averaged over the predictions made at those positions.
- KL: of the clean model's next-token distribution from the one with the SAE, same positions.
- Dead latents: those that fire on none of the evaluated tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.util import get_special_token_ids

from msae_plugin.common.errors import InputError
from msae_plugin.data.text import batched_windows, iterate_windows, require_texts
from msae_plugin.models.forward_pass import Tail, activations_at, logits_and_activations
from msae_plugin.models.loading import LanguageModel
from msae_plugin.saes.export import dense
from msae_plugin.saes.health import dense_share, encoder_decoder_alignment

# Firings from which on the word of a latent is judged, and the share of its activation on one word
# that makes it a detector of that word.
FIRINGS_TO_JUDGE = 20
ON_ONE_WORD = 0.5
# Pairs of latent and word that are kept before equal ones are added up: 12 MiB.
_BUFFERED_PAIRS = 2**20


class Words:
    """Numbers of words: tokens that differ in case or in a leading space alone are one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._of_token: dict[int, int] = {}
        self._of_text: dict[str, int] = {}

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n,) token ids to (n,) numbers of words, long, on the CPU."""
        distinct, inverse = tokens.cpu().unique(return_inverse=True)
        return torch.tensor([self._word(int(token)) for token in distinct])[inverse]

    def _word(self, token: int) -> int:
        if token not in self._of_token:
            text = self._tokenizer.decode([token]).strip().lower()
            self._of_token[token] = self._of_text.setdefault(text, len(self._of_text))
        return self._of_token[token]


class ActivationByWord:
    """Sums of each latent's activation by word."""

    def __init__(self) -> None:
        self._pairs: list[torch.Tensor] = []
        self._sums: list[torch.Tensor] = []
        self._room = _BUFFERED_PAIRS

    def add(self, latents: torch.Tensor, words: torch.Tensor) -> None:
        """Add (n_tokens, d_sae) latents at words (n_tokens,)."""
        at, latent = latents.nonzero(as_tuple=True)
        self._pairs.append((latent.cpu() << 32) + words[at.cpu()])
        self._sums.append(latents[at, latent].abs().float().cpu())
        if sum(map(len, self._pairs)) > self._room:
            self._add_up()
            self._room = max(_BUFFERED_PAIRS, 2 * len(self._pairs[0]))

    def _add_up(self) -> None:
        pairs, inverse = torch.cat(self._pairs).unique(return_inverse=True)
        sums = torch.zeros(len(pairs)).index_add_(0, inverse, torch.cat(self._sums))
        self._pairs, self._sums = [pairs], [sums]

    def single_word_share(self, firings: torch.Tensor) -> float | None:
        """Share of the latents with `ON_ONE_WORD` of their activation on one word.

        Of those that fired on `FIRINGS_TO_JUDGE` tokens (`firings` is (d_sae,)); None when there
        are none.
        """
        judged = firings >= FIRINGS_TO_JUDGE
        if not self._pairs or not judged.any():
            return None
        self._add_up()
        latent, sums = self._pairs[0] >> 32, self._sums[0]
        total = torch.zeros(len(firings)).index_add_(0, latent, sums)
        largest = torch.zeros(len(firings)).scatter_reduce_(0, latent, sums, "amax")
        return float((largest >= ON_ONE_WORD * total)[judged].float().mean())


# A block of log-probabilities, latents or cosines holds at most this many float32 values: 16 MiB.
# Larger ones get new pages from the system each time (`models/loading.py`): losses over Gemma's
# vocabulary take 4.5 times as long in blocks of 64 MiB.
BLOCK_ELEMENTS = 2**22


def predicting_positions(kept: torch.Tensor) -> torch.Tensor:
    """Flat indices of the kept positions that predict a next token."""
    predicting = kept.clone()
    predicting[:, -1] = False
    return predicting.flatten().nonzero().squeeze(1)


@torch.no_grad()
def summed_losses(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    reference_logits: torch.Tensor | None = None,
) -> tuple[float, float]:
    """Sums over positions of the next-token cross-entropy and of KL(reference || logits), in nats.

    Both are computed from float32 log-probabilities whatever the dtype of the logits (a softmax in
    bfloat16 gives infinities in the KL), a block of positions at a time, and summed in float64.
    Logits are (batch, seq, vocabulary), tokens (batch, seq), positions from `predicting_positions`;
    without reference logits the KL is 0.
    """
    vocabulary = logits.shape[-1]
    flat = logits.reshape(-1, vocabulary)
    reference = None if reference_logits is None else reference_logits.reshape(-1, vocabulary)
    flat_tokens = tokens.flatten().to(logits.device)
    cross_entropy = kl = 0.0
    for block in positions.to(logits.device).split(max(1, BLOCK_ELEMENTS // vocabulary)):
        log_probs = flat[block].float().log_softmax(-1)
        targets = flat_tokens[block + 1]
        cross_entropy -= log_probs.gather(1, targets[:, None]).double().sum().item()
        if reference is not None:
            reference_log_probs = reference[block].float().log_softmax(-1)
            per_token = (reference_log_probs.exp() * (reference_log_probs - log_probs)).sum(-1)
            kl += per_token.double().sum().item()
    return cross_entropy, kl


def cosines_to_others(
    directions: torch.Tensor, block_elements: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Cosines of unit rows (count, d_in) to all others, a block of rows at a time.

    Yields the first row of the block, and (rows, count) cosines, -inf to the row itself.
    """
    count = directions.shape[0]
    height = max(1, block_elements // max(1, count))
    for start in range(0, count, height):
        block = directions[start : start + height]
        cosines = block @ directions.T
        own = torch.arange(block.shape[0], device=cosines.device)
        cosines[own, start + own] = -torch.inf
        yield start, cosines


@torch.no_grad()
def max_decoder_cosines(W_dec: torch.Tensor) -> torch.Tensor:
    """For each latent the cosine to its nearest other latent's decoder direction.

    Rows of W_dec (d_sae, d_in) may have any norm. A row of zeros has no direction: it is neither
    counted nor anyone's neighbour. Float32 on W_dec's device; empty for fewer than two directions.
    """
    directions = W_dec.detach().float()
    norms = directions.norm(dim=1)
    directions = directions[norms > 0] / norms[norms > 0, None]
    if directions.shape[0] < 2:
        return directions.new_zeros(0)
    blocks = cosines_to_others(directions, BLOCK_ELEMENTS)
    return torch.cat([cosines.amax(dim=1) for _, cosines in blocks])


def mean_max_decoder_cosine(W_dec: torch.Tensor) -> float:
    """Mean over latents of the cosine to the nearest other decoder direction.

    0 is an orthogonal decoder, 1 one whose latents come in pairs. With a single direction there
    is no overlap: 0.
    """
    nearest = max_decoder_cosines(W_dec)
    return nearest.double().mean().item() if nearest.numel() else 0.0


# Logits of one pass: 256 MiB of float32; the clean pass's are held beside those of each other pass.
LOGIT_ELEMENTS = 2**26
# Below this many nats, zeroing the layer does nothing to the model and the ratio is noise.
MIN_ABLATION_EFFECT = 1e-6


@dataclass(frozen=True)
class HeldoutMetrics:
    """Numbers of one SAE on held-out text; `firing_frequency` is left out of `to_dict`."""

    explained_variance: float  # 1 is perfect, below 0 worse than the mean
    l0: float
    loss_recovered: float | None  # None where zeroing the activations does not change the loss
    # Losses in nats per token: of the model, with the SAE's reconstruction, with zeros there.
    ce_clean: float
    ce_sae: float
    ce_zero: float
    kl: float  # KL(clean || with the SAE), nats per token
    dead_latents: int
    d_sae: int
    mean_max_decoder_cosine: float
    dense_share: float  # of the L0, on latents that fire on more than a tenth of the tokens
    log10_median_firing_rate: float | None  # of the latents that fire at all
    encoder_decoder_alignment: float | None  # of the latents that fire; None without W_enc
    single_word_share: float | None  # None where no latent fires often enough
    n_tokens: int  # behind explained variance, L0 and dead latents
    n_loss_tokens: int  # predicted ones, behind the losses and the KL
    # (d_sae,) share of the tokens on which each latent fires.
    firing_frequency: torch.Tensor = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, float | int | None]:
        """JSON-able numbers."""
        return {k: v for k, v in vars(self).items() if k != "firing_frequency"}


@dataclass(frozen=True)
class LatentBatch:
    """Latents of some consecutive non-special tokens, for an observer of the evaluation."""

    name: str  # which SAE
    latents: torch.Tensor  # (tokens, d_sae) dense
    # (tokens,) long: window in `iterate_windows`' order, position in it, text it is from.
    windows: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor


class _Measured:
    """One SAE with its running sums."""

    def __init__(
        self, name: str, sae: SAE[Any], hook: str, observer: Callable[[LatentBatch], None] | None
    ) -> None:
        self.name, self.sae, self.hook, self.observer = name, sae, hook, observer
        self.variance = ExplainedVarianceCalculator()
        self.fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64)
        self.by_word = ActivationByWord()
        self.cross_entropy = self.kl = 0.0

    def reconstruct(
        self,
        activations: torch.Tensor,
        kept: torch.Tensor,
        words: torch.Tensor,
        documents: torch.Tensor,
        first_window: int,
    ) -> torch.Tensor:
        """Add a batch to the sums; what to write back, (batch, seq, d_in), zero where not kept."""
        reconstruction = torch.zeros_like(activations)
        window, position = kept.nonzero(as_tuple=True)
        sae, reshaping = self.sae, self.sae.hook_z_reshaping_mode
        if reshaping:  # the head dimension is flattened already
            sae.turn_off_forward_pass_hook_z_reshaping()
        try:
            rows = max(1, BLOCK_ELEMENTS // sae.cfg.d_sae)
            for part in torch.arange(window.numel()).split(rows):
                at = (window[part], position[part])
                sae_in = activations[at]
                latents = dense(sae.encode(sae_in.to(sae.device, sae.dtype)))
                sae_out = sae.decode(latents)
                self.by_word.add(latents, words[part])
                self.variance.add_batch(sae_out.float().cpu(), sae_in.float().cpu())
                # != 0: architectures with signed latents count too, as in SAELens' own L0.
                self.fired += (latents != 0).sum(0).cpu()
                reconstruction[at] = sae_out.to(reconstruction.device, reconstruction.dtype)
                if self.observer is not None:
                    where = (at[0] + first_window, at[1], documents[at])
                    self.observer(LatentBatch(self.name, latents, *where))
        finally:
            if reshaping:
                sae.turn_on_forward_pass_hook_z_reshaping()
        return reconstruction

    def metrics(
        self, n_tokens: int, n_loss_tokens: int, ce_clean: float, ce_zero: float
    ) -> HeldoutMetrics:
        ce_sae, effect = self.cross_entropy / n_loss_tokens, ce_zero - ce_clean
        fired = self.fired > 0
        rates = self.fired[fired].double() / n_tokens
        recovered = (ce_zero - ce_sae) / effect if abs(effect) >= MIN_ABLATION_EFFECT else None
        return HeldoutMetrics(
            explained_variance=self.variance.compute(),
            l0=self.fired.sum().item() / n_tokens,
            loss_recovered=recovered,
            ce_clean=ce_clean,
            ce_sae=ce_sae,
            ce_zero=ce_zero,
            kl=self.kl / n_loss_tokens,
            dead_latents=int((~fired).sum()),
            d_sae=self.sae.cfg.d_sae,
            mean_max_decoder_cosine=mean_max_decoder_cosine(self.sae.W_dec),
            dense_share=float(dense_share(self.fired, n_tokens)),
            log10_median_firing_rate=float(rates.median().log10()) if fired.any() else None,
            encoder_decoder_alignment=encoder_decoder_alignment(self.sae, fired),
            single_word_share=self.by_word.single_word_share(self.fired),
            n_tokens=n_tokens,
            n_loss_tokens=n_loss_tokens,
            firing_frequency=(self.fired.double() / n_tokens).float(),
        )


@torch.no_grad()
def evaluate_many(
    saes: Mapping[str, SAE[Any]],
    language_model: LanguageModel,
    hook_names: str | Mapping[str, str],
    texts: Sequence[str],
    *,
    context_size: int = 128,
    batch_size: int = 16,
    max_tokens: int | None = None,
    max_loss_tokens: int | None = None,
    exclude_special: bool = True,
    prepend_bos: bool = True,
    autocast: bool = False,
    observer: Callable[[LatentBatch], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, HeldoutMetrics]:
    """Evaluate SAEs on the same held-out tokens; the model's own passes are shared by all of them.

    SAEs are exported ones, or training SAEs in eval mode. `max_tokens` counts special ones too. The
    losses, which cost three passes and one more per SAE, are measured on `max_loss_tokens` of them,
    rounded up to a whole batch. `progress` is called with the number of tokens since its last call.
    """
    require_texts(texts)
    hooks = dict.fromkeys(saes, hook_names) if isinstance(hook_names, str) else hook_names
    for name in saes:
        if name not in hooks:
            raise InputError(f"hook_names: no hook for the SAE {name!r}; name one for each SAE")
    measured = [_Measured(name, sae, hooks[name], observer) for name, sae in saes.items()]
    model, tokenizer = language_model.model, language_model.tokenizer
    special = torch.tensor(get_special_token_ids(tokenizer) if exclude_special else [])
    tails = {each.hook: Tail(model, each.hook, autocast=autocast) for each in measured}
    words = Words(tokenizer)
    ce_clean, ce_zero = 0.0, dict.fromkeys(tails, 0.0)
    n_tokens = n_loss_tokens = tokens_seen = windows_seen = 0
    loss_budget = float("inf") if max_loss_tokens is None else max_loss_tokens
    limit = None if max_tokens is None else max(1, max_tokens // context_size)
    size = max(1, min(batch_size, LOGIT_ELEMENTS // (context_size * len(tokenizer))))
    if max_loss_tokens is not None:
        # Losses are measured on whole batches: a larger one would cost more than was asked for.
        size = min(size, max(1, -(-max_loss_tokens // context_size)))
    windows = iterate_windows(model, tokenizer, texts, context_size, prepend_bos=prepend_bos)
    for batch in batched_windows(islice(windows, limit), size):
        tokens = torch.stack([window.tokens for window in batch])
        documents = torch.stack([window.documents for window in batch])
        kept = ~torch.isin(tokens, special)
        clean_logits = None
        if tokens_seen < loss_budget:
            clean_logits, activations = logits_and_activations(
                model, tokens, list(tails), autocast=autocast
            )
        else:
            activations = activations_at(model, tokens, list(tails), autocast=autocast)

        words_kept = words.of(tokens[kept])
        reconstructions = [
            each.reconstruct(activations[each.hook], kept, words_kept, documents, windows_seen)
            for each in measured
        ]
        n_tokens += int(kept.sum())
        if clean_logits is not None:
            positions = predicting_positions(kept)
            n_loss_tokens += positions.numel()
            ce_clean += summed_losses(clean_logits, tokens, positions)[0]
            for hook, tail in tails.items():
                own = activations[hook]
                if tokens_seen == 0:
                    tail.check(own, clean_logits)
                logits = tail.logits(tokens, torch.zeros_like(own), kept, own)
                ce_zero[hook] += summed_losses(logits, tokens, positions)[0]
            for each, sae_out in zip(measured, reconstructions, strict=True):
                logits = tails[each.hook].logits(tokens, sae_out, kept, activations[each.hook])
                cross_entropy, kl = summed_losses(logits, tokens, positions, clean_logits)
                each.cross_entropy += cross_entropy
                each.kl += kl
        tokens_seen += tokens.numel()
        windows_seen += len(batch)
        if progress is not None:
            progress(tokens.numel())
    if n_tokens == 0 or n_loss_tokens == 0:
        raise InputError(
            f"held-out text: it holds no full window of {context_size} tokens; raise "
            "data.heldout_documents or lower data.context_size"
        )
    zero = {hook: total / n_loss_tokens for hook, total in ce_zero.items()}
    clean = ce_clean / n_loss_tokens
    return {
        each.name: each.metrics(n_tokens, n_loss_tokens, clean, zero[each.hook])
        for each in measured
    }
