"""Training with several processes, started by torchrun: each has a share of every mini-batch.

    torchrun --nproc-per-node 4 -m msae_plugin train --config X.yaml --output DIR

All ranks hold the same SAEs. Gradients are averaged, and what is computed over the tokens of a
batch is computed over those of all ranks (`architecture.ranks`), so that the weights are those that
one process would have trained on the whole batches, to rounding. Rank 0 alone writes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from sae_lens.config import HfDataset
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
from sae_lens.saes.gated_sae import GatedTrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.standard_sae import StandardTrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE
from safetensors.torch import load_file
from torch import distributed
from typing_extensions import override

from msae_plugin.architecture.calibration import SupportsRanks
from msae_plugin.architecture.ranks import ALONE, ProcessRanks, Ranks
from msae_plugin.architecture.selection import batch_top_k
from msae_plugin.common.errors import InputError, RunFailure, first_line
from msae_plugin.common.interruption import InterruptedBySignalError, InterruptionGuard

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A rank that reads a larger share of the text, or saves, may let the others wait for this long.
_PATIENCE = timedelta(minutes=30)
# Their losses are means over tokens; nothing else of theirs depends on the batch but the ranking
# of BatchTopK. Its subclasses may add more: C2R its norms over the batch, LISTA its firing rates.
_BATCHTOPK = (BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE)
_PER_TOKEN = (StandardTrainingSAE, GatedTrainingSAE, JumpReLUTrainingSAE, TopKTrainingSAE)


@contextmanager
def launched_ranks(device: str) -> Generator[Ranks]:
    """The processes that torchrun started, or `ALONE`.

    CUDA tensors go over NCCL, others over gloo; each process takes the device of its local rank.
    """
    if any(name not in os.environ for name in _TORCHRUN) or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    backend = "gloo"
    if device == "mps":
        raise InputError("model.device mps has one process: start it without torchrun")
    if device != "cpu" and torch.cuda.is_available():
        local, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= here:
            raise InputError(
                f"torchrun started {local + 1} or more processes here and there are {here} CUDA "
                "devices: lower --nproc-per-node, or set model.device to cpu"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        distributed.init_process_group(backend, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RunFailure(
            f"the processes of torchrun do not find each other: {first_line(error)}"
        ) from error
    try:
        yield ProcessRanks()
    finally:
        # Nothing is waited for: on the way out of a failure the others may be gone.
        distributed.destroy_process_group()


def own_share(dataset: HfDataset, ranks: Ranks) -> HfDataset:
    """The documents of a data set that are this rank's, by `datasets`' own rule."""
    if ranks.count == 1:
        return dataset
    node = {"rank": ranks.rank, "world_size": ranks.count}
    if isinstance(dataset, IterableDataset):
        return split_dataset_by_node(dataset, **node)
    assert isinstance(dataset, Dataset), "load_text gives nothing else"
    return split_dataset_by_node(dataset, **node)


def own_batch_size(batch_size: int, ranks: Ranks) -> int:
    """This rank's share of a mini-batch."""
    if batch_size % ranks.count:
        raise InputError(
            f"training.batch_size_tokens = {batch_size} cannot be shared by {ranks.count} "
            f"processes: make it a multiple of {ranks.count}"
        )
    return batch_size // ranks.count


def gathered(
    batches: Iterator[Mapping[str, torch.Tensor]], ranks: Ranks
) -> Iterator[dict[str, torch.Tensor]]:
    """Whole mini-batches, of all ranks' shares; every rank gets the same."""
    for batch in batches:
        yield {hook: ranks.concatenated(rows)[0] for hook, rows in batch.items()}


def states_of_all(state: Mapping[str, Any], ranks: Ranks) -> list[bytes]:
    """What each rank alone knows, as the files that `save_states` writes."""
    buffer = io.BytesIO()
    torch.save(_compact(state), buffer)
    own = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    lengths = ranks.concatenated(torch.tensor([len(own)]))[0].tolist()
    parts = ranks.concatenated(own)[0].split(lengths)
    return [part.numpy().tobytes() for part in parts]


