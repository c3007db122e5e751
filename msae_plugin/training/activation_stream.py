"""Mixed mini-batches of a language model's activations whose position can be saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from sae_lens.training.activations_store import ActivationsStore
from typing_extensions import Self

from msae_plugin import upstream
from msae_plugin.common.errors import InputError


@runtime_checkable
class Positioned(Protocol):
    """Batches that can go on where they were."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as `torch.load` takes it with `weights_only`; cheap."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position; nothing was read before."""
        ...


class ActivationStream:
    """What SAELens' `get_multi_hook_data_loader` gives, with a position.

    SAELens keeps the mixing buffer inside a generator. Rows stay in it for any number of refills,
    so that they cannot be made anew from a place in the text: they are saved. The text is read
    again up to its place, without the model.
    """

    def __init__(self, store: ActivationsStore, hooks: Sequence[str]) -> None:
        self._store = store
        self._hooks = list(dict.fromkeys(hooks))
        self._sequences = upstream.CountedSequences(store)
        self._passes = upstream.filtered_batches(store)
        self._widths: list[int] = []
        # (rows, sum of d_in), the first `_ready` mini-batches of it mixed and to be served.
        self._rows: torch.Tensor | None = None
        self._ready = 0

    def __iter__(self) -> Self:
        """Itself."""
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        """(mini-batch, d_in) by hook; never ends."""
        while self._ready == 0 or self._rows is None:
            self._refill()
        size = self._store.train_batch_size_tokens
        batch, self._rows = self._rows[:size], self._rows[size:]
        self._ready -= 1
        return dict(zip(self._hooks, batch.split(self._widths, dim=1), strict=True))

    def _refill(self) -> None:
        """One forward pass; `mixing_buffer` of SAELens."""
        store = self._store
        made = next(self._passes)
        self._widths = [made[hook].shape[1] for hook in self._hooks]
        rows = torch.cat([made[hook] for hook in self._hooks], dim=1)
        if self._rows is not None:
            rows = torch.cat([self._rows, rows])
        whole = store.n_batches_in_buffer * store.training_context_size
        if len(rows) >= whole:
            if store.activations_mixing_fraction > 0:
                rows = rows[torch.randperm(len(rows))]
            served = len(rows) - int(whole * store.activations_mixing_fraction)
            self._ready = max(1, served // store.train_batch_size_tokens)
        self._rows = rows

    def state_dict(self) -> dict[str, Any]:
        """The position. The rows are not copied; they are never changed in place."""
        return {
            "rows": self._rows,
            "widths": self._widths,
            "ready": self._ready,
            "sequences": self._sequences.taken,
            "documents": self._store.n_dataset_processed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position."""
        rows = state["rows"]
        self._rows = None if rows is None else rows.to(self._store.device)
        self._widths, self._ready = list(state["widths"]), int(state["ready"])
        for _ in range(int(state["sequences"])):
            if next(self._store.iterable_sequences, None) is None:
                raise InputError(
                    "the text is shorter than when the checkpoint was written: give the same text, "
                    "or start a new run"
                )
        self._store.n_dataset_processed = int(state["documents"])

    def skip_documents(self, count: int) -> None:
        """Begin after so many documents, with an empty buffer."""
        while self._store.n_dataset_processed < count:
            self._store.get_batch_tokens(1, move_to_model_device=False)
