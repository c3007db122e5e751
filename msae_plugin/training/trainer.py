"""SAELens' trainer of several SAEs in lockstep, with what a long run needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from typing_extensions import override

from msae_plugin import upstream
from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.common.errors import InputError, first_line
from msae_plugin.common.interruption import InterruptionGuard
from msae_plugin.common.seeding import RandomStream, derive_seed
from msae_plugin.training.data_parallel import (
    gathered,
    same_weights_everywhere,
    share_batches,
    stop_together,
)
from msae_plugin.training.step_trainer import StepOptions, StepTrainer, fold_centre


@runtime_checkable
class Positioned(Protocol):
    """Batches that can go on where they were."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as `torch.load` takes it with `weights_only`; cheap."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position; nothing was read before."""


class LockstepTrainer(MultiSAETrainer):
    """SAELens' trainer of several SAEs on one stream of activations, over our `StepTrainer`s.

    `total_training_samples` of cfg is a multiple of one step's tokens, `train_batch_size_samples`
    the size of a mini-batch over all ranks. The provider yields this rank's share of a mini-batch,
    (tokens, d_in) by hook. `options` are of all SAEs, or by name. Each SAE's and the data's
    randomness is derived from the seed of the run. A checkpoint is due `checkpoint_seconds` after
    the last, whatever the position.
    """

    step_trainers: dict[str, StepTrainer]

    def __init__(
        self,
        cfg: SAETrainerConfig,
        saes: Mapping[str, TrainingSAE[Any]],
        hook_names: Mapping[str, str],
        data_provider: Iterator[dict[str, torch.Tensor]],
        *,
        options: StepOptions | Mapping[str, StepOptions],
        seed: int = 0,
        log_every: int = 50,
        guard: InterruptionGuard | None = None,
        on_step: Callable[[LockstepTrainer], None] | None = None,
        on_log: Callable[[str, dict[str, float]], None] | None = None,
        on_checkpoint: Callable[[], object] | None = None,
        checkpoint_seconds: float | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(
            cfg=cfg, saes=dict(saes), hook_names=dict(hook_names), data_provider=data_provider
        )
        each = options if isinstance(options, Mapping) else dict.fromkeys(saes, options)
        self.ranks = ranks
        # Mini-batches are shared by all SAEs.
        (self._accumulation_steps,) = {item.accumulation_steps for item in each.values()}
        self.tokens_per_step = cfg.train_batch_size_samples * self._accumulation_steps
        self.total_steps = cfg.total_training_samples // self.tokens_per_step
        self._log_every = log_every
        self._guard = guard or InterruptionGuard()
        self._on_step = on_step
        self._on_log = on_log
        self._on_checkpoint = on_checkpoint
        self._checkpoint_seconds = checkpoint_seconds
        self._checkpoint_at = time.monotonic()
        self._seed = seed
        self._data_stream = RandomStream(derive_seed(seed, "data"))
        self.step_trainers = {
            name: self._step_trainer(name, sae, each[name]) for name, sae in self.saes.items()
        }
        # Under SAELens' name and type as well: its public methods look there.
        self.trainers = {**self.step_trainers}
        self._logged = time.perf_counter(), 0  # When the last row was, and at how many tokens
        self._between_steps = self.position()

    def _step_trainer(self, name: str, sae: TrainingSAE[Any], options: StepOptions) -> StepTrainer:
        cfg = self.cfg
        lr = cfg.lr if options.lr is None else options.lr
        # lr_end scales with the SAE's own rate, so that all schedules have the same shape.
        lr_end = None if cfg.lr_end is None else cfg.lr_end * lr / cfg.lr
        own = replace(
            cfg,
            lr=lr,
            lr_end=lr_end,
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
        )
        return StepTrainer(
            own,
            sae,
            name=name,
            options=options,
            total_steps=self.total_steps,
            stream=RandomStream(derive_seed(self._seed, "steps", name), cfg.device),
            ranks=self.ranks,
            one_of_several=len(self.saes) > 1,
        )

    def next_batch(self) -> dict[str, torch.Tensor]:
        """The next mini-batch of every hook, shuffled by the data's own random stream."""
        try:
            with self._data_stream.active(), self._waiting():
                return next(self.data_provider)
        # How SAELens' generators end when even a second epoch gives no full sequence.
        except (StopIteration, RuntimeError, ValueError) as error:
            exhausted = isinstance(error, StopIteration) or isinstance(
                error.__cause__, StopIteration
            )
            if not exhausted and "Unable to fill buffer" not in str(error):
                raise
            raise InputError(
                "the training text is too short to fill one batch of the language model: give "
                "more text, or lower data.context_size or training.store_batch_size_prompts"
            ) from error

    @override
    def fit(self) -> dict[str, TrainingSAE[Any]]:
        """Train to the end; the activation scaling is not folded in yet (see `fold_scaling`).

        A signal raises InterruptedBySignalError between two steps.
        """
        self.prepare_scaling()
        same_weights_everywhere(self.saes, self.ranks)
        self._logged = time.perf_counter(), self.n_training_samples
        self._between_steps = self.position()
        self._checkpoint_at = time.monotonic()
        while self.n_training_samples < self.cfg.total_training_samples:
            stop_together(self._guard, self.ranks)
            self._one_step()
            if self._checkpoint_is_due() and self._on_checkpoint is not None:
                self._on_checkpoint()
                self._checkpoint_at = time.monotonic()
            if self._on_step is not None:
                self._on_step(self)
        return self.saes

    def _checkpoint_is_due(self) -> bool:
        thresholds, done = self.checkpoint_thresholds, self.n_training_samples
        passed = bool(thresholds and done > thresholds[0])
        self.prune_thresholds()
        if self._checkpoint_seconds is None:
            return passed
        late = time.monotonic() - self._checkpoint_at >= self._checkpoint_seconds
        # All ranks take part in a checkpoint, and their clocks differ.
        return bool(self.ranks.first(torch.tensor(late))) or passed

    def prepare_scaling(self) -> None:
        """Estimate each SAE's activation scaling on fresh batches, where it needs one."""
        with self._data_stream.active(), self._waiting():
            own, self.data_provider = self.data_provider, gathered(self.data_provider, self.ranks)
            try:
                upstream.estimate_scaling_factors(self)
            finally:
                self.data_provider = own

    def _waiting(self) -> AbstractContextManager[None]:
        # Of several ranks none may leave by itself: all stop at the same step.
        return self._guard.interruptible() if self.ranks.count == 1 else nullcontext()

    def _one_step(self) -> None:
        for trainer in self.step_trainers.values():
            trainer.maybe_reset_sparsity()
        mini_batches = [self.next_batch() for _ in range(self._accumulation_steps)]
        done = self.n_training_steps + 1
        logging_step = done % self._log_every == 0 or done == self.total_steps
        rows: dict[str, dict[str, float]] = {}
        for name, trainer in self.step_trainers.items():
            trainer.is_logging_step = logging_step
            hook = self.hook_names[name]
            output = trainer.step_on([batch[hook] for batch in mini_batches])
            trainer.n_training_steps += 1
            if logging_step:
                rows[name] = trainer.read_row(output)
        self.n_training_steps = done
        self.n_training_samples = next(iter(self.step_trainers.values())).n_training_samples
        self._between_steps = self.position()
        if logging_step:
            (then, tokens), now = self._logged, time.perf_counter()
            speed = (self.n_training_samples - tokens) / max(now - then, 1e-9)
            self._logged = now, self.n_training_samples
            for name, row in rows.items():
                row["tokens_per_second"] = speed
                if self._on_log is not None:
                    self._on_log(name, row)

    def prune_thresholds(self) -> None:
        """Forget the checkpoints that are due at or before the current position."""
        self.checkpoint_thresholds = [
            threshold
            for threshold in self.checkpoint_thresholds
            if threshold >= self.n_training_samples
        ]

    def leave_ranks(self) -> None:
        """The other processes are needed no more: what follows, this one does alone."""
        self.ranks = ALONE
        for name, trainer in self.step_trainers.items():
            trainer.ranks = ALONE
            share_batches(self.saes[name], name, ALONE)

    def scaled(self, name: str, activations: torch.Tensor) -> torch.Tensor:
        """Raw activations (tokens, d_in) as the SAE's training batches see them."""
        sae = self.saes[name]
        return self.step_trainers[name].activation_scaler(activations.to(sae.device, sae.dtype))

    def fold_scaling(self) -> None:
        """Fold each SAE's activation scaling into its weights and record the final statistics."""
        for name, trainer in self.step_trainers.items():
            scaler = trainer.activation_scaler
            if scaler.scaling_factor is not None:
                self.saes[name].fold_activation_norm_scaling_factor(scaler.scaling_factor)
                scaler.scaling_factor = None
            fold_centre(self.saes[name], scaler)
            if scaler.whitening is not None:
                self.saes[name].fold_activation_whitening(
                    mean=scaler.whitening.mean,
                    whitening_matrix=scaler.whitening.matrix,
                    unwhitening_matrix=scaler.whitening.inverse_matrix,
                )
                scaler.whitening = None
            trainer.set_final_sae_metadata()

    def position(self) -> dict[str, Any]:
        """Where the batches and their random numbers are now."""
        batches = self.data_provider
        return {
            "random": self._data_stream.state_dict(),
            "batches": batches.state_dict() if isinstance(batches, Positioned) else None,
        }

    def go_to(self, position: Mapping[str, Any]) -> None:
        """Take the next batch from a position; none was taken yet."""
        self._data_stream.load_state_dict(position["random"])
        if isinstance(self.data_provider, Positioned):
            self.data_provider.load_state_dict(position["batches"])
        self._between_steps = self.position()

    def state_dict(self) -> dict[str, Any]:
        """What this rank knows beside `write_checkpoint`, as of the last whole step.

        A signal may have come while the next batch was made.
        """
        saes = {name: trainer.state_dict() for name, trainer in self.step_trainers.items()}
        return {**self._between_steps, "saes": saes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, after `load_checkpoint`."""
        for name, trainer in self.step_trainers.items():
            trainer.load_state_dict(state["saes"][name])
        self.go_to(state)

    def write_checkpoint(self, folder: Path) -> None:
        """Write every SAE's weights and trainer state into `folder`, one sub-folder each."""
        for name, trainer in self.step_trainers.items():
            trainer.save_checkpoint(checkpoint_name=name, base_path=folder)

    @override
    def load_checkpoint(self, path: str | Path) -> None:
        """Continue from a checkpoint's weights, optimisers and schedules.

        Random numbers continue in new streams derived from the step, where `load_state_dict` does
        not follow: with the checkpoint of another number of ranks, or of version 0.1.
        """
        for name, trainer in self.step_trainers.items():
            folder = Path(path) / name
            if not folder.is_dir():
                raise InputError(f"checkpoint {str(path)!r} has no SAE {name!r}")
            try:
                trainer.load_trainer_state(folder)
                trainer.sae.load_weights_from_checkpoint(folder)
            # Damage surfaces as any of a dozen types out of pickle, zip, JSON and safetensors.
            except Exception as error:
                raise InputError(
                    f"checkpoint folder {str(folder)!r} cannot be read "
                    f"({type(error).__name__}: {first_line(error)}): "
                    "resume from another checkpoint"
                ) from error
            trainer.stream = RandomStream(
                derive_seed(self._seed, "steps", name, str(trainer.n_training_steps)),
                self.cfg.device,
            )
        first = next(iter(self.step_trainers.values()))
        self.n_training_steps = first.n_training_steps
        self.n_training_samples = first.n_training_samples
        self._data_stream = RandomStream(
            derive_seed(self._seed, "data", str(self.n_training_steps))
        )
        self.prune_thresholds()
