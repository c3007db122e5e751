"""The optimiser step of one SAE: SAELens' trainer, with what a long run needs.

Without any option the arithmetic is SAELens' own, bit for bit (tests/training/test_trainer.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from typing_extensions import override

from msae_plugin.architecture.calibration import SupportsRevival
from msae_plugin.architecture.input_units import estimate_units
from msae_plugin.architecture.kernels.decoding import MachineSettings
from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.architecture.training_sae import MultiScaleTrainingSAE
from msae_plugin.common.errors import RunFailure
from msae_plugin.common.seeding import RandomStream
from msae_plugin.training.data_parallel import share_batches
from msae_plugin.training.log import TrainingWindow, latent_statistics, scalar
from msae_plugin.training.schedules import GradientRateConfig, LearningRateRule, build_optimiser

RULES_FILE = "learning_rate_rule.pt"
_CENTRE_FILE = "activation_centre.safetensors"


@dataclass(frozen=True)
class StepOptions:
    """Options of our step beyond SAELens'."""

    lr: float | None = None  # Learning rate; None for the one that all SAEs share
    accumulation_steps: int = 1  # Mini-batches whose mean gradient makes one step
    weight_decay: float = 0.0  # AdamW's decay of the dictionaries; 0 is SAELens' Adam
    # Largest gradient norm over all parameters; None does not clip
    clip_grad_norm: float | None = 1.0
    lr_floor: float = 0.0  # The learning rate never falls below it after the warm-up
    gradient_lr: GradientRateConfig = field(default_factory=GradientRateConfig)
    # Activations are centred and scaled by the first batch, for an SAE that does not do it itself
    centres_inputs: bool = False
    machine: MachineSettings = field(default_factory=MachineSettings)


class CentringScaler(ActivationScaler):
    """SAELens' scaler, which subtracts a centre (d_in,) first: (x - centre) * scaling_factor.

    A multiscale SAE centres by itself (`architecture/input_units.py`). So that a comparison gives
    every method the same help, this does it for any other, until `fold_centre` at the end.
    """

    centre: torch.Tensor | None = None  # (d_in,); None until it is estimated

    @torch.no_grad()
    def estimate(self, activations: torch.Tensor, ranks: Ranks) -> None:
        """Take centre and factor from the first batch (n_tokens, d_in) of all ranks."""
        if self.centre is None:
            shift, scale = estimate_units(ranks.concatenated(activations)[0])
            self.centre, self.scaling_factor = shift, 1 / float(scale)

    @override
    def scale(self, acts: torch.Tensor) -> torch.Tensor:
        if self.centre is not None:
            acts = (acts - self.centre.to(acts.device)).to(acts.dtype)
        return super().scale(acts)

    @override
    def unscale(self, acts: torch.Tensor) -> torch.Tensor:
        acts = super().unscale(acts)
        if self.centre is None:
            return acts
        return (acts + self.centre.to(acts.device)).to(acts.dtype)

    @override
    def save(self, file_path: str) -> None:
        super().save(file_path)
        if self.centre is not None:
            save_file({"centre": self.centre.contiguous()}, Path(file_path).parent / _CENTRE_FILE)

    @override
    def load(self, file_path: str | Path) -> None:
        super().load(file_path)
        centre = Path(file_path).parent / _CENTRE_FILE
        self.centre = load_file(centre)["centre"] if centre.exists() else None


@torch.no_grad()
def fold_centre(sae: TrainingSAE[Any], scaler: ActivationScaler) -> None:
    """Let the SAE take raw activations; its scaling factor is folded in already."""
    if isinstance(scaler, CentringScaler) and scaler.centre is not None:
        sae.b_dec.add_(scaler.centre.to(sae.b_dec))
        scaler.centre = None


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
            **{f"coefficients/{name}": value for name, value in self.get_coefficients().items()},
            **{f"metrics/{name}": scalar(value) for name, value in output.metrics.items()},
        }
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
