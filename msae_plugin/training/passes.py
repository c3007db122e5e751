"""Training sessions of `msae train`: on one pass of the language model, or on a cache."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_lens import logger as sae_lens_logger
from sae_lens.config import HfDataset
from sae_lens.multi_sae_training_runner import (
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.saes.sae import TrainingSAE
from typing_extensions import override

from msae_plugin import upstream
from msae_plugin.common.errors import InputError
from msae_plugin.common.interruption import InterruptionGuard
from msae_plugin.common.progress import ProgressDisplay
from msae_plugin.data.text import TextData
from msae_plugin.models.loading import LanguageModel
from msae_plugin.training.activation_store import (
    PLACEHOLDER,
    CachedActivations,
    CachedBatches,
    norm_batches,
)
from msae_plugin.training.activation_stream import ActivationStream
from msae_plugin.training.data_parallel import documents_read, own_batch_size, own_share
from msae_plugin.training.log import MetricsLog
from msae_plugin.training.plans import SAEPlan, build_sae
from msae_plugin.training.recipe import RunConfig
from msae_plugin.training.session import (
    SessionSettings,
    TrainingSession,
    shared_settings,
    whole_steps,
)


class _NotAboutUs(logging.Filter):
    """Drops SAELens' remarks that a run with a given model or data set cannot be reproduced.

    They are about its own configuration; `run.json` holds ours.
    """

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("override_dataset", "override_model"))


@contextmanager
def _without_upstream_remarks() -> Generator[None]:
    remark_filter = _NotAboutUs()
    sae_lens_logger.addFilter(remark_filter)
    try:
        with warnings.catch_warnings():
            # Text is tokenised on the fly on purpose, and SAELens compares documents with tokens.
            warnings.filterwarnings("ignore", message="Dataset is not tokenized")
            warnings.filterwarnings("ignore", message="The training dataset contains fewer")
            yield
    finally:
        sae_lens_logger.removeFilter(remark_filter)


def shared_pass_config(
    config: RunConfig,
    plans: Sequence[SAEPlan],
    model: LanguageModel | CachedActivations,
    device: str,
    *,
    autocast: bool,
) -> MultiSAETrainingRunnerConfig:
    """SAELens' configuration of the run that a recipe describes."""
    training, data = config.training, config.data
    return MultiSAETrainingRunnerConfig(
        saes={plan.name: plan.config for plan in plans},
        hook_names={plan.name: plan.hook for plan in plans},
        model_name=model.model_name,
        model_class_name=model.model_class_name,
        # SAELens' own default centres the writing weights, which ours are not.
        model_from_pretrained_kwargs={},
        # Part of every exported cfg.json: a local corpus is named, its place is not told.
        dataset_path=Path(data.source).name if Path(data.source).exists() else data.source,
        streaming=data.streaming,
        context_size=data.context_size,
        prepend_bos=data.prepend_bos,
        exclude_special_tokens=data.exclude_special_tokens,
        n_batches_in_buffer=training.n_batches_in_buffer,
        store_batch_size_prompts=training.store_batch_size_prompts,
        activations_mixing_fraction=training.activations_mixing_fraction,
        training_tokens=whole_steps(training),
        train_batch_size_tokens=training.batch_size_tokens,
        device=device,
        seed=training.seed,
        dtype="float32",
        autocast_lm=autocast,
        # Exports are ours as well.
        output_path=None,
        **shared_settings(training),
    )


class RecipeSession(TrainingSession):
    """Trains the SAEs of a recipe of `msae train`."""

    cfg: MultiSAETrainingRunnerConfig
    config: RunConfig

    @override
    def described(self) -> dict[str, Any]:
        return self.config.to_dict()

    @override
    def runner_config(self) -> dict[str, Any]:
        return self.cfg.to_dict()


class SharedPassRunner(RecipeSession, MultiSAETrainingRunner):
    """SAELens' multi-SAE runner with our training: one pass of the language model for all SAEs."""

    def __init__(
        self,
        config: RunConfig,
        settings: SessionSettings,
        *,
        dataset: HfDataset,
        language_model: LanguageModel,
        saes: dict[str, TrainingSAE[Any]],
        autocast: bool,
    ) -> None:
        self.config = config
        ranks = settings.ranks
        cfg = shared_pass_config(
            config, settings.plans, language_model, settings.device, autocast=autocast
        )
        own_batch = own_batch_size(cfg.train_batch_size_tokens, ranks)
        with _without_upstream_remarks():
            try:
                MultiSAETrainingRunner.__init__(
                    self,
                    replace(cfg, train_batch_size_tokens=own_batch),
                    override_dataset=own_share(dataset, ranks),
                    override_model=language_model.model,
                    override_saes=saes,
                )
            except StopIteration as error:
                raise InputError("the data set has no documents left for training") from error
        # Of the whole run, whatever the number of ranks.
        self.cfg = cfg
        upstream.set_sae_metadata(self)
        hooks = [plan.hook for plan in settings.plans]
        self._batches = ActivationStream(self.activations_store, hooks)
        TrainingSession.__init__(self, settings, self.saes, self._batches)

    @override
    def approach(self, folder: Path, states: Sequence[Mapping[str, Any]]) -> None:
        # It says how much of the text was read, not which documents are this rank's.
        read = documents_read(folder, states)
        self._batches.skip_documents(read // self.settings.ranks.count)


class CachedPass(RecipeSession):
    """Trains all SAEs of a recipe on the rows of a cache that was checked against it."""

    def __init__(
        self,
        cache: CachedActivations,
        config: RunConfig,
        settings: SessionSettings,
        *,
        saes: dict[str, TrainingSAE[Any]],
    ) -> None:
        plans, device = settings.plans, settings.device
        self.config = config
        self.cfg = shared_pass_config(config, plans, cache, device, autocast=cache.autocast)
        self.saes = {name: sae.to(device) for name, sae in saes.items()}
        upstream.set_sae_metadata(self)
        self._batches = CachedBatches(
            cache,
            [plan.hook for plan in plans],
            config.training.batch_size_tokens,
            device,
            settings.ranks,
        )
        self._before_training = norm_batches(config, plans)
        TrainingSession.__init__(self, settings, self.saes, self._batches)

    @override
    def approach(self, folder: Path, states: Sequence[Mapping[str, Any]]) -> None:
        # A checkpoint carries the scaling: the batches it was estimated on are not read again.
        steps = self.trainer.n_training_steps * self.config.training.accumulation_steps
        self._batches.position = self._before_training + steps


def reading_runner(
    config: RunConfig,
    language_model: LanguageModel,
    text: TextData,
    device: str,
    *,
    autocast: bool,
    guard: InterruptionGuard,
    progress: ProgressDisplay,
) -> SharedPassRunner:
    """A runner that makes the batches of `msae train` and trains nothing."""
    # SAELens' runner wants an SAE.
    config = replace(config, sae=PLACEHOLDER, saes=None)
    plans = config.validate(language_model.shape)
    return SharedPassRunner(
        config,
        SessionSettings(
            plans=plans,
            training=config.training,
            device=device,
            seed=config.training.seed,
            log_every=config.logging.every_steps,
            guard=guard,
            progress=progress,
            folders={},
            store=None,
            metrics=MetricsLog([]),
        ),
        dataset=text.train,
        language_model=language_model,
        saes={plan.name: build_sae(plan, 0, device) for plan in plans},
        autocast=autocast,
    )
