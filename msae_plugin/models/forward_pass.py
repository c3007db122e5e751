"""Running the language model: read activations at hooks, or put other values in their place.

Works for TransformerLens' `HookedTransformer` and `TransformerBridge`
(`blocks.9.hook_resid_post`), and for SAELens' `HookedProxyLM` (`model.layers.9`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from transformer_lens.model_bridge import TransformerBridge

# Logits of a pass that starts in the middle against those of a whole one, relative. The same
# operations on the same shapes: 0 was measured in float32.
TAIL_TOLERANCE = 1e-5


def input_device(model: torch.nn.Module) -> torch.device:
    """The device that tokens go to: that of the model's first parameter (the embedding)."""
    return next(model.parameters()).device


def autocast_context(device: torch.device, enabled: bool) -> torch.autocast:
    """bfloat16 autocast for the language model; SAEs are always kept out of it.

    Measured with SmolLM2-135M: error 1e-4 of the variance; 3.1x faster than float32 on a CPU with
    bfloat16 instructions, 6.5x slower on one without (see `faster_in_bfloat16`).
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def stop_layer(hook_names: Sequence[str]) -> int | None:
    """The layer to stop before so that all hooks have run; None runs the whole model."""
    stops = [extract_stop_at_layer_from_tlens_hook_name(hook) for hook in hook_names]
    known = [stop for stop in stops if stop is not None]
    return max(known) if len(known) == len(stops) else None


def starts_in_the_middle(model: Any) -> bool:
    """Whether a pass can begin at a layer: the Hugging Face model behind a bridge has no way in."""
    return not isinstance(model, TransformerBridge)


def tail_start(hook_name: str) -> int | None:
    """The layer from which the model can be run when the hook's activations are known.

    None where they do not determine the rest (an MLP's or a head's output): then every pass begins
    with the tokens.
    """
    parts = hook_name.split(".")
    if len(parts) != 3 or parts[0] != "blocks" or not parts[1].isdecimal():
        return None
    return {"hook_resid_post": int(parts[1]) + 1, "hook_resid_pre": int(parts[1])}.get(parts[2])


@torch.no_grad()
def activations_at(
    model: Any, tokens: torch.Tensor, hook_names: Sequence[str], *, autocast: bool = False
) -> dict[str, torch.Tensor]:
    """Activations at the hooks, running no layer beyond the last of them.

    (batch, seq) tokens give (batch, seq, d_in) float32 by hook; a head dimension is flattened as in
    SAELens.
    """
    device = input_device(model)
    with autocast_context(device, autocast):
        cache = model.run_with_cache(
            tokens.to(device),
            names_filter=list(hook_names),
            stop_at_layer=stop_layer(hook_names),
            prepend_bos=False,
        )[1]
    return {hook: cache[hook].flatten(2).float() for hook in hook_names}


def faster_in_bfloat16(model: Any, hook_names: Sequence[str]) -> bool:
    """Whether bfloat16 autocast speeds this model up on its device, measured on 64 tokens.

    No public torch call says whether a CPU has bfloat16 instructions; without them autocast is
    correct but several times slower. Takes about two seconds for SmolLM2-135M on two cores.
    """
    tokens = torch.zeros((1, 64), dtype=torch.long)
    seconds: dict[bool, float] = {}
    for autocast in (False, True):
        for _ in range(2):  # the first pass also prepares kernels; the second one counts
            started = time.perf_counter()
            activations = activations_at(model, tokens, hook_names, autocast=autocast)
            # Reading a value waits for the device.
            float(next(iter(activations.values())).sum())
            seconds[autocast] = time.perf_counter() - started
    return seconds[True] < seconds[False]


@torch.no_grad()
def logits_and_activations(
    model: Any, tokens: torch.Tensor, hook_names: Sequence[str], *, autocast: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The unchanged model: logits (batch, seq, vocabulary) and what `activations_at` returns."""
    captured: dict[str, torch.Tensor] = {}

    def capture(name: str) -> Callable[..., torch.Tensor]:
        def hook_fn(activations: torch.Tensor, hook: Any) -> torch.Tensor:
            del hook  # TransformerLens passes it by keyword
            captured[name] = activations.flatten(2).float()
            return activations

        return hook_fn

    device = input_device(model)
    with autocast_context(device, autocast):
        logits: torch.Tensor = model.run_with_hooks(
            tokens.to(device),
            return_type="logits",
            fwd_hooks=[(hook, capture(hook)) for hook in hook_names],
        )
    return logits, captured


@torch.no_grad()
def logits_with_replacement(
    model: Any,
    tokens: torch.Tensor,
    hook_name: str,
    values: torch.Tensor,
    where: torch.Tensor,
    *,
    autocast: bool = False,
) -> torch.Tensor:
    """Logits when the activations at a hook are `values` at the positions `where`.

    `values` (batch, seq, d_in) are cast to the activations' dtype; the positions are (batch, seq)
    bool, and the others keep the model's own activations.
    """

    def replace(activations: torch.Tensor, hook: Any) -> torch.Tensor:
        del hook  # TransformerLens passes it by keyword
        flat = activations.flatten(2)
        written = torch.where(
            where.to(flat.device)[..., None], values.to(flat.device, flat.dtype), flat
        )
        return written.reshape(activations.shape)

    device = input_device(model)
    with autocast_context(device, autocast):
        logits: torch.Tensor = model.run_with_hooks(
            tokens.to(device), return_type="logits", fwd_hooks=[(hook_name, replace)]
        )
    return logits


class Tail:
    """Logits with other values at a hook: only the layers after it run, where that is the same.

    A hook on the residual stream determines the rest of the model; with the hook at a third of the
    depth a pass costs three quarters of a whole one, most of it in the unembedding.

    Attributes:
        start: The layer that a pass begins at; None where it begins with the tokens.
    """

    def __init__(self, model: Any, hook_name: str, *, autocast: bool = False) -> None:
        self._model, self._hook_name, self._autocast = model, hook_name, autocast
        self.start = tail_start(hook_name) if starts_in_the_middle(model) else None

    @torch.no_grad()
    def check(self, own: torch.Tensor, clean_logits: torch.Tensor) -> bool:
        """Start in the middle only if it gives what the whole model gave; whether it does.

        `own` are the model's own activations at the hook, (batch, seq, d_in).
        """
        if self.start is None:
            return False
        error = (self._from_the_middle(own, self.start) - clean_logits).abs().max()
        same = float(error) <= TAIL_TOLERANCE * float(clean_logits.abs().max())
        if not same:
            self.start = None
        return same

    def everywhere(self, tokens: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Logits when the hook gives `values`, (batch, seq, ...), at all tokens."""
        own = values.flatten(2)
        return self.logits(tokens, own, torch.ones_like(tokens, dtype=torch.bool), own)

    @torch.no_grad()
    def logits(
        self, tokens: torch.Tensor, values: torch.Tensor, where: torch.Tensor, own: torch.Tensor
    ) -> torch.Tensor:
        """As `logits_with_replacement`.

        `own` are the model's own activations at the hook, (batch, seq, d_in).
        """
        if self.start is None:
            return logits_with_replacement(
                self._model, tokens, self._hook_name, values, where, autocast=self._autocast
            )
        keep = where.to(own.device)[..., None]
        return self._from_the_middle(torch.where(keep, values.to(own), own), self.start)

    def _from_the_middle(self, residual: torch.Tensor, start: int) -> torch.Tensor:
        device = input_device(self._model)
        dtype = next(self._model.parameters()).dtype
        with autocast_context(device, self._autocast):
            return self._model(residual.to(device, dtype), start_at_layer=start)
