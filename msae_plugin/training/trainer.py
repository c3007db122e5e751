"""SAELens' trainer for one SAE and for several in lockstep, with what a long run needs.

Without any option the arithmetic is SAELens' own, bit for bit (tests/training/test_trainer.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import SAETrainer
from typing_extensions import override

from msae_plugin import upstream
from msae_plugin.architecture.calibration import SupportsRevival
from msae_plugin.architecture.kernels.decoding import MachineSettings
from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.architecture.training_sae import MultiScaleTrainingSAE
from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.interruption import InterruptionGuard
from msae_plugin.common.seeding import RandomStream, derive_seed
from msae_plugin.training.data_parallel import (
    gathered,
    same_weights_everywhere,
    share_batches,
    stop_together,
)
from msae_plugin.training.input_normalization import CentringScaler, fold_centre
from msae_plugin.training.log import TrainingWindow, latent_statistics, scalar
from msae_plugin.training.schedules import GradientRateConfig, LearningRateRule, build_optimiser

RULES_FILE = "learning_rate_rule.pt"


@runtime_checkable
class Positioned(Protocol):
    """Batches that can go on where they were."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as `torch.load` takes it with `weights_only`; cheap."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position; nothing was read before."""


@dataclass(frozen=True)
class StepOptions:
    """Options of our step beyond SAELens'."""

    accumulation_steps: int = 1  # Mini-batches whose mean gradient makes one step
    weight_decay: float = 0.0  # AdamW's decay of the dictionaries; 0 is SAELens' Adam
    # Largest gradient norm over all parameters; None does not clip
    clip_grad_norm: float | None = 1.0
    lr_floor: float = 0.0  # The learning rate never falls below it after the warm-up
    gradient_lr: GradientRateConfig = field(default_factory=GradientRateConfig)
    # Activations are centred and scaled by the first batch, for an SAE that does not do it itself
    centres_inputs: bool = False
    machine: MachineSettings = field(default_factory=MachineSettings)


