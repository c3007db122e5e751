"""The one place where private names of SAELens and TransformerLens are touched.

Each wrapper says which upstream name it stands for and why no public one does. A change upstream
fails `tests/test_upstream_canary.py` loudly instead of a training run quietly.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

_SHIPPED = frozenset(OFFICIAL_MODEL_NAMES)


def shipped_with_transformer_lens(name: str) -> bool:
    """Whether HookedTransformer loads a model by this name or alias, nothing registered before."""
    return official_transformer_lens_name(name) in _SHIPPED


def known_transformer_lens_names() -> list[str]:
    """The hub names that TransformerLens loads, as it lists them at this moment."""
    return list(OFFICIAL_MODEL_NAMES)


def official_transformer_lens_name(name: str) -> str | None:
    """The hub name behind a name or alias of TransformerLens (`gpt2-small` is `gpt2`)."""
    for official in OFFICIAL_MODEL_NAMES:
        if name.lower() in map(str.lower, (official, *MODEL_ALIASES.get(official, []))):
            return official
    return None


def register_transformer_lens_name(name: str) -> None:
    """Let TransformerLens, and with it SAELens and SAEBench, load a hub model by this name.

    Appends to `transformer_lens.supported_models.OFFICIAL_MODEL_NAMES`, a public list that
    TransformerLens reads at every call and has no function to extend. Calling twice is harmless.
    """
    if name not in OFFICIAL_MODEL_NAMES:
        OFFICIAL_MODEL_NAMES.append(name)


@contextmanager
def transformer_lens_name_registered(name: str) -> Generator[None, None, None]:
    """Let TransformerLens accept a name inside the `with` block; one it knows stays known."""
    known = name in OFFICIAL_MODEL_NAMES
    register_transformer_lens_name(name)
    try:
        yield
    finally:
        if not known:
            OFFICIAL_MODEL_NAMES.remove(name)


@contextmanager
def transformer_lens_config_given(fields: Mapping[str, Any] | None) -> Generator[None, None, None]:
    """Let TransformerLens take a model's configuration from `fields`, not from the model's name.

    Replaces `transformer_lens.loading_from_pretrained.convert_hf_model_config` inside the `with`
    block: `from_pretrained` has no argument for it. None leaves TransformerLens' own.
    """
    from transformer_lens import loading_from_pretrained  # transformer-lens 4 has no such module

    own = loading_from_pretrained.convert_hf_model_config

    def given(model_name: str, **_: Any) -> dict[str, Any]:
        return {**(fields or {}), "tokenizer_name": model_name}

    if fields is not None:
        loading_from_pretrained.convert_hf_model_config = given
    try:
        yield
    finally:
        loading_from_pretrained.convert_hf_model_config = own


@contextmanager
def files_from(folder: Path, names: Mapping[str, str] | None = None) -> Generator[None, None, None]:
    """Let SAELens' converters of other formats read a local folder in place of the Hub.

    Replaces `hf_hub_download` in `sae_lens.loading.pretrained_sae_loaders` inside the `with` block:
    the converters take a repository, and only two of them a folder. `names` renames files.
    """
    own = pretrained_sae_loaders.hf_hub_download

    def local(*_: Any, filename: str, **__: Any) -> str:
        name = Path(filename).name
        return str(folder / (names or {}).get(name, name))

    pretrained_sae_loaders.hf_hub_download = local
    try:
        yield
    finally:
        pretrained_sae_loaders.hf_hub_download = own


def estimate_scaling_factors(trainer: MultiSAETrainer) -> None:
    """Estimate the activation scaling of every SAE that needs one, from shared batches.

    Stands for `MultiSAETrainer._estimate_scaling_factors`: the public `fit` calls it, and ours
    replaces `fit`.
    """
    trainer._estimate_scaling_factors()  # pyright: ignore[reportPrivateUsage]


def filtered_batches(store: ActivationsStore) -> Iterator[dict[str, torch.Tensor]]:
    """Activations of one forward pass after another, (tokens, d_in) by hook, not mixed yet.

    Stands for `ActivationsStore._iterate_filtered_multi_hook_activations`: the public
    `get_multi_hook_data_loader` puts it into a mixing buffer whose contents nobody can save.
    """
    return store._iterate_filtered_multi_hook_activations()  # pyright: ignore[reportPrivateUsage]


class CountedSequences:
    """The token sequences of a store, counted since the text began (anew).

    Stands for `ActivationsStore._iterate_tokenized_sequences`, which the store calls at the
    beginning of every epoch. Its own `n_dataset_processed` counts documents, and many sequences
    come out of one.

    Attributes:
        taken: How many were taken in this epoch.
    """

    def __init__(self, store: ActivationsStore) -> None:
        self._epoch = store._iterate_tokenized_sequences  # pyright: ignore[reportPrivateUsage]
        store._iterate_tokenized_sequences = self._begin  # pyright: ignore[reportPrivateUsage]
        store.iterable_sequences = self._begin()
        self.taken = 0

    def _begin(self) -> Generator[torch.Tensor]:
        self.taken = 0
        return self._counted()

    def _counted(self) -> Generator[torch.Tensor]:
        for sequence in self._epoch():
            self.taken += 1
            yield sequence


class HasSAEsAndConfig(Protocol):
    """What SAELens' runner reads when it writes metadata."""

    cfg: MultiSAETrainingRunnerConfig
    saes: dict[str, TrainingSAE[Any]]


def set_sae_metadata(runner: HasSAEsAndConfig) -> None:
    """Write model, hook, context size and data set into every SAE's metadata.

    Stands for `MultiSAETrainingRunner._set_sae_metadata`: the public `run` calls it, and ours
    replaces `run`. It reads the configuration and the SAEs only, so that it serves where batches
    come from a cache, without a runner of SAELens', as well.
    """
    MultiSAETrainingRunner._set_sae_metadata(  # pyright: ignore[reportPrivateUsage]
        cast(MultiSAETrainingRunner, runner)
    )