def _compact(value: Any) -> Any:
    """The same on the CPU, each tensor without the storage that it is a view of."""
    if isinstance(value, Mapping):
        return {key: _compact(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def save_states(states: Sequence[bytes], folder: Path) -> None:
    """Write the states of all ranks into a checkpoint."""
    for rank, state in enumerate(states):
        (folder / _state_file(rank)).write_bytes(state)


def load_states(folder: Path) -> list[dict[str, Any]]:
    """The states of all ranks that wrote a checkpoint; none in one of version 0.1."""
    states: list[dict[str, Any]] = []
    while (path := folder / _state_file(len(states))).exists():
        states.append(torch.load(path, map_location="cpu", weights_only=True))
    return states


def documents_read(folder: Path, states: Sequence[Mapping[str, Any]]) -> int:
    """How much of the text all ranks together had read when a checkpoint was written."""
    if states:
        return sum(int(state["batches"]["documents"]) for state in states)
    # Version 0.1 kept SAELens' file of each rank.
    name = Path(ACTIVATIONS_STORE_STATE_FILENAME)
    return sum(
        int(load_file(path)["n_dataset_processed"])
        for path in folder.glob(f"{name.stem}*{name.suffix}")
    )


def _state_file(rank: int) -> str:
    return f"session_state.rank{rank}.pt"


def same_weights_everywhere(saes: Mapping[str, TrainingSAE[Any]], ranks: Ranks) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if ranks.count == 1:
        return
    with torch.no_grad():
        for sae in saes.values():
            for tensor in sae.state_dict().values():
                tensor.copy_(ranks.first(tensor))


def stop_together(guard: InterruptionGuard, ranks: Ranks) -> None:
    """Raise InterruptedBySignalError on every rank when a signal has arrived at one of them."""
    if ranks.count == 1:
        guard.check()
        return
    number = int(ranks.largest(torch.tensor(guard.requested or 0)))
    if number:
        raise InterruptedBySignalError(number)


def share_batches(sae: TrainingSAE[Any], name: str, ranks: Ranks) -> None:
    """Let an SAE compute what depends on the batch over the batches of all ranks.

    Refuses an architecture that is not known to give the same weights on several ranks.
    """
    if isinstance(sae, SupportsRanks):
        sae.attach_ranks(ranks)
    elif type(sae) in _BATCHTOPK:
        assert isinstance(sae, BatchTopKTrainingSAE)
        _share_batchtopk(sae, ranks)
    elif ranks.count == 1:
        return
    elif isinstance(sae, BatchTopKTrainingSAE) or not isinstance(sae, _PER_TOKEN):
        raise InputError(
            f"SAE {name!r}: architecture {sae.cfg.architecture()!r} is not known to train to the "
            "same weights on several processes: train it without torchrun"
        )


def _share_batchtopk(sae: BatchTopKTrainingSAE, ranks: Ranks) -> None:
    vars(sae).pop("update_topk_threshold", None)
    if isinstance(sae.activation_fn, _BatchTopKOverRanks):
        sae.activation_fn = sae.get_activation_fn()
    if ranks.count == 1:
        return
    update = sae.update_topk_threshold

    def update_over_ranks(acts_topk: torch.Tensor) -> None:
        positive = acts_topk[acts_topk > 0]
        lowest = positive.min() if positive.numel() else acts_topk.new_tensor(torch.inf)
        lowest = ranks.smallest(lowest)
        update(torch.where(torch.isfinite(lowest), lowest, 0)[None])

    sae.activation_fn = _BatchTopKOverRanks(float(sae.cfg.k), ranks)
    sae.update_topk_threshold = update_over_ranks


class _BatchTopKOverRanks(BatchTopK):
    """SAELens' BatchTopK over the pre-activations of all ranks."""

    def __init__(self, k: float, ranks: Ranks) -> None:
        super().__init__(k)
        self._ranks = ranks

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chosen = batch_top_k(flat.detach(), flat.detach(), self.k, [], ranks=self._ranks)
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept[chosen.tokens, chosen.latents] = True
        return x.relu() * kept.reshape(x.shape)