class StepTrainer(SAETrainer[TrainingSAE[Any], Any]):
    """SAELens' trainer of one SAE, with the options of `StepOptions` and a metrics window.

    `train_batch_size_samples` of cfg is the size of one mini-batch. The stream of the SAE's own
    random numbers is the same on all ranks. With other SAEs taking their steps in turn
    (`one_of_several`), a step on a GPU waits for theirs to end before its own time is taken.
    """

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: TrainingSAE[Any],
        *,
        name: str,
        options: StepOptions,
        total_steps: int,
        stream: RandomStream,
        ranks: Ranks = ALONE,
        one_of_several: bool = False,
    ) -> None:
        super().__init__(cfg=cfg, sae=sae, data_provider=iter(()))
        self.name = name
        self.options = options
        self.stream = stream
        self.ranks = ranks
        self._waits_for_device = one_of_several and sae.device.type == "cuda"
        self.window = TrainingWindow()
        self._start_counting()
        self.seconds = 0.0
        self.session_tokens = 0
        self.gradient_norm = 0.0
        self.learning_rate = 0.0
        self.is_logging_step = False
        if options.weight_decay or options.accumulation_steps > 1:
            # SAELens' own has no decay, and its schedule counts mini-batches, not steps.
            self.optimizer = build_optimiser(  # pyright: ignore[reportAttributeAccessIssue]
                sae,
                lr=cfg.lr,
                betas=(cfg.adam_beta1, cfg.adam_beta2),
                weight_decay=options.weight_decay,
            )
            self.lr_scheduler = get_lr_scheduler(
                cfg.lr_scheduler_name,
                lr=cfg.lr,
                optimizer=self.optimizer,
                warm_up_steps=cfg.lr_warm_up_steps,
                decay_steps=cfg.lr_decay_steps,
                training_steps=total_steps,
                lr_end=cast(float, cfg.lr_end),
                num_cycles=cfg.n_restart_cycles,
            )
        self.rate_rule = LearningRateRule(
            options.gradient_lr, lr_floor=options.lr_floor, warm_up_steps=cfg.lr_warm_up_steps
        )
        if isinstance(sae, SupportsRevival):
            sae.attach_optimizer(self.optimizer)
        if isinstance(sae, MultiScaleTrainingSAE):
            sae.attach_machine(options.machine)
        share_batches(sae, name, ranks)
        if options.centres_inputs:
            self.activation_scaler = CentringScaler()

    @override
    def step(self, batch: torch.Tensor) -> TrainStepOutput:
        """One step on one raw batch of shape (tokens, d_in)."""
        return self.step_on([batch])

    def step_on(self, batches: Sequence[torch.Tensor]) -> TrainStepOutput:
        """One optimiser step on the mean gradient of several raw batches; the last one's output.

        Fails before any weight has changed if the loss or the gradient is not finite.
        """
        started = self._now()
        with self.stream.active():
            self.sae.train()
            outputs = [self._forward_backward(batch, len(batches)) for batch in batches]
            self._update(outputs, batches)
        n_tokens = sum(len(batch) for batch in batches) * self.ranks.count
        self.n_training_samples += n_tokens
        self.session_tokens += n_tokens
        self.seconds += self._now() - started
        return outputs[-1]

    def _now(self) -> float:
        if self._waits_for_device:
            torch.cuda.synchronize(self.sae.device)
        return time.perf_counter()

    def _forward_backward(self, batch: torch.Tensor, n_batches: int) -> TrainStepOutput:
        # The multi-hook store keeps the model's dtype; losses and statistics want the SAE's.
        batch = batch.to(self.sae.device, self.sae.dtype)
        if isinstance(self.activation_scaler, CentringScaler):
            self.activation_scaler.estimate(batch, self.ranks)
        sae_in = self.activation_scaler(batch)
        with self.autocast_if_enabled:
            output = self.sae.training_forward_pass(
                step_input=TrainStepInput(
                    sae_in=sae_in,
                    dead_neuron_mask=self.dead_neurons,
                    coefficients=self.get_coefficients(),
                    n_training_steps=self.n_training_steps,
                    is_logging_step=self.is_logging_step,
                )
            )
            active = self._count_firing(output, len(batch))
        loss = output.loss if n_batches == 1 else output.loss / n_batches
        loss.backward()
        self.window.add(output, active)
        return output

    @torch.no_grad()
    def _count_firing(self, output: TrainStepOutput, n_tokens: int) -> torch.Tensor:
        # As SAELens does it: bool() works for dense and for sparse latents.
        firing = output.feature_acts.bool().float()
        frequency = firing.sum(0)
        if frequency.is_sparse:
            frequency = frequency.to_dense()
        own = frequency.sum()
        frequency = self.ranks.sum(frequency)
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[frequency > 0] = 0
        self.act_freq_scores += frequency
        self.n_frac_active_samples += n_tokens * self.ranks.count
        return own

    def _start_counting(self) -> None:
        """Remember the firing counts, so that the next log row can tell its window's own."""
        firings = self.act_freq_scores
        self._firings_before = firings.clone()
        self._tokens_before = self.n_frac_active_samples

    @override
    def maybe_reset_sparsity(self) -> dict[str, Any]:
        """SAELens' reset of the firing counts at the end of a sampling window."""
        firings, tokens = self.act_freq_scores, self.n_frac_active_samples
        log = super().maybe_reset_sparsity()
        if self.act_freq_scores is not firings:
            self._firings_before = self._firings_before - firings
            self._tokens_before -= tokens
        return log

    def _update(self, outputs: list[TrainStepOutput], batches: Sequence[torch.Tensor]) -> None:
        self.ranks.average_gradients(self.sae.parameters())
        max_norm = self.options.clip_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(
            self.sae.parameters(), math.inf if max_norm is None else max_norm
        )
        # One transfer for everything that must be known before the weights change.
        losses = [output.loss.detach().float() for output in outputs]
        *loss_values, self.gradient_norm = self.ranks.mean(
            torch.stack([*losses, norm.float()])
        ).tolist()
        if not all(map(math.isfinite, [*loss_values, self.gradient_norm])):
            self.optimizer.zero_grad()
            raise RunFailure(self._describe_divergence(loss_values, batches))
        scheduled = [group["lr"] for group in self.optimizer.param_groups]
        # The multiplier is one per SAE, so that every group of parameters gets the same rate.
        self.learning_rate = self.rate_rule.rate(
            scheduled[0], self.gradient_norm, self.n_training_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        # The schedulers compute the next rate from the one they find.
        for group, rate in zip(self.optimizer.param_groups, scheduled, strict=True):
            group["lr"] = rate
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()

    def _describe_divergence(self, losses: list[float], batches: Sequence[torch.Tensor]) -> str:
        step = self.n_training_steps + 1
        bad = sum(int(not torch.isfinite(batch).all()) for batch in batches)
        if int(self.ranks.sum(torch.tensor(bad))):
            return (
                f"step {step}: the language model's activations for SAE {self.name!r} hold NaN or "
                "infinity: check model.dtype and model.autocast"
            )
        if not all(map(math.isfinite, losses)):
            value = next(loss for loss in losses if not math.isfinite(loss))
            what = f"the loss of SAE {self.name!r} became {value}"
        else:
            what = f"the gradient norm of SAE {self.name!r} became {self.gradient_norm}"
        return f"step {step}: {what}: lower the learning rate or raise lr_warm_up_steps"

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the SAE's own steps in this session, without the language model."""
        return self.session_tokens / self.seconds if self.seconds else 0.0

    def read_row(self, output: TrainStepOutput) -> dict[str, float]:
        """The log row of the window that ends here; starts a new window."""
        row: dict[str, float] = {
            "step": self.n_training_steps,
            "tokens": self.n_training_samples,
            **self.window.read(self.ranks),
            "dead_latents": int(self.dead_neurons.sum().item()),
            **latent_statistics(
                self.act_freq_scores - self._firings_before,
                self.n_frac_active_samples - self._tokens_before,
                self.dead_neurons,
                self.sae,
            ),
            "lr": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "step_tokens_per_second": self.tokens_per_second,
        }
        for name, value in self.get_coefficients().items():
            row[f"coefficients/{name}"] = value
        for name, value in output.metrics.items():
            row[f"metrics/{name}"] = scalar(value)
        self.window = TrainingWindow()
        self._start_counting()
        return row

    def state_dict(self) -> dict[str, Any]:
        """What SAELens' state lacks: the log's window, of this rank, and the random numbers."""
        return {
            "stream": self.stream.state_dict(),
            "window": self.window.state_dict(),
            "firings_before": self._firings_before,
            "tokens_before": self._tokens_before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.stream.load_state_dict(state["stream"])
        self.window.load_state_dict(state["window"], self.sae.device)
        self._firings_before = state["firings_before"].to(self._firings_before)
        self._tokens_before = int(state["tokens_before"])

    @override
    def save_trainer_state(self, checkpoint_path: Path) -> None:
        """SAELens' state, and that of the learning-rate rule."""
        super().save_trainer_state(checkpoint_path)
        torch.save(self.rate_rule.state_dict(), checkpoint_path / RULES_FILE)

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """The inverse of `save_trainer_state`."""
        super().load_trainer_state(checkpoint_path)
        self._start_counting()
        self.rate_rule.load_state_dict(
            torch.load(Path(checkpoint_path) / RULES_FILE, weights_only=True)
        )


class _Clock:
    """Speed of training since the last reading."""

    def __init__(self, tokens: int = 0) -> None:
        self._time = time.perf_counter()
        self._tokens = tokens

    def tokens_per_second(self, tokens: int) -> float:
        now = time.perf_counter()
        speed = (tokens - self._tokens) / max(now - self._time, 1e-9)
        self._time, self._tokens = now, tokens
        return speed


class LockstepTrainer(MultiSAETrainer):
    """SAELens' trainer of several SAEs on one stream of activations, over our `StepTrainer`s.

    `total_training_samples` of cfg is a multiple of one step's tokens, `train_batch_size_samples`
    the size of a mini-batch over all ranks. The provider yields this rank's share of a mini-batch,
    (tokens, d_in) by hook. Each SAE's and the data's randomness is derived from the seed of the
    run. A checkpoint is due `checkpoint_seconds` after the last, whatever the position.
    """

    step_trainers: dict[str, StepTrainer]

    def __init__(
        self,
        cfg: SAETrainerConfig,
        saes: Mapping[str, TrainingSAE[Any]],
        hook_names: Mapping[str, str],
        data_provider: Iterator[dict[str, torch.Tensor]],
        *,
        options: StepOptions,
        own_options: Mapping[str, StepOptions] | None = None,
        learning_rates: Mapping[str, float] | None = None,
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
        self.options = options
        self.ranks = ranks
        self._own_options = own_options or {}
        self.tokens_per_step = cfg.train_batch_size_samples * options.accumulation_steps
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
        rates = learning_rates or {}
        self.step_trainers = {
            name: self._step_trainer(name, sae, rates.get(name, cfg.lr))
            for name, sae in self.saes.items()
        }
        # Under SAELens' name and type as well: its public methods look there.
        self.trainers = {**self.step_trainers}
        self._clock = _Clock()
        self._between_steps = self.position()

    def _step_trainer(self, name: str, sae: TrainingSAE[Any], lr: float) -> StepTrainer:
        cfg = self.cfg
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
            options=self._own_options.get(name, self.options),
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
        self._clock = _Clock(self.n_training_samples)
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
        mini_batches = [self.next_batch() for _ in range(self.options.accumulation_steps)]
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
            speed = self._clock.tokens_per_second(self.n_training_samples)
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
                    f"({type(error).__name__}: {str(error).splitlines()[0]}): "
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
